"""Will it fit, how long will it take: `python -m launch estimate CONFIG --nodes N --profile SITE`.

Memory is counted from shapes (parallel/layout/memory.py runs the rank's part of the model on the meta device); time is
model FLOPs over the GPU's dense bf16 peak at the utilisation of the nearest model measured on one (launch/speeds.py),
which is printed, or at the one that is given; with the layout's collectives (launch/collectives.py), and times the
pipeline's bubble.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from configs.schema import Config
from hope.train.console import duration
from hope.train.throughput import peak_flops
from launch import speeds
from launch.collectives import ONE_NODE, Bus, Collectives
from launch.profile import Profile
from parallel.layout.advice import divisors
from parallel.layout.memory import GIB, RankMemory, StepShape, rank_memory
from parallel.layout.report import micro_batches_in_flight, model_facts
from parallel.layout.stages import split
from parallel.layout.topology import ParallelConfig, ParallelDims

USABLE = 0.92  # of a device's memory: CUDA context, NCCL buffers and allocator slack take the rest


TITLES = (
    "tensor pipeline  data  weights  grads  optim (CMS acc.)  activ. (states)  loss    peak"
    "  bubble coll.     step    total"
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One layout. `step_s` is None when the GPU's peak is unknown; `collectives`: seconds of it, without the bubble."""

    layout: ParallelConfig
    data: int
    memory: RankMemory
    fits: bool
    bubble: float
    collectives: float
    step_s: float | None
    across: bool
    """Whether tensor-parallel ranks are on different nodes."""

    def __str__(self) -> str:
        return f"tensor {self.layout.tensor} pipeline {self.layout.pipeline} (data {self.data})"


def micro_batches(config: Config, layout: ParallelConfig, world: int) -> int:
    """Micro-batches of one rank in a step."""
    return config.train.global_batch // (config.train.micro_batch * layout.dims(world).data)


def worst_rank(config: Config, layout: ParallelConfig, world: int) -> RankMemory:
    """Bytes of the fullest pipeline stage's rank."""
    dims = layout.dims(world)
    shape = StepShape.of(config.train, layout, dims)
    count = micro_batches(config, layout, world)
    stages = split(config.model, config.train.seq_len, dims.pipeline, dims.virtual_pipeline)
    ranks = []
    for number, stage in enumerate(stages):
        in_flight = micro_batches_in_flight(number, dims.pipeline, dims.virtual_pipeline, count)
        ranks.append(rank_memory(config.model, stage, in_flight, shape, config.optim))
    return max(ranks, key=lambda rank: rank.peak)


def fits(memory: RankMemory, site: Profile) -> bool:
    """Whether a rank fits into a device of the site; true if the site does not say how large one is."""
    return not site.gpu_memory_gb or memory.peak / GIB <= USABLE * site.gpu_memory_gb


def bubble(config: Config, layout: ParallelConfig, world: int) -> float:
    """Idle share of a 1F1B step over its useful part: (p - 1) / (v m) for m micro-batches, v virtual stages."""
    return (layout.pipeline - 1) / (layout.virtual_pipeline * max(micro_batches(config, layout, world), 1))


def in_layout(useful: float, config: Config, layout: ParallelConfig, world: int, bus: Bus = ONE_NODE) -> float:
    """Seconds of a step of which `useful` are perfectly divided arithmetic: with collectives and the bubble."""
    return Collectives.of(config, layout, world, bus).step(useful, bubble(config, layout, world))


def parameters(config: Config) -> int:
    """Of the whole model."""
    levels, _, _ = model_facts(config.model, _whole(config))
    return sum(size for _, size in levels.values())


def measured(config: Config, known: Sequence[speeds.Speed] = speeds.MEASURED) -> speeds.Speed:
    """The measurement that times rest on, of those that are `known`."""
    return speeds.nearest(config, parameters(config), known)


def useful_seconds(config: Config, world: int, gpu: str, mfu: float | None = None) -> float | None:
    """Seconds of a step without bubble and collectives, in any layout; None if the GPU is not in the table of peaks.

    `mfu`: utilisation of one GPU, 0 to 1; None for the measured one.
    """
    peak = peak_flops(gpu)
    if peak is None:
        return None
    mfu = measured(config).mfu if mfu is None else mfu
    _, flops, _ = model_facts(config.model, _whole(config))
    return config.train.tokens_per_step * flops / (world * peak * mfu)


def step_seconds(config: Config, world: int, gpu: str, mfu: float | None = None, bus: Bus = ONE_NODE) -> float | None:
    """Seconds of an optimizer step in the configuration's layout; None as of `useful_seconds`."""
    useful = useful_seconds(config, world, gpu, mfu)
    return None if useful is None else in_layout(useful, config, config.parallel, world, bus)


def _whole(config: Config) -> StepShape:
    return StepShape.of(config.train, config.parallel, ParallelDims(1))


def layouts(
    config: Config, world: int, site: Profile, mfu: float | None = None, say: Callable[[str], object] = str
) -> list[Row]:
    """Every (tensor, pipeline) layout of `world` devices that the model and the batch allow: best first.

    Those that fit in memory first; then tensor ranks inside a node, the shorter step, less memory. `say` is told of
    every layout before it is counted, which takes seconds.
    """
    useful = useful_seconds(config, world, site.gpu, mfu)
    rows, candidates = [], list(_candidates(config, world))
    for number, layout in enumerate(candidates, 1):
        say(f"memory of layout {number} of {len(candidates)}: tensor {layout.tensor} pipeline {layout.pipeline}")
        rows.append(_row(config, layout, world, site, useful))
    times = lambda row: row.bubble if row.step_s is None else row.step_s
    return sorted(rows, key=lambda r: (not r.fits, r.across, times(r), r.layout.tensor, r.memory.peak))


