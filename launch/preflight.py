"""Are these nodes fit to train? `python -m launch.preflight {node,judge}`, before training, in the job's own script.

`node` (one task per node) writes what it finds to the attempt's preflight/ folder, `python -m
parallel.start.interconnect` (one task per device) adds devices and all-reduces, and `judge` names the bad nodes:
bad_nodes.json for the verdict, exclude.txt for the next start. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launch.folder import RunFolder, read_json, write_json

PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy")
PINGS, PATIENCE_S = 8, 60.0
BAD = 77


def node() -> int:
    """Write this node's facts: clock against the first node's, versions, code, free space."""
    folder, rank = Path(os.environ["HOPE_CONTROL"]) / "preflight", int(os.environ.get("SLURM_PROCID", "0"))
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    address = (os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"]))
    skew = serve_clock(address, nodes - 1) if rank == 0 else clock_skew(address)
    facts = {
        "node": socket.gethostname(),
        "rank": rank,
        "skew_s": skew,
        "versions": versions(),
        "code": code_hash(Path(os.environ["PYTHONPATH"].split(os.pathsep)[0])),
        "run_gb": shutil.disk_usage(os.environ["HOPE_RUN"]).free / 1e9,
        "local_gb": shutil.disk_usage(tempfile.gettempdir()).free / 1e9,
        "local": tempfile.gettempdir(),
    }
    write_json(folder / f"node-{rank:05d}.json", facts)
    return 0


def versions() -> str:
    """Python and the packages that decide results, in one line."""
    found = [f"python {sys.version.split()[0]}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} missing")
    return ", ".join(found)


def code_hash(folder: Path) -> str:
    """SHA-256 over all Python files below a folder, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def serve_clock(address: tuple[str, int], others: int) -> float:
    """On the first node: answer every ping with the time, until all others are done; 0, its own skew."""

    def answer(peer: socket.socket) -> None:
        with peer:
            while peer.recv(1):
                peer.sendall(repr(time.time()).encode().ljust(32))

    if others == 0:
        return 0.0
    with socket.create_server(("", address[1])) as server:
        server.settimeout(PATIENCE_S)
        threads = []
        try:
            for _ in range(others):
                peer, _ = server.accept()
                peer.settimeout(PATIENCE_S)
                threads.append(threading.Thread(target=answer, args=(peer,), daemon=True))
                threads[-1].start()
        except TimeoutError:
            pass  # a node that never came has no facts, which the judge says
        for thread in threads:
            thread.join(PATIENCE_S)
    return 0.0


