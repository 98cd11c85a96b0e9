"""Correctness and speed of all-reduce inside every node and between nodes: `python -m parallel.start.interconnect`.

Every rank writes links-RANK.json to $HOPE_CONTROL/preflight. Sums are of small whole numbers, so they are exact in
fp32 in any order. Nodes are measured in pairs, twice with other partners, so that a slow node can be told from a slow
partner. Bus bandwidth is 2 (n - 1) / n x bytes / time, as nccl-tests counts it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.start import launcher
from parallel.start.meeting import meet

TIMEOUT_S, ROUNDS = 120, 5
GIB = 2**30


def partners(nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of node numbers, one list per round: every node is in one pair of a round, and meets two others in all."""
    first = [(n, n + 1) for n in range(0, nodes - 1, 2)]
    second = [(n, (n + 1) % nodes) for n in range(1, nodes - (nodes % 2 == 1), 2)]
    return [first, second] if nodes > 2 else [first]


def all_reduce(group: dist.ProcessGroup, ranks: list[int], device: torch.device) -> dict[str, Any]:
    """{wrong: whether a sum was not exact, gb_s: bus bandwidth} over the global `ranks` of `group`."""
    numbers = (2**24 if device.type == "cuda" else 2**20) // 4 * 4
    pattern = torch.arange(numbers, device=device, dtype=torch.float32) % 97
    wrong, seconds = False, []
    for _ in range(ROUNDS):
        tensor = pattern + dist.get_rank()
        _settle(device)
        began = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        _settle(device)
        seconds.append(time.perf_counter() - began)
        wrong |= not torch.equal(tensor, len(ranks) * pattern + sum(ranks))
    moved = 2 * (len(ranks) - 1) / len(ranks) * 4 * numbers
    return {"wrong": wrong, "gb_s": moved / min(seconds[1:]) / 1e9}


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(place: launcher.Launch, per_node: int, device: torch.device) -> dict[str, Any]:
    """This rank's facts; all ranks call it, ranks of a node are neighbours."""
    names: list[Any] = [None] * place.world_size
    dist.all_gather_object(names, socket.gethostname())
    nodes = [list(range(start, start + per_node)) for start in range(0, place.world_size, per_node)]
    mine = place.rank // per_node
    inside: dict[str, Any] = {"wrong": False, "gb_s": None}
    for number, ranks in enumerate(nodes):
        group = dist.new_group(ranks)
        if number == mine and per_node > 1:
            inside = all_reduce(group, ranks, device)
    pairs = []
    for pairing in partners(len(nodes)):
        for a, b in pairing:
            group = dist.new_group(nodes[a] + nodes[b])
            if mine in (a, b):
                found = all_reduce(group, nodes[a] + nodes[b], device)
                slowest: list[Any] = [None] * (2 * per_node)
                dist.all_gather_object(slowest, found, group=group)  # both nodes tell the same story
                speed = min(f["gb_s"] for f in slowest)
                pairs.append({"nodes": [names[nodes[a][0]], names[nodes[b][0]]], "gb_s": speed,
                              "wrong": any(f["wrong"] for f in slowest)})  # fmt: skip
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "rank": place.rank,
        "node": names[place.rank],
        "devices": torch.cuda.device_count(),
        "memory_gb": properties.total_memory / GIB if properties else 0.0,
        "name": properties.name if properties else "cpu",
        "inside": inside,
        "pairs": pairs,
    }


def main() -> int:
    place = launcher.from_environment(os.environ)
    per_node = place.world_size // int(os.environ.get("SLURM_NNODES", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank if torch.cuda.device_count() > 1 else 0)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=meet(place, launcher.attempt(os.environ), TIMEOUT_S),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    facts = measure(place, per_node, device)
    folder = Path(os.environ["HOPE_CONTROL"]) / "preflight"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"links-{place.rank:05d}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
