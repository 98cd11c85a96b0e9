"""What is wrong with the values of a configuration whose keys and types are sound: each section, and all together."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from configs.merge import GUESS
from data_prep.config import DataConfig
from data_prep.training.blend_order import BlendOrder
from hope.config import ModelConfig
from hope.dense import SHAPES
from hope.optim.config import OptimConfig
from hope.optim.policy import group_problems
from hope.sections import MixerSection, Problem
from hope.train.config import TrainConfig
from hope.train.schedule import in_steps
from parallel.layout.topology import ParallelConfig


def section_problems(sections: Mapping[str, Any], world_size: int | None, paths: Sequence[str]) -> Iterator[Problem]:
    """Problems of the sections given; one that needs another is skipped when that one is not there.

    Args:
        sections: by name, such as `model`.
        world_size: devices of the run; None: the `parallel` section is not checked.
        paths: of all keys that there are.
    """
    for name in ("run", "model", "optim", "train", "checkpoint", "log", "launch"):
        if name in sections:
            yield from sections[name].problems()
    model, data, optim, train = (sections.get(name) for name in ("model", "data", "optim", "train"))
    if model and data and train and min(model.vocab_size, train.seq_len) >= 1:
        yield from data.problems(model.vocab_size, train.seq_len)
    if data and train and train.mode == "continual" and train.total_steps >= 1:
        yield from _phases(data, train)
    if optim and train and train.total_steps >= 1:
        yield from _schedule(optim, train.total_steps)
    if model and train and min(train.global_batch, train.seq_len) >= 1:
        yield from _token_periods(model, train.tokens_per_step)
    if model and optim and optim.groups and not list(model.problems()):
        yield from group_problems(model, optim)
    if train and train.tasks and sections.get("parallel"):
        yield from _tasks_and_layout(sections["parallel"])
    if model and train and sections.get("parallel") and train.compile == "block":
        yield from _whole_blocks(model, train, sections["parallel"])
    if train and train.cuda_graphs and data:
        yield from _recorded_passes(data.documents)
    if model and train and data and data.documents == "stream":
        yield from _stream(model, train)
    if "checkpoint" in sections:
        yield from _unknown_changes(sections["checkpoint"].on_change, paths)
    parallel = sections.get("parallel")
    if world_size is not None and parallel and train and min(train.global_batch, train.micro_batch) >= 1:
        whole = model if model and min(model.heads, model.vocab_size, model.layers, model.width) >= 1 else None
        yield from parallel.problems(world_size, train.global_batch, train.micro_batch, whole, train.seq_len)


def _schedule(optim: OptimConfig, steps: int) -> Iterator[Problem]:
    """A warm-up, and a decay of its own, that do not fit into the run."""
    warmup = in_steps(optim.warmup, steps)
    if warmup >= steps:
        what = f"{warmup} steps of warm-up leave none of train.steps {steps} for the decay"
        yield Problem("optim.warmup", what, f"at most {steps - 1}; usual: {steps // 20}")
    elif optim.decay == "wsd" and warmup + (length := in_steps(optim.decay_length, steps)) > steps:
        what = f"{length} steps of decay do not fit behind {warmup} of warm-up in {steps} steps"
        yield Problem("optim.decay_length", what, f"at most {steps - warmup}; usual: 0.2 of the run")


def _phases(data: DataConfig, train: TrainConfig) -> Iterator[Problem]:
    """Sources one after another need two of them, and borders between whole steps."""
    if train.spike_sigma > 0:
        what = f"{train.spike_sigma:g} would skip the first steps of every new source, whose loss is another"
        yield Problem("train.spike_sigma", what, "0; or train.mode=blend")
    if len(data.sources) < 2:
        what = f"is continual, which reads one source after another, and data.sources has {len(data.sources)}"
        yield Problem("train.mode", what, "blend; or two or more data.sources")
        return
    weights = [source.weight for source in data.sources]
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        return  # the section of the data says so
    steps, unit = train.total_steps, BlendOrder(weights).period
    if steps % unit:
        near = sorted({max(1, steps // unit) * unit, -(-steps // unit) * unit})
        what = f"{steps} steps cannot be shared {' : '.join(f'{weight:g}' for weight in weights)} in whole steps"
        path, size = ("train.steps", 1) if train.tokens is None else ("train.tokens", train.tokens_per_step)
        fix = " or ".join(str(number * size) for number in near)
        yield Problem(path, what, f"{fix}; or weights that are numbers of steps and add up to {steps}")


def _whole_blocks(model: ModelConfig, train: TrainConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """Blocks that cannot be one graph, or take more graphs than torch keeps of a function."""
    if parallel.tensor > 1:
        what = f"block makes one graph of a block, and parallel.tensor {parallel.tensor} puts collectives into it"
        yield Problem("train.compile", what, "dense; or parallel.tensor=1")
    kinds, lengths = set(model.mixer_of_layer), {train.seq_len, *(stage.seq_len for stage in train.seq_len_stages)}
    if len(kinds) * len(lengths) > SHAPES:
        what = f"block makes a graph for each of {len(kinds)} mixers and {len(lengths)} lengths, at most {SHAPES}"
        yield Problem("train.compile", what, "dense; or fewer lengths in train.seq_len_stages")


def _recorded_passes(documents: str) -> Iterator[Problem]:
    """What differs from pass to pass, and cannot be in a graph."""
    if documents == "reset":
        what = "true, and with data.documents=reset shapes depend on where documents begin"
        yield Problem("train.cuda_graphs", what, "false; or data.documents=carry")


def _stream(model: ModelConfig, train: TrainConfig) -> Iterator[Problem]:
    """What cannot go on from the state of the step before."""
    begin = "makes passes that begin every sequence anew, and data.documents is stream"
    if train.compile == "block":
        yield Problem("train.compile", f"block {begin}", "dense; or data.documents=carry")
    if train.cuda_graphs:
        yield Problem("train.cuda_graphs", f"true {begin}", "false; or data.documents=carry")
    if train.seq_len_stages:
        what = "cut windows into rows that begin anew, and data.documents is stream"
        yield Problem("train.seq_len_stages", what, "[]; or data.documents=carry")
    for name in dict.fromkeys(model.mixer_of_layer if model.layers >= 1 and model.pattern else []):
        found = model.mixers[name].endless() if isinstance(model.mixers.get(name), MixerSection) else None
        if found:
            key, works = found
            what = f"{getattr(model.mixers[name], key)}: its state grows with every token of data.documents=stream"
            yield Problem(f"model.mixers.{name}.{key}", what, f"{works}; or data.documents=carry")


def _tasks_and_layout(parallel: ParallelConfig) -> Iterator[Problem]:
    """Tasks in training are scored by ranks that each have the whole model."""
    cut = [key for key in ("tensor", "pipeline") if getattr(parallel, key) > 1]
    if cut:
        what = f"needs the whole model on every device, and parallel.{cut[0]} is {getattr(parallel, cut[0])}"
        yield Problem("train.tasks", what, "{}, and `python -m hope.evaluate` on the run's checkpoints")


def _token_periods(model: ModelConfig, step: int) -> Iterator[Problem]:
    """Levels that are due after a number of tokens which no whole number of optimizer steps sees."""
    if model.cms.unit == "steps":
        return
    for number, period in enumerate(model.cms.periods):
        if period >= 1 and period % step:
            near = sorted({max(1, period // step) * step, -(-period // step) * step})
            what = f"{period:,} tokens are not a multiple of the {step:,} of a step (train.global_batch x seq_len)"
            yield Problem(f"model.cms.periods[{number}]", what, " or ".join(map(str, near)))


def _unknown_changes(on_change: Mapping[str, str], paths: Sequence[str]) -> Iterator[Problem]:
    """Keys of checkpoint.on_change must be those of the configuration, its sections, or `all`."""
    known = {"all", *paths, *(path.rsplit(".", n)[0] for path in paths for n in range(1, path.count(".") + 1))}
    for key in on_change:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            yield Problem(
                "checkpoint.on_change", f"{key} is no key or section", f"{GUESS}{near[0]}" if near else "optim.lr"
            )
