"""What a run will find when it starts: its schedule, its data, its folder, and the checkpoint that it resumes from.

A dry run prints it and refuses what the run would refuse, before any queue and any process group. Nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from configs.changes import settle
from configs.errors import ConfigError
from configs.schema import Config
from data_prep.texts import OpenTask, open_tasks
from data_prep.training.feed import Foreseen
from hope.dense import COMPILED, cannot_compile, form_for
from hope.devices import require_graphs
from hope.initial import open_start
from hope.sections import Problem
from hope.train.schedule import in_steps
from launch.folder import RunFolder
from parallel.layout import report
from parallel.layout.memory import StepShape


def facts(config: Config, world_size: int) -> str:
    """The table that a start begins with: model, layout, and bytes per rank of `world_size`."""
    dims = config.parallel.dims(world_size)
    shape = StepShape.of(config.train, config.parallel, dims)
    batch, compile, stream = config.train.global_batch, config.train.compile, config.data.documents == "stream"
    return report.describe(config.model, dims, shape, batch, config.optim, _device(), compile, stream)


def outlook(config: Config, root: Path, world_size: int, *, data: bool = True, here: bool = False) -> list[str]:
    """Lines for people: tokens and epochs, optimizer and its groups, schedule, evaluation, folder, and what is resumed.

    Args:
        config: checked for `world_size` devices.
        root: folder of the run.
        data: whether the data can be read here; without it, nothing is said of epochs and held-out windows.
        here: whether the run would be on this machine, which then needs the compiler of `train.compile`.

    Raises:
        CannotCompile: this machine has none.
        CannotCapture: nor a GPU for `train.cuda_graphs`.
        ConfigError: the folder cannot be written, or the run could not go on from what is in it.
        DataError: a set is damaged, or a task cannot be read.
    """
    run = RunFolder(root)
    train = config.train
    if here:
        form_for(train.compile, _device())
        require_graphs(train.cuda_graphs, _device())
    foreseen = Foreseen(config.data, train, train.total_steps * train.global_batch) if data else None
    order = foreseen.order() if foreseen else None
    if data:
        tasks_of(config)
    if found := [*unwritable(run.root), *not_resumable(config, run, world_size, order)]:
        raise ConfigError(str(root), found)
    rows = [
        ("optimizer", _optimizer(config)),
        ("schedule", _schedule(config)),
        ("training", _training(config, foreseen)),
        ("evaluation", _evaluation(config, foreseen)),
        ("run", f"{root}: {_start(config, run)}"),
    ]
    if foreseen and foreseen.phases:
        rows.insert(3, ("phases", foreseen.phases))
    if train.compile != "none":
        rows.insert(3, ("compiled", _compiled(train.compile)))
    lines = [f"{name:<11} {fact}" for name, fact in rows]
    changes = [f"{'':<11} {change}" for change in _changes(config, run, world_size)]
    return [*lines, *changes, report.group_table(config.model, config.optim, train.tokens_per_step)]


def _device() -> str:
    """The type that a run on this machine would take."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def tasks_of(config: Config) -> dict[str, OpenTask]:
    """The tasks that the run scores at its evaluations. Raises DataError."""
    train = config.train
    data = asdict(config.data)
    return open_tasks(train.tasks, data, config.model.vocab_size, train.seq_len, train.task_items)


def unwritable(root: Path) -> Iterator[Problem]:
    """Could the run make its folder, and write there?"""
    there = root
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        yield Problem("run.dir", f"{there} is not a folder that you can write to", "another folder")


