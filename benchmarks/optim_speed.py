"""Milliseconds per optimizer step, peak temporary and state of every optimizer at N parameters, beside torch's AdamW.

    python benchmarks/optim_speed.py --parameters 1e9 --shape 2048 --steps 20            on a GPU
    python benchmarks/optim_speed.py --parameters 1e6 --shape 128 --steps 5              on a CPU, at toy size

One flat fp32 master as ZeRO-1 hands it over at data-parallel degree 1, made of square matrices of `--shape`; matrix
optimizers get the matrices. All optimizers of one table take turns in every round. Peak temporary: device memory that
a step allocates beyond its start, on a GPU only.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from hope.arguments import finite, whole
from hope.optim.build import build_optimizer
from hope.optim.clocks import ClockedOptimizer
from hope.optim.config import DmgdConfig, MlpConfig, OptimConfig
from hope.optim.segments import Piece, Segments
from hope.pipe import piped

SETTINGS = {
    "dmgd linear (AdamW)": OptimConfig(),
    "dmgd linear, dot, P at the value": OptimConfig(dmgd=DmgdConfig(objective="dot", normalise="value")),
    "dmgd mlp, key memory": OptimConfig(dmgd=DmgdConfig(memory="mlp")),
    "dmgd mlp, key gradient": OptimConfig(dmgd=DmgdConfig(memory="mlp", mlp=MlpConfig(key="gradient"))),
    "muon": OptimConfig(name="muon"),
    "m3, f = 16": OptimConfig(name="m3"),
}


def flat(count: int, shape: int, device: torch.device) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.randn(count * shape * shape, device=device) * 0.02)
    parameter.grad = torch.randn_like(parameter) * 1e-3
    return parameter


def torchs(count: int, shape: int, device: torch.device) -> tuple[Callable[[], object], torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW([flat(count, shape, device)], lr=1e-5, fused=True)
    return optimizer.step, optimizer


def ours(
    config: OptimConfig, count: int, shape: int, device: torch.device
) -> tuple[Callable[[], object], ClockedOptimizer]:
    master = flat(count, shape, device)
    size = shape * shape
    if config.name == "dmgd":
        optimizer = build_optimizer([{"params": [master], "weight_decay": 0.1}], dataclasses.replace(config, lr=1e-5))
        segments = Segments(count, tuple(Piece(i, i * size, size) for i in range(count)))
        optimizer.attach(lambda parts: parts, {master: segments})
        return optimizer.step, optimizer
    matrices = [torch.nn.Parameter(part.view(shape, shape)) for part in master.detach().split(size)]
    assert master.grad is not None
    for matrix, gradient in zip(matrices, master.grad.split(size), strict=True):
        matrix.grad = gradient.view(shape, shape)
    groups = [{"params": matrices, "matrices": True}]
    optimizer = build_optimizer(groups, dataclasses.replace(config, lr=1e-5), precision="bf16")
    return optimizer.step, optimizer


def timed(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(ms, GiB allocated beyond the start) of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began), (torch.cuda.max_memory_allocated() - held) / 2**30
    return 1e3 * (time.perf_counter() - began), float("nan")


def bytes_per_parameter(optimizer: torch.optim.Optimizer, numbers: int) -> float:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) / numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=finite, default=1e9)
    parser.add_argument("--shape", type=whole(), default=2048)
    parser.add_argument("--steps", type=whole(), default=20)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = max(1, round(args.parameters / args.shape**2))
    numbers = count * args.shape**2
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{numbers:,} parameters in {count} matrices of {args.shape}, {name}")
    print(
        "| optimizer | ms per step | range | x torch's fused AdamW | peak temporary GiB | state bytes per parameter |"
    )
    print("|---|---|---|---|---|---|")
    for label in args.only:  # two at a time: several optimizers of a billion parameters do not fit together
        pair = {
            "torch AdamW, fused": torchs(count, args.shape, device),
            label: ours(SETTINGS[label], count, args.shape, device),
        }
        for _ in range(3):  # states are created, kernels compiled
            for step, _ in pair.values():
                step()
        found = {key: [timed(step, device) for _ in range(1)] for key, (step, _) in pair.items()}
        for _ in range(args.steps - 1):
            for key, (step, _) in pair.items():
                found[key].append(timed(step, device))
        medians = {key: statistics.median(ms for ms, _ in values) for key, values in found.items()}
        reference = medians["torch AdamW, fused"]
        for key, values in found.items():
            times = [ms for ms, _ in values]
            peak, state = max(peak for _, peak in values), bytes_per_parameter(pair[key][1], numbers)
            spread = f"{min(times):.2f} - {max(times):.2f}"
            print(
                f"| {key} | {medians[key]:.2f} | {spread} | {medians[key] / reference:.2f} | {peak:.3f} | {state:.2f} |"
            )
        del pair
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
