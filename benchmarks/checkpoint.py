"""What a checkpoint costs a run: seconds blocked, until durable, GB/s, and the steps meanwhile.

    python benchmarks/checkpoint.py                                                    a toy, on the CPU
    torchrun --nproc-per-node 2 benchmarks/checkpoint.py --preset 1b --keep            1.0e9 parameters, on GPUs
    torchrun --nproc-per-node 2 benchmarks/checkpoint.py --preset 1b --load --tensor 2   that, in another layout

Every round times `--steps` steps, stages a save, and goes on until it is durable; the median step of these two phases
gives the slow-down. The folder is removed at the start, and kept with `--keep` for a `--load`, which prints the loss of
a fixed batch: it must be the one that was printed when it was saved. `--every-s` is the interval for the total cost.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from hope.arguments import count, finite, whole
from hope.batch import Batch
from hope.config import CmsConfig, ModelConfig
from hope.memory.config import MemoryConfig
from hope.optim.config import OptimConfig
from hope.pipe import piped
from parallel.checkpoint.checkpointer import Checkpointer, SavedCheckpoint
from parallel.compute.pipeline import mean_loss
from parallel.compute.replica import Replica, build_replica
from parallel.layout.topology import ParallelConfig
from parallel.referee.evidence import micro_batches
from parallel.start import groups

# name: (vocabulary, width, layers, heads, sequence length, sequences per device)
PRESETS = {"toy": (512, 64, 2, 4, 64, 2), "17m": (8192, 384, 8, 6, 1024, 8), "1b": (32768, 2048, 18, 16, 1024, 8)}


def build(preset: str, layout: ParallelConfig, ranks: groups.Ranks) -> tuple[Replica, Batch]:
    """A model with its optimizer, and one global batch."""
    vocabulary, width, layers, heads, length, rows = PRESETS[preset]
    chunk = min(128, length)
    memory = MemoryConfig(projection_chunk=chunk, main_chunk=chunk)
    model = ModelConfig(
        ["hope"], vocabulary, width, layers, heads, mixers={"hope": memory}, cms=CmsConfig(periods=[1, 4])
    )
    precision = "bf16" if ranks.device.type == "cuda" else "fp32"
    optim = OptimConfig(lr=1e-4, warmup=0)
    replica = build_replica(model, optim, layout, ranks, seq_len=length, precision=precision, seed=1, recompute="block")
    tokens = torch.randint(0, vocabulary, (length + 1, rows * 2), generator=torch.Generator().manual_seed(0))
    return replica, Batch(tokens[:-1].contiguous(), tokens[1:].contiguous(), None)


def step(replica: Replica, batch: Batch, rows: int) -> float:
    """One training step; its seconds."""
    began = time.perf_counter()
    replica.run(micro_batches(batch, rows, replica.ranks))
    replica.reduce()
    replica.optimizer.grad_norms()
    replica.optimizer.step()
    if replica.ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def loss(replica: Replica, batch: Batch, rows: int) -> float:
    reports = replica.run(micro_batches(batch, rows, replica.ranks), forward_only=True)
    return groups.loss_on_all_ranks(mean_loss(reports, replica.ranks.device), replica.ranks).item()


def one_round(
    replica: Replica, keeper: Checkpointer, batch: Batch, rows: int, steps: int, number: int
) -> dict[str, float]:
    """Steps alone, then a save and the steps until it is durable on every rank."""
    alone = [step(replica, batch, rows) for _ in range(steps)]
    groups.barrier()
    began = time.perf_counter()
    staged = keeper.stage(number, replica.models, replica.optimizer, {"round": number})
    blocked = time.perf_counter() - began
    written: list[SavedCheckpoint] = []
    thread = threading.Thread(target=lambda: written.append(keeper.write(staged)))
    thread.start()
    meanwhile = []
    while groups.any_rank(thread.is_alive()):
        meanwhile.append(step(replica, batch, rows))
    thread.join()
    if not written:
        raise RuntimeError("the save failed")
    durable = blocked + written[0].seconds
    size = torch.tensor([float(written[0].bytes)], device=replica.ranks.device)
    dist.all_reduce(size)
    slower = sum(meanwhile) - len(meanwhile) * statistics.median(alone)
    return {
        "blocked_s": blocked,
        "durable_s": durable,
        "gb": size.item() / 1e9,
        "gb_per_s": size.item() / 1e9 / durable,
        "step_alone_s": statistics.median(alone),
        "step_meanwhile_s": statistics.median(meanwhile) if meanwhile else float("nan"),
        "lost_s": blocked + max(0.0, slower),
    }


def main() -> int:
    """Print a line per round and the medians, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="toy")
    parser.add_argument("--folder", default="runs/checkpoint-benchmark")
    parser.add_argument("--rounds", type=whole(), default=3)
    parser.add_argument("--steps", type=whole(), default=5)
    parser.add_argument("--tensor", type=count, default=1)
    parser.add_argument("--pipeline", type=count, default=1)
    parser.add_argument("--load", action="store_true", help="load what another call left with --keep")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--every-s", type=finite, default=600.0, help="seconds between checkpoints")
    args = parser.parse_args()
    layout, folder, rows = (
        ParallelConfig(tensor=args.tensor, pipeline=args.pipeline),
        Path(args.folder),
        PRESETS[args.preset][5],
    )
    with groups.start(layout) as ranks:
        say = print if ranks.rank == 0 else lambda *words, **options: None
        replica, batch = build(args.preset, layout, ranks)
        parameters = sum(p.numel() for model in replica.models for p in model.parameters())
        device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
        say(f"{device}, {ranks.dims}, {parameters:,} parameters on this rank, torch {torch.__version__}")
        keeper = Checkpointer(folder, ranks)
        if args.load:
            began = time.perf_counter()
            found, notes = keeper.find()
            verified = time.perf_counter() - began
            if found is None:
                raise SystemExit(f"{folder} holds no checkpoint")
            notes += keeper.load(found, replica.models, replica.optimizer)
            seconds = {"verified_s": verified, "loaded_s": time.perf_counter() - began - verified}
            say(json.dumps({**seconds, "gb": found.manifest.bytes / 1e9, "loss": loss(replica, batch, rows)}))
            say("\n".join(notes))
            return 0
        if ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        groups.barrier()
        began = time.perf_counter()
        keeper.reserve(replica.optimizer)
        say(json.dumps({"reserved_s": time.perf_counter() - began}))
        for _ in range(2):
            step(replica, batch, rows)
        results = []
        for number in range(args.rounds):
            results.append(one_round(replica, keeper, batch, rows, args.steps, number + 1))
            say(json.dumps({"round": number + 1, **results[-1]}))
        medians = {key: statistics.median(r[key] for r in results) for key in results[0]}
        say(json.dumps({"median": medians, "cost_at_every_s": medians["lost_s"] / args.every_s}))
        if args.keep:
            keeper.write(keeper.stage(args.rounds + 1, replica.models, replica.optimizer, {}))
            say(json.dumps({"loss": loss(replica, batch, rows)}))
        elif ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
