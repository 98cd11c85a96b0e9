"""Saving a run and going on from it: weights, optimizer, data position, and proof that the next batch is the same.

Positions in the data are steps: sample `step * global_batch` comes next. What decides which tokens that is (`order`)
is stored with every checkpoint, and so is a hash of the next batch's token ids; both must agree on resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parallel import checkpoint
from parallel.errors import CheckpointError
from parallel.groups import Ranks
from parallel.zero import ShardedOptimizer


def save_run(
    folder: Path,
    step: int,
    ranks: Ranks,
    model: nn.Module | Sequence[nn.Module],
    optimizer: ShardedOptimizer,
    extra: Mapping[str, Any],
    keep: int,
) -> int:
    """Write the checkpoint of `step` and return its bytes (0 on other ranks than 0); all ranks call it.

    `model`: the model, or this rank's parts of it, one per virtual stage. `extra` is plain JSON and must hold
    `order` and `next_batch`, which `resume_run` compares.
    Raises CheckpointError on every rank if any could not write.
    """
    weights = model_state(model) if ranks.dp_rank == 0 else None
    path = checkpoint.save(folder, step, ranks, weights, optimizer.state_dict(), extra, keep)
    return sum(file.stat().st_size for file in path.iterdir()) if ranks.rank == 0 else 0


def resume_run(
    folder: Path,
    ranks: Ranks,
    model: nn.Module | Sequence[nn.Module],
    optimizer: ShardedOptimizer,
    order: Mapping[str, Any],
    next_batch: Callable[[int], str],
) -> checkpoint.Loaded | None:
    """Load the newest complete checkpoint in `folder` into model and optimizer; None if there is none.

    `order`: what decides the order of the data in this run. `next_batch(step)`: hash of the batch that follows `step`.

    Raises:
        CheckpointError: it belongs to another model, layout, or order of data.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model_state(model).items()}
    loaded = checkpoint.load(folder, ranks, shapes)
    if loaded is None:
        return None
    saved = loaded.extra["order"]
    differing = [
        f"\n  {key}: checkpoint {saved.get(key)}, now {now}" for key, now in order.items() if saved.get(key) != now
    ]
    if differing:
        raise CheckpointError(
            f"{loaded.path}: the order of the data would change{''.join(differing)}\n"
            "  put these back, or start another run.name"
        )
    if next_batch(loaded.step) != loaded.extra["next_batch"]:
        raise CheckpointError(f"{loaded.path}: the next batch is not the one that was recorded when it was saved")
    optimizer.load_state_dict(loaded.shard)
    return loaded


def model_state(model: nn.Module | Sequence[nn.Module]) -> dict[str, torch.Tensor]:
    """State dict of a model, or of all chunks of it on this rank under one set of names."""
    chunks = [model] if isinstance(model, nn.Module) else model
    return {name: tensor for chunk in chunks for name, tensor in chunk.state_dict().items()}


def refuse_to_mix(folder: Path) -> None:
    """Raise CheckpointError if `folder` holds checkpoints that a run starting from step 0 would mix with its own."""
    if any(folder.glob("step_*")):
        raise CheckpointError(
            f"checkpoint.resume is never, but {folder} holds checkpoints, which this run would mix with its own; "
            "use checkpoint.resume=auto, another run.name, or remove the folder"
        )
