"""What a run will be, from its configuration alone: layout, parameters, memory, FLOPs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import torch

from hope.block import Block
from hope.config import ModelConfig
from hope.dense import COMPILED
from hope.flops import Flops
from hope.model import Model
from hope.optim.clocks import frozen
from hope.optim.config import OptimConfig
from hope.optim.kernels import kernels_of_run
from hope.optim.levels import parameter_groups
from hope.optim.policy import MATRIX_OPTIMIZERS
from parallel.layout.memory import GIB, RankMemory, StepShape, build_part, carried_bytes, rank_memory
from parallel.layout.stages import describe_split, split
from parallel.layout.topology import ParallelDims
from parallel.layout.traffic import reduced_bytes_per_step


def model_flops(config: ModelConfig) -> Callable[[int], Flops]:
    """FLOPs per token of the whole model as a function of the sequence length."""
    with torch.device("meta"):
        return Model(config).flops


def model_facts(config: ModelConfig, shape: StepShape) -> tuple[dict[str, tuple[int, int]], float, float]:
    """({level: (period, parameters)}, FLOPs per training token, of which memory writes), allocating no weights."""
    with torch.device("meta"):
        model = Model(config)
    levels: dict[str, tuple[int, int]] = {}
    for group in parameter_groups(model, 0.0, tokens_per_step=shape.tokens_per_step):
        level = group["name"].split(".")[0]
        _, before = levels.get(level, (0, 0))
        levels[level] = (group["period"], before + sum(p.numel() for p in group["params"]))
    flops = model.flops(shape.seq_len)
    return levels, flops.training, 3 * flops.writes


def pattern_of(config: ModelConfig) -> str:
    """`hope`, or `3 hope + attention` where layers differ, with how often each comes."""
    names = config.mixer_of_layer
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return names[0] if len(counts) == 1 else " + ".join(f"{count} {name}" for name, count in counts.items())


def micro_batches_in_flight(stage: int, pipeline: int, virtual: int, count: int) -> float:
    """Micro-batches whose activations a stage holds at once, in units of all its chunks.

    1F1B runs pipeline - stage forward passes before the first backward; the interleaved schedule 2 (pipeline - stage
    - 1) + (virtual - 1) pipeline + 1 chunk passes (megatron-core 0.16.1, schedules.py).
    """
    if virtual == 1:
        return min(pipeline - stage, count)
    return min((2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1) / virtual, count)


def stage_lines(
    config: ModelConfig, dims: ParallelDims, shape: StepShape, micro_batches: int, optim: OptimConfig
) -> list[str]:
    """One line per pipeline stage: all its ranks (tensor x data) hold equally much."""
    titles = "GiB: weights  gradients  optimizer  activations  fast weights    peak"
    lines = [f"{'stage':<6}{'ranks':<12}{'heads':>6}{'parameters':>14}  {titles}"]
    parts = split(config, shape.seq_len, dims.pipeline, dims.virtual_pipeline)
    width = dims.tensor * dims.data
    for stage, slices in enumerate(parts):
        flight = micro_batches_in_flight(stage, dims.pipeline, dims.virtual_pipeline, micro_batches)
        memory = rank_memory(config, slices, flight, shape, optim)
        numbers = sum(p.numel() for s in slices for p in build_part(config, s, shape).parameters())
        ranks = f"{stage * width}-{(stage + 1) * width - 1}" if width > 1 else str(stage)
        lines.append(f"{stage:<6}{ranks:<12}{config.heads // dims.tensor:>6}{numbers:>14,}  {_gib(memory)}")
    return lines


def _gib(memory: RankMemory) -> str:
    columns = [(memory.weights, 12), (memory.gradients, 11), (memory.optimizer, 11), (memory.activations, 13)]
    columns += [(memory.fast_weights, 14), (memory.peak, 8)]
    return "".join(f"{size / GIB:>{width}.2f}" for size, width in columns)


def kernel_facts(choices: Iterable[tuple[str, str]]) -> str:
    """`memory: plain (CPU)  optimizer: fused`, for every part of the program that has a choice of kernels."""
    return "  ".join(f"{part}: {choice}" for part, choice in choices)


def in_context_lines(config: ModelConfig, shape: StepShape) -> Iterator[str]:
    """Of every level in context, or all nested ones: what it is, and the bytes that it carries of one sequence in one
    layer on a rank. Tokens of an open chunk come on top."""
    with torch.device("meta"):
        fast = Block(config, config.mixer_of_layer[0]).cms.fast()
    for group, level in zip(config.cms.groups, fast, strict=True):
        mlp, sizes = level.mlp, level.mlp.sizes
        clock = " within ".join(str(section.chunk) for section in group)
        state = mlp.start(1)
        bytes_ = 0 if state is None else state.nbytes() // shape.tensor
        kind = "nested, " if len(group) > 1 else ""
        yield (
            f"{kind}{sizes.heads} MLPs {sizes.head_dim} -> {sizes.hidden} -> {sizes.head_dim}, rewritten every {clock} "
            f"tokens for the {group[0].objective} ({group[0].read}), {bytes_:,} bytes of state per sequence, layer and "
            "rank"
        )


def _mixer_kernels(config: ModelConfig, device: str, bf16: bool) -> Iterator[tuple[str, str]]:
    """(mixer's name, what it would run and why) of every mixer that has a choice."""
    for name in dict.fromkeys(config.mixer_of_layer):
        with torch.device("meta"):
            choice = config.build_mixer(name).kernels(torch.device(device), torch.bfloat16 if bf16 else torch.float32)
        if choice is not None:
            yield name, choice


def _optimizer_kernels(optim: OptimConfig, device: str) -> tuple[str, str]:
    part = f"{optim.name} of all but matrices" if optim.name in MATRIX_OPTIMIZERS else "optimizer"
    return part, str(kernels_of_run(optim, device))


def describe(
    config: ModelConfig,
    dims: ParallelDims,
    shape: StepShape,
    global_batch: int,
    optim: OptimConfig,
    device: str,
    compile: str = "none",
    stream: bool = False,
) -> str:
    """The table that a start or `--dry-run` prints: the model, the layout, the split, and bytes per rank.

    `device`: this process's type of device, such as "cuda", which says what kernels it can take. A dry run without a
    GPU of a run that will have some says so too. `compile`: as in the train section. `stream`: whether states are
    carried from step to step.
    """
    levels, flops, writes = model_facts(config, shape)
    total = sum(count for _, count in levels.values())
    count = global_batch // (shape.micro_batch * dims.data)
    clocks = "  ".join(f"{name} {size:,} every {period}" for name, (period, size) in levels.items())
    sequence = " with sequence parallelism" if shape.sequence else ""
    rows = [
        ("model", f"{pattern_of(config)}  {config.layers} layers  width {config.width}  {config.heads} heads of "
                  f"{config.head_dim}  MLPs of {config.hidden_per_level()}"),
        ("parameters", f"{total:,}  {clocks}"),
        ("layout", f"{dims.world_size} devices = tensor {dims.tensor} x pipeline {dims.pipeline} x context "
                   f"{dims.context} x data {dims.data} (ZeRO-1){sequence}"),
        ("batch", f"{global_batch} x {shape.seq_len} = {global_batch * shape.seq_len:,} tokens per step, "
                  f"{count} micro-batches of {shape.micro_batch} per device"),
        ("traffic", f"{_traffic(config, dims, shape, optim) / GIB:.3f} GiB of gradients reduced per step and rank "
                    f"(optim.accumulate {optim.accumulate})"),
        ("FLOPs", f"{flops:.3e} per trained token, {writes / flops:.1%} of them memory writes"),
        ("kernels", kernel_facts([*_mixer_kernels(config, device, shape.bf16), _optimizer_kernels(optim, device),
                                  *([(COMPILED[compile], "compiled")] if compile in COMPILED else [])])),
    ]  # fmt: skip
    text = [f"{name:<11} {fact}" for name, fact in rows]
    text[3:3] = [f"{'in context':<11} {line}" for line in in_context_lines(config, shape)]
    if stream:
        parts = split(config, shape.seq_len, dims.pipeline, dims.virtual_pipeline)
        carried = max(carried_bytes(config, slices, shape, count) for slices in parts) / GIB
        what = f"{carried:.3f} GiB of states per rank go on from step to step, twice that during a step"
        text.append(f"{'stream':<11} {what}, beside the peak below")
    if dims.pipeline > 1:
        text += describe_split(config, shape.seq_len, dims.pipeline, dims.virtual_pipeline)
    return "\n".join([*text, *stage_lines(config, dims, shape, count, optim)])


def group_table(config: ModelConfig, optim: OptimConfig, tokens_per_step: int | None) -> str:
    """The optimizer's parameter groups: rule, clock, peak rate and its factor, decay, betas, tensors, parameters."""
    with torch.device("meta"):
        groups = parameter_groups(Model(config), optim.weight_decay, optim, tokens_per_step)
    rows = [("group", "rule", "every", "peak rate", "x", "decay", "beta1", "beta2", "tensors", "parameters")]
    for group in groups:
        numbers = (f"{optim.lr * group['rate']:.2e}", f"{group['rate']:.3g}", f"{group['weight_decay']:g}")
        betas = (f"{_given(group['beta1'], optim.beta1):g}", f"{_given(group['beta2'], optim.beta2):g}")
        size = (str(len(group["params"])), f"{sum(p.numel() for p in group['params']):,}")
        rows.append((group["name"], _rule(group, optim), str(group["period"]), *numbers, *betas, *size))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    shown = lambda row: [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
    return "\n".join("  ".join(shown(row)).rstrip() for row in rows)


def _given(own: float | None, shared: float) -> float:
    return shared if own is None else own


def _rule(group: Mapping[str, Any], optim: OptimConfig) -> str:
    if frozen(group):
        return "frozen"
    if not group["matrices"]:
        return "adamw" if optim.name in MATRIX_OPTIMIZERS else optim.name
    return f"{optim.name} per head" if group["head_rows"] else optim.name


def _traffic(config: ModelConfig, dims: ParallelDims, shape: StepShape, optim: OptimConfig) -> float:
    stages = split(config, shape.seq_len, dims.pipeline, dims.virtual_pipeline)
    return max(reduced_bytes_per_step(config, slices, shape, optim) for slices in stages)


def environment(device: torch.device) -> str:
    """Versions and device; never environment variables, which may hold secrets."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    packages = [f"{p} {version(p)}" for p in ("torch", "megatron-core", "deepspeed", "numpy", "sentencepiece")]
    return "\n".join([f"python {sys.version.split()[0]}", *packages, f"device {name}", ""])
