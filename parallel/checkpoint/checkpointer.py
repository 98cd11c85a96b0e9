"""Save and load the state of a run: stage, regroup, write, publish; read, cut, hand out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from hope.optim.levels import level_of_group
from hope.sections import Problem
from hope.stored import folders, manifest
from hope.stored.manifest import FileEntry, Manifest, TensorEntry
from parallel.checkpoint import rng
from parallel.checkpoint.carried import SAVED, Stream
from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.find import Found, find_newest
from parallel.checkpoint.format.planner import Part, PartsLoadPlanner, PartsSavePlanner
from parallel.checkpoint.format.storage import RawReader, RawWriter
from parallel.checkpoint.regroup import Shard, Unit, collect, distribute, shards_of, units_of
from parallel.checkpoint.staging import HostMemory, nonfinite
from parallel.checkpoint.together import first_said, host_groups, reason, together
from parallel.optimizer.checkpoint_views import ShardedState, StatePiece
from parallel.start.groups import Ranks


@dataclass(frozen=True)
class Staged:
    """A rank's part of a checkpoint, in host memory."""

    step: int
    pieces: list[StatePiece]
    counters: Mapping[str, Mapping[str, int]]
    rng: dict[str, Tensor]
    shards: dict[str, Shard]
    extra: Mapping[str, Any]
    carried: list[Part] | None = None


@dataclass(frozen=True)
class SavedCheckpoint:
    """A durable checkpoint: its folder, how long writing took, and on rank 0 the bytes of its files and notes.

    doubt: why it does not count as a checkpoint; empty if it does.
    """

    path: Path
    seconds: float
    bytes: int
    notes: list[str]
    doubt: str = ""


