"""What a run will be, from its configuration alone: layout, parameters, memory, FLOPs."""

import sys
from importlib.metadata import version

import torch

from hope.config import ModelConfig
from hope.model import Model
from hope.optim.levels import parameter_groups
from parallel.topology import ParallelDims

GIB = 2**30


def model_facts(config: ModelConfig, seq_len: int) -> tuple[dict[str, tuple[int, int]], float, float]:
    """({level: (period, parameters)}, FLOPs per training token, of which memory writes), without allocating weights."""
    with torch.device("meta"):
        model = Model(config)
    levels: dict[str, tuple[int, int]] = {}
    for group in parameter_groups(model, 0.0):
        level = group["name"].split(".")[0]
        _, before = levels.get(level, (0, 0))
        levels[level] = (group["period"], before + sum(p.numel() for p in group["params"]))
    flops = model.flops(seq_len)
    return levels, flops.training, 3 * flops.writes


def optimizer_bytes_per_parameter(periods: list[int], adam: bool) -> float:
    """fp32 master, memory, squares and, for levels with a period above 1, the gradient accumulator."""
    return 4 * (1 + 1 + int(adam) + int(max(periods) > 1))


def describe(
    config: ModelConfig,
    dims: ParallelDims,
    *,
    seq_len: int,
    global_batch: int,
    micro_batch: int,
    bf16: bool,
    adam: bool,
) -> str:
    """The table that a start or `--dry-run` prints: one line per fact."""
    levels, flops, writes = model_facts(config, seq_len)
    total = sum(count for _, count in levels.values())
    state = sum(count * optimizer_bytes_per_parameter([period], adam) for period, count in levels.values()) / dims.data
    weights = total * (2 + 4 if bf16 else 4 + 4)  # with the gradients: fp32 in both cases
    rows = [
        ("model", f"{config.kind}  {config.layers} layers  width {config.width}  {config.heads} heads of "
                  f"{config.head_dim}"),
        ("parameters", f"{total:,}  " + "  ".join(f"{k} {n:,} every {p}" for k, (p, n) in levels.items())),
        ("layout", f"{dims.world_size} devices = tensor {dims.tensor} x pipeline {dims.pipeline} x context "
                   f"{dims.context} x data {dims.data} (ZeRO-1)"),
        ("batch", f"{global_batch} x {seq_len} = {global_batch * seq_len:,} tokens per step, "
                  f"{global_batch // (micro_batch * dims.data)} micro-batches of {micro_batch} per device"),
        ("per device", f"weights and gradients {weights / GIB:.3f} GiB, optimizer state {state / GIB:.3f} GiB"),
        ("FLOPs", f"{flops:.3e} per trained token, {writes / flops:.1%} of them memory writes"),
    ]  # fmt: skip
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def environment(device: torch.device) -> str:
    """Versions and device; never environment variables, which may hold secrets."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    packages = [f"{p} {version(p)}" for p in ("torch", "megatron-core", "deepspeed", "numpy", "sentencepiece")]
    return "\n".join([f"python {sys.version.split()[0]}", *packages, f"device {name}", ""])