def _row(config: Config, layout: ParallelConfig, world: int, site: Profile, useful: float | None) -> Row:
    memory, idle = worst_rank(config, layout, world), bubble(config, layout, world)
    sums = Collectives.of(config, layout, world, Bus.of(site))
    return Row(
        layout=layout,
        data=layout.dims(world).data,
        memory=memory,
        fits=fits(memory, site),
        bubble=idle,
        collectives=sums.tensor + sums.data,
        step_s=None if useful is None else sums.step(useful, idle),
        across=layout.tensor > site.ranks_per_node,
    )


def _candidates(config: Config, world: int) -> Iterator[ParallelConfig]:
    train = config.train
    for tensor in divisors(world):
        for pipeline in divisors(world // tensor):
            sequence = config.parallel.sequence and tensor > 1
            virtual = config.parallel.virtual_pipeline if pipeline > 1 else 1
            layout = dataclasses.replace(
                config.parallel, tensor=tensor, pipeline=pipeline, sequence=sequence, virtual_pipeline=virtual
            )
            if not list(layout.problems(world, train.global_batch, train.micro_batch, config.model, train.seq_len)):
                yield layout


def excess(memory: RankMemory, site: Profile) -> str:
    """What a rank that does not fit needs, and what a device of the site has, in words."""
    names = ("weights", "gradients", "optimizer", "activations", "loss")
    parts = ", ".join(f"{name} {getattr(memory, name) / GIB:.1f}" for name in names)
    return (f"the fullest rank needs {memory.peak / GIB:.1f} GiB ({parts}), "
            f"more than {USABLE:.0%} of {site.gpu_memory_gb:g} GiB")  # fmt: skip


def describe(
    config: Config,
    world: int,
    site: Profile,
    tokens: float,
    mfu: float | None,
    say: Callable[[str], object] = str,
    known: Sequence[speeds.Speed] = speeds.MEASURED,
) -> str:
    """The page that `estimate` prints. `mfu`: None for the measured one, of those `known`; `say`: see `layouts`."""
    levels, flops, writes = model_facts(config.model, _whole(config))
    total = sum(size for _, size in levels.values())
    clocks = "  ".join(f"{name} {size:,} every {period}" for name, (period, size) in levels.items())
    slow = sum(size for period, size in levels.values() if period > 1)
    peak = peak_flops(site.gpu)
    lines = [
        f"parameters  {total:,}  {clocks}",
        f"FLOPs       {flops:.3e} per trained token, {writes / flops:.1%} of them memory writes",
        f"tokens      {tokens:.3g} = {tokens / config.train.tokens_per_step:,.0f} steps of "
        f"{config.train.tokens_per_step:,}",
    ]
    if peak is None:
        lines.append(f"speed       no peak is known for {site.gpu!r}: no times")
    else:
        where = f"{world} x {site.gpu}, {peak / 1e12:.0f} TFLOP/s dense bf16 each"
        speed = measured(config, known)
        given = f"{mfu:.1%} of it, as --mfu says" if mfu is not None else f"as measured: {speed}"
        mfu = speed.mfu if mfu is None else mfu
        lines += [f"speed       {where}", f"            {given}", f"collectives {_bandwidths(site, world)}"]
    lines += ["", f"GiB on the fullest rank; a device has {site.gpu_memory_gb:g}, of which {USABLE:.0%} count"]
    lines.append(TITLES)
    for row in layouts(config, world, site, mfu, say):
        copies = 1 if config.optim.accumulate == "local" else row.data  # local sums are whole on every data rank
        steps = tokens / config.train.tokens_per_step
        accumulators = 4 * slow / (row.layout.tensor * row.layout.pipeline * copies)
        lines.append(_line(row, accumulators, steps, chosen=row.layout == config.parallel))
    lines.append("(CMS acc.) is part of optim, (states) of activ.; coll. is the collectives' share of the step; "
                 "* is the layout of the configuration")  # fmt: skip
    return "\n".join(lines)


def _bandwidths(site: Profile, world: int) -> str:
    """What the times of collectives rest on."""
    inside = f"{site.bus_gb_s:g} GB/s inside a node (site.bus_gb_s)"
    if world <= site.ranks_per_node:
        return inside
    known = f"{site.network_gb_s:g} GB/s between two" if site.network_gb_s else "those between nodes not counted"
    return f"{inside}, {known} (site.network_gb_s {site.network_gb_s:g})"


def _line(row: Row, accumulators: float, steps: float, *, chosen: bool) -> str:
    m = row.memory

    def gib(size: float, width: int) -> str:
        return f"{size / GIB:>{width}.2f}"

    share = "n/a" if row.step_s is None else f"{row.collectives / row.step_s:.0%}"
    step = "n/a" if row.step_s is None else f"{row.step_s:.2f}s"
    total = "n/a" if row.step_s is None else duration(row.step_s * steps)
    sizes = (gib(m.weights, 9) + gib(m.gradients, 7) + gib(m.optimizer, 7) + gib(accumulators, 11)
             + gib(m.activations, 8) + gib(m.fast_weights, 9) + gib(m.loss, 6) + gib(m.peak, 8))  # fmt: skip
    remark = "" if row.fits else "  does not fit"
    remark += "  tensor ranks on different nodes" if row.across else ""
    layout = f"{row.layout.tensor:>6}{row.layout.pipeline:>9}{row.data:>6}"
    times = f"  {row.bubble:>6.0%}{share:>6}{step:>9}{total:>9}"
    return f"{layout}{sizes}{times}{' *' if chosen else ''}{remark}"
