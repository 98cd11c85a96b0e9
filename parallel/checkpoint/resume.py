"""Resuming from a checkpoint: proof that it is the same run that continues.

Positions in the data are steps: sample `step * global_batch` comes next. What decides which tokens that is (`order`)
is stored with every checkpoint, and so is a hash of the next batch's token ids; both must agree on resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hope.config import ModelConfig
from hope.initial import Start, open_start
from hope.sections import Problem
from hope.train.config import CheckpointConfig, TrainConfig
from parallel.checkpoint.checkpointer import Checkpointer
from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.find import Found
from parallel.start.groups import Ranks


def check_data(found: Found, order: Mapping[str, Any], next_batch: Callable[[int], str]) -> None:
    """Refuse a checkpoint after which other tokens would come than in the run that saved it.

    `order`: what decides the order of the data in this run. `next_batch(step)`: hash of the batch that follows `step`.

    Raises:
        CheckpointError: the order or the next batch differs.
    """
    saved = found.manifest.extra["order"]
    differing = [
        f"\n  {key}: checkpoint {saved.get(key)}, now {now}" for key, now in order.items() if saved.get(key) != now
    ]
    if differing:
        raise CheckpointError(
            f"{found.path}: the order of the data would change{''.join(differing)}\n"
            "  put these back, or start another run.name, with model.init for these weights"
        )
    if next_batch(found.manifest.step) != found.manifest.extra["next_batch"]:
        raise CheckpointError(f"{found.path}: the next batch is not the one that was recorded when it was saved")


def check_end(found: Found, train: TrainConfig) -> None:
    """Refuse to resume from a step after the run's end: it would do nothing, and say that it is done.

    Raises:
        CheckpointError: train.steps or train.stop_after is before the checkpoint's step.
    """
    step = found.manifest.step
    early = [f"{path} {last}" for path, last in train.ends_before(step).items()]
    if early:
        raise CheckpointError(
            f"{' and '.join(early)}: before step {step}, from which the run would go on ({found.path}); use {step} or "
            "more; another run.name, with model.init for these weights; or go on from an older checkpoint "
            "(docs/checkpoints.md)"
        )


def start_from(folder: Path, config: CheckpointConfig, ranks: Ranks) -> tuple[Checkpointer, Found | None, list[str]]:
    """What saves to and loads from `folder`; the checkpoint to resume from, or None; notes on what was skipped.

    Raises:
        CheckpointError: none in it is sound, or checkpoint.resume is never and there are some to mix with.
    """
    checkpointer = Checkpointer(folder, ranks, config.keep, config.keep_every)
    if config.resume != "never":
        return checkpointer, *checkpointer.find()
    if any(folder.glob("step_*")):
        raise CheckpointError(
            f"checkpoint.resume is never, but {folder} holds checkpoints, which this run would mix with its own; "
            "use checkpoint.resume=auto; another run.name, with model.init for these weights; or remove the folder"
        )
    return checkpointer, None, []


def new_start(
    config: ModelConfig, data: Mapping[str, Any], checkpointer: Checkpointer, ranks: Ranks
) -> tuple[Start | None, list[Problem]]:
    """`hope.initial.open_start` on every rank; the problems of the lowest rank that has any, on all. Collective.

    Rank 0 checks the hashes. Each rank maps the whole tensors, and reads what its slices need.
    """
    start, own = open_start(config, data, verify=ranks.rank == 0)
    return start, checkpointer.first_problems(own)