class Checkpointer:
    """Saves to and loads from `folder`. All ranks make one and call the same methods in the same order.

    Saving is `stage`, the part that must not overlap with a training step, then `write`, which may run in a thread: it
    uses process groups of its own and touches no device.

    Args:
        keep, keep_every: the newest `keep` checkpoints stay, and those whose step is a multiple of `keep_every`.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int = 2, keep_every: int = 0) -> None:
        self._folder, self._ranks, self._keep, self._keep_every = folder, ranks, keep, keep_every
        self._groups = host_groups(ranks)
        self._memory = HostMemory(ranks.device)

    def find(self) -> tuple[Found | None, list[str]]:
        """The newest sound checkpoint, and notes; see `find_newest`."""
        return find_newest(self._folder, self._ranks, self._groups)

    def first_problems(self, own: list[Problem]) -> list[Problem]:
        """Of the lowest rank that has any, on every rank. Collective."""
        return first_said(own, self._groups.world)

    def reserve(self, optimizer: ShardedState) -> None:
        """Allocate the host memory of `stage` ahead of the first save. All ranks call it, between two steps."""
        self._memory.reserve(optimizer.pieces())

    def stage(
        self,
        step: int,
        models: nn.Module | Sequence[nn.Module],
        optimizer: ShardedState,
        extra: Mapping[str, Any],
        stream: Stream | None = None,
    ) -> Staged:
        """Copy this rank's states to host memory; valid until the next call, so write them before.

        `models`: the model, or this rank's parts of it. `extra`: plain JSON, recorded as rank 0 gives it; a "doubt" in
        it says why this is not to be gone on from.
        """
        pieces = self._memory.copy(optimizer.pieces())
        ranks = self._ranks
        carried = None if stream is None else stream.parts(ranks)
        return Staged(step, pieces, optimizer.counters(), rng.states(ranks), shards_of(models, ranks), extra, carried)

    def write(self, staged: Staged) -> SavedCheckpoint:
        """Write the checkpoint; durable, and named in `latest` unless there is a doubt, when this returns.

        Weights that are not finite are a doubt too. A doubtful one is no reason to remove others.

        Raises:
            CheckpointError: on every rank, if any rank could not write; nothing of it stays, older ones do.
        """
        path = folders.step_folder(self._folder, staged.step)
        try:
            return self._write(path, staged)
        except (CheckpointException, Exception) as error:  # the first is a BaseException
            if self._ranks.rank == 0:
                with contextlib.suppress(OSError):
                    folders.discard(path)
            if isinstance(error, CheckpointError):
                raise
            why = _first_failure(error) if isinstance(error, CheckpointException) else reason(error)
            raise CheckpointError(f"{path}: {why}") from error

    def _write(self, path: Path, staged: Staged) -> SavedCheckpoint:
        began = time.perf_counter()
        ranks, groups = self._ranks, self._groups
        doubt = first_said(staged.extra.get("doubt") or nonfinite(staged.pieces), groups.world)
        finish = _Finish(path, staged, ranks, doubt)
        together(lambda: folders.prepare(path) if ranks.rank == 0 else None, path, groups.world)
        parts = together(lambda: self._parts(staged), path, groups.world)
        parts += [*rng.parts(staged.rng), *(staged.carried or [])]
        writer = RawWriter(folders.unfinished(path), ranks.rank, finish)
        planner = PartsSavePlanner(parts, staged.counters)
        dcp.save({}, storage_writer=writer, planner=planner, process_group=groups.world)
        seconds = time.perf_counter() - began
        notes = folders.prune(self._folder, self._keep, self._keep_every) if ranks.rank == 0 else []
        return SavedCheckpoint(finish.place, seconds, finish.bytes, notes, doubt)

    def load(
        self,
        found: Found,
        models: nn.Module | Sequence[nn.Module],
        optimizer: ShardedState,
        stream: Stream | None = None,
    ) -> list[str]:
        """Read the checkpoint into model and optimizer, whatever layout it was saved in; notes, one line each.

        Raises:
            CheckpointError: it belongs to another model or another optimizer, or cannot be read.
        """
        content, ranks, groups = found.manifest, self._ranks, self._groups
        pieces = list(optimizer.pieces())
        planned = lambda: units_of(pieces, shards_of(models, ranks), ranks, groups.data)
        units = together(planned, found.path, groups.world)
        together(lambda: _check(found.path, content, units, set(optimizer.counters())), found.path, groups.world)
        owned = {unit.name: torch.empty(_size(unit), dtype=unit.dtype) for unit in units if unit.owner == ranks.dp_rank}
        generators = rng.places(content.tensors, ranks) if content.layout == _layout(ranks) else {}
        parts = [unit.part(owned[unit.name]) for unit in units if unit.name in owned] + rng.parts(generators)
        if stream is not None:
            carried = together(lambda: stream.empty(content, ranks), found.path, groups.world)
            parts += carried
        try:
            reader, planner = RawReader(found.path, content), PartsLoadPlanner(parts)
            dcp.load({}, storage_reader=reader, planner=planner, process_group=groups.world)
        except CheckpointException as error:
            raise CheckpointError(f"{found.path}: {_first_failure(error)}") from None
        with torch.no_grad():
            distribute(owned, units, pieces, ranks, groups.data)
        optimizer.restored(content.counters)
        if stream is not None:
            stream.restore(content.step, carried, ranks)
        together(lambda: rng.restore(generators), found.path, groups.world)
        if generators:
            return []
        return [
            f"saved as {_said(content.layout)}, going on as {_said(_layout(ranks))}; random generators start anew (no "
            "step of training draws from them)"
        ]

    def _parts(self, staged: Staged) -> list[Part]:
        """What this rank writes: whole shards, put together with its data-parallel peers."""
        ranks, group = self._ranks, self._groups.data
        units = units_of(staged.pieces, staged.shards, ranks, group)
        return [unit.part(tensor) for unit, tensor in collect(units, staged.pieces, ranks, group)]


class _Finish:
    """What the coordinator does when all files are on disk: the manifest, the rename, and `latest`."""

    def __init__(self, path: Path, staged: Staged, ranks: Ranks, doubt: str) -> None:
        self._path, self._staged, self._ranks, self._doubt = path, staged, ranks, doubt
        self.place, self.bytes = path, 0

    def __call__(
        self,
        tensors: dict[str, TensorEntry],
        files: dict[str, FileEntry],
        counters: dict[str, dict[str, int]],
    ) -> None:
        content = Manifest(
            self._staged.step,
            _layout(self._ranks),
            counters,
            {**self._staged.extra, **({"doubt": self._doubt} if self._doubt else {})},
            tensors,
            dict(sorted(files.items())),
            **({} if self._staged.carried is None else {"carried_memory_state": SAVED}),
        )
        unfinished = folders.unfinished(self._path)
        # A node that writes to a disk of its own would be noticed only on resume.
        manifest.check_sizes(unfinished, content)
        content.write(unfinished)
        self.place = (folders.publish_doubtful if self._doubt else folders.publish)(self._path)
        self.bytes = content.bytes


def _size(unit: Unit) -> int:
    return int(torch.Size(unit.box).numel())


def _layout(ranks: Ranks) -> dict[str, int]:
    dims = ranks.dims
    return {
        "tensor": dims.tensor,
        "pipeline": dims.pipeline,
        "virtual_pipeline": dims.virtual_pipeline,
        "data": dims.data,
    }


def _said(layout: Mapping[str, int]) -> str:
    return " x ".join(f"{key} {degree}" for key, degree in layout.items())


def _first_failure(error: CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {reason(cause)}"


def _check(path: Path, content: Manifest, units: Sequence[Unit], groups: set[str]) -> None:
    """Refuse another model's checkpoint, and one whose states the optimizer does not have, or lacks."""
    names = {unit.name.partition("/")[2] for unit in units}
    of_model = [line for unit in units if unit.name.startswith("master/") for line in _differences(unit, content)]
    known = {name.partition("/")[2] for name in content.tensors if name.startswith("master/")}
    if of_model:
        raise CheckpointError(
            f"{path} belongs to another model, {len(of_model)} tensors differ:{_listed(of_model)}\n"
            "  use the model section that it was trained with, or another run folder"
        )
    lines = [line for unit in units for line in _differences(unit, content)]
    wanted = {unit.name for unit in units}
    for name in content.tensors:
        if name.partition("/")[2] in names & known and name not in wanted:
            lines.append(f"{name}: checkpoint has it, optimizer has none")
    clocks = {level_of_group(name) for name in content.counters}
    lines += [
        f"group {name}: optimizer has it, checkpoint has no clock of its level"
        for name in groups
        if level_of_group(name) not in clocks
    ]
    if lines:
        raise CheckpointError(
            f"{path} belongs to another optimizer, {len(lines)} states differ:{_listed(lines)}\n"
            "  use the optim section that it was trained with, or another run folder"
        )


def _differences(unit: Unit, content: Manifest) -> Iterator[str]:
    saved = content.tensors.get(unit.name)
    name = unit.name.removeprefix("master/")
    if saved is None:
        yield f"{name}: checkpoint has none, model {unit.shape}"
    elif saved.shape != unit.shape:
        yield f"{name}: checkpoint {saved.shape}, model {unit.shape}"
    elif saved.dtype != str(unit.dtype).removeprefix("torch."):
        yield f"{name}: checkpoint {saved.dtype}, model {str(unit.dtype).removeprefix('torch.')}"


def _listed(lines: list[str]) -> str:
    return "".join(f"\n  {line}" for line in lines[:5])