def not_resumable(
    config: Config, run: RunFolder, world_size: int, order: Mapping[str, Any] | None = None
) -> Iterator[Problem]:
    """Could the run go on from its newest checkpoint?

    `order`: what decides the order of its data, as `Feed.order` gives it; None if the data cannot be read here.
    """
    folder, step = run.root / "checkpoints", run.saved_step()
    where = f"step {step} in {folder}"
    if config.checkpoint.resume == "never":
        if any(folder.glob("step_*")):
            what = f"is never, but {folder} holds checkpoints, which this run would mix with its own"
            fix = "auto; another run.name, with model.init for these weights; or remove the folder"
            yield Problem("checkpoint.resume", what, fix)
        else:
            yield from open_start(config.model, asdict(config.data), verify=False)[1]
        return
    if step < 0 and (doubtful := sorted(folder.glob("step_*.doubtful"))):
        what = f"{folder} holds only doubtful checkpoints, the newest {doubtful[-1].name}"
        yield Problem("run.name", what, "another one, or move them away (docs/checkpoints.md)")
    elif step < 0:
        yield from open_start(config.model, asdict(config.data), verify=False)[1]
    if early := config.train.ends_before(step):
        fix = (
            f"{max(step, 1)} or more; another run.name, with model.init for these weights; or an older checkpoint "
            "(docs/checkpoints.md)"
        )
        yield from (Problem(path, f"{last} is before {where}", fix) for path, last in early.items())
    known = set[str]()
    if (saved := run.saved_config()) is not None:
        try:
            settle(config, saved, world_size)
        except ConfigError as error:
            known = {path for path, _, _ in error.problems}
            yield from (Problem(path, f"{what} ({where})", fix) for path, what, fix in error.problems)
    saved_order = run.saved_order() if order else {}
    for path, now in (order or {}).items():
        if saved_order and path not in known and saved_order.get(path) != now:
            what = f"checkpoint {saved_order.get(path)}, now {now}: the order of the data would change ({where})"
            yield Problem(path, what, "put it back, or another run.name, with model.init for these weights")


def _start(config: Config, run: RunFolder) -> str:
    step = run.saved_step()
    if step < 0 and config.model.init:
        return f"new, with the weights of {config.model.init}"
    return "new" if step < 0 else f"resumes from step {step} of {config.train.total_steps}"


def _compiled(what: str) -> str:
    """What is compiled; a machine that only starts runs may well have no compiler, so that is said and not refused."""
    lacking = cannot_compile(_device())
    return COMPILED[what] + (f"; a run on this machine {lacking}, and would be refused" if lacking else "")


def _changes(config: Config, run: RunFolder, world_size: int) -> list[str]:
    saved = run.saved_config()
    return [] if saved is None else settle(config, saved, world_size)[1]


def _optimizer(config: Config) -> str:
    optim, clip = config.optim, config.train.grad_clip
    memory = {"dmgd": optim.dmgd.memory, "muon": optim.muon.memory}.get(optim.name)
    shown = memory if optim.name == "dmgd" or memory != "linear" else None
    kind = optim.name + (f" with memory {shown}" if shown else "")
    return f"{kind}  lr {optim.lr:g}  weight decay {optim.weight_decay:g}  gradient norm at most {clip or 'any'}"


def _schedule(config: Config) -> str:
    optim, steps = config.optim, config.train.total_steps
    start = f"{in_steps(optim.warmup, steps)} steps of warm-up to {optim.lr:g}, then "
    end = f"to {optim.final_lr * optim.lr:g} at step {steps}"
    if optim.decay == "constant":
        return f"{start}constant"
    if optim.decay == "wsd":
        stable = steps - in_steps(optim.decay_length, steps)
        return f"{start}stable until step {stable}, then {optim.decay_shape} {end}"
    return f"{start}{optim.decay} {end}"


def _training(config: Config, foreseen: Foreseen | None) -> str:
    train = config.train
    steps, size = train.total_steps, train.tokens_per_step
    total = f"{steps:,} steps of {size:,} = {steps * size:,} tokens"
    epochs = f", {foreseen.epochs()}" if foreseen else ""
    stop = f"; stops after step {train.stop_after}" if train.stop_after else ""
    return f"{total}{epochs}{stop}"


def _evaluation(config: Config, foreseen: Foreseen | None) -> str:
    every = config.train.eval_every
    when = f"every {every} steps, " if every else ""
    when += "at every border of two phases, " if config.train.mode == "continual" else ""
    what = foreseen.heldout if foreseen else "held-out windows"
    return f"{what}: before the first step, {when}at the end"