def clock_skew(address: tuple[str, int]) -> float | None:
    """Seconds that this node's clock is ahead of the first node's: the ping with the shortest way. None: no answer."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(address, timeout=5) as server:
                return min(_ping(server) for _ in range(PINGS))[1]
        except (OSError, ValueError):
            time.sleep(0.2)
    return None


def _ping(server: socket.socket) -> tuple[float, float]:
    """(round trip, skew)."""
    before = time.time()
    server.sendall(b"?")
    answer = b""
    while len(answer) < 32:
        part = server.recv(32 - len(answer))
        if not part:
            raise ValueError("the first node hung up")
        answer += part
    after = time.time()
    return after - before, (before + after) / 2 - float(answer)


def judge(nodes: list[dict[str, Any]], links: list[dict[str, Any]], expected: int, world: int,
          wanted: dict[str, Any]) -> dict[str, str]:  # fmt: skip
    """{node: why} of the bad ones; {"": why} if something is wrong that no node can be blamed for.

    `nodes` and `links` are what the tasks wrote, of `expected` nodes and `world` ranks; `wanted` the site's floors.
    """
    bad: dict[str, list[str]] = {}

    def blame(name: str, why: str) -> None:
        bad.setdefault(name, []).append(why)

    if len(nodes) < expected:
        blame("", f"{expected - len(nodes)} of {expected} nodes gave no answer")
    for key, word in (("versions", "versions"), ("code", "code")):
        usual = statistics.mode(n[key] for n in nodes) if nodes else ""
        for n in nodes:
            if n[key] != usual:
                blame(n["node"], f"other {word} than most: {n[key]}, not {usual}")
    for n in nodes:
        if n["skew_s"] is None:
            blame(n["node"], "could not reach the first node")
        elif abs(n["skew_s"]) > wanted["skew_s"]:
            blame(n["node"], f"its clock is {n['skew_s']:+.1f} s off")
        if n["run_gb"] < wanted["free_gb"]:
            blame("", f"{n['run_gb']:.1f} GB free in the run folder, less than {wanted['free_gb']:g}")
        if n["local_gb"] < wanted["local_gb"]:
            blame(n["node"], f"{n['local_gb']:.2f} GB free in {n['local']}, less than {wanted['local_gb']:g}")
    _judge_devices(links, wanted, blame)
    if len(links) < world:
        silent = sorted(set(range(world)) - {r["rank"] for r in links})
        blame("", f"no answer of ranks {silent[:8]}")
    return {name: "; ".join(dict.fromkeys(why)) for name, why in bad.items()}


def _judge_devices(links: list[dict[str, Any]], wanted: dict[str, Any], blame: Callable[[str, str], object]) -> None:
    floor = wanted["bandwidth_gb_s"]
    for r in links:
        if wanted["gpus"] and r["devices"] < wanted["gpus"]:
            blame(r["node"], f"shows {r['devices']} GPUs, not {wanted['gpus']}")
        if wanted["gpu_memory_gb"] and r["memory_gb"] < 0.95 * wanted["gpu_memory_gb"]:
            blame(r["node"], f"a GPU with {r['memory_gb']:.1f} GiB, not {wanted['gpu_memory_gb']:g}")
        if r["inside"]["wrong"]:
            blame(r["node"], "an all-reduce inside the node gave a wrong sum")
        elif r["inside"]["gb_s"] is not None and r["inside"]["gb_s"] < floor:
            blame(r["node"], f"{r['inside']['gb_s']:.1f} GB/s inside the node, less than {floor:g}")
    pairs = {(tuple(p["nodes"]), p["wrong"], p["gb_s"]) for r in links for p in r["pairs"]}
    failing = {nodes: "wrong sums" if wrong else f"{gb_s:.1f} GB/s" for nodes, wrong, gb_s in pairs
               if wrong or (gb_s is not None and gb_s < floor)}  # fmt: skip
    for name in {n for nodes in failing for n in nodes}:
        of_it = [nodes for nodes, _, _ in pairs if name in nodes]
        all_fail = all(nodes in failing for nodes in of_it)
        # with a single pair either may be to blame: the one that is not the head node goes
        if all_fail and (len(set(of_it)) > 1 or name == of_it[0][1]):
            blame(
                name, "; ".join(f"{failing[nodes]} between {nodes[0]} and {nodes[1]}" for nodes in sorted(set(of_it)))
            )


def decide() -> int:
    """Judge this attempt; BAD (77) and the names in bad_nodes.json and exclude.txt, or 0."""
    run, control = RunFolder(os.environ["HOPE_RUN"]), Path(os.environ["HOPE_CONTROL"])
    job = read_json(run.job)

    def read(pattern: str) -> list[dict[str, Any]]:
        return [f for f in map(read_json, sorted((control / "preflight").glob(pattern))) if f]

    nodes, links = read("node-*.json"), read("links-*.json")
    bad = judge(nodes, links, job["nodes"], job["world"], job["preflight"])
    speeds = [p["gb_s"] for r in links for p in r["pairs"] if p["gb_s"] is not None]
    inside = [r["inside"]["gb_s"] for r in links if r["inside"]["gb_s"] is not None]
    kinds = (("inside nodes", inside), ("between two nodes", speeds))
    shown = [f"{word} {min(values):.2f} GB/s or more" for word, values in kinds if values]
    print(f"preflight: {len(nodes)} of {job['nodes']} nodes, {len(links)} of {job['world']} ranks answered; "
          f"{', '.join(shown) or 'no links to measure'}")  # fmt: skip
    for name, why in bad.items():
        print(f"preflight: BAD {name or '(no one node)'}: {why}", flush=True)
    if not bad:
        return 0
    write_json(control / "bad_nodes.json", bad)
    with run.exclude.open("a") as file:
        file.writelines(f"{name}\n" for name in bad if name)
    return BAD


if __name__ == "__main__":
    sys.exit({"node": node, "judge": decide}[sys.argv[1]]())
