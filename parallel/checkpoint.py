"""Save and resume: every rank writes its shard, the folder becomes visible whole or not at all.

    checkpoints/latest                       name of the newest folder, for people and tools
    checkpoints/step_00001200/meta.json      step, layout, parameters, whatever the caller adds; and all file sizes
                             /model.pt       the model's state dict, single-device names
                             /optimizer_00000.pt ...   one per data-parallel rank

With tensor or pipeline parallelism each (tensor, pipeline) rank writes its part of both, `model_tp01_pp00.pt` and
`optimizer_tp01_pp00_00000.pt`. A folder is written as `step_00001200.tmp` and renamed after all its files are on disk.
This version resumes only in the layout that saved.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.errors import CheckpointError
from parallel.groups import Ranks, any_rank

_META = "meta.json"


@dataclass
class Loaded:
    """A checkpoint in memory; `model` and `shard` are on the CPU. `notes`: what was skipped, one line each."""

    step: int
    path: Path
    model: dict[str, torch.Tensor]
    shard: dict[str, Any]
    extra: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in `folder`."""
    return folder / f"step_{step:08d}"


def save(
    folder: Path,
    step: int,
    ranks: Ranks,
    model_state: Mapping[str, torch.Tensor] | None,
    shard: Mapping[str, Any],
    extra: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step`; all ranks call it. Returns its folder, durable when this returns.

    `model_state`, this rank's part of the model, is needed on data-parallel rank 0 only; `shard` is this rank's
    optimizer state; `extra` is plain JSON (consumed samples, batch fingerprint, model config). The `keep` newest
    checkpoints stay.

    Raises:
        CheckpointError: on every rank, if any rank could not write; nothing of it stays, older ones do.
    """
    final = step_folder(folder, step)
    unfinished = final.with_name(final.name + ".tmp")
    try:
        _together(lambda: _prepare(unfinished) if ranks.rank == 0 else None, unfinished)
        _together(lambda: _write_files(unfinished, ranks, model_state, shard), unfinished)
        parameters = _parameters(ranks, model_state)
        _together(lambda: _publish(final, unfinished, step, ranks, parameters, extra, keep), unfinished)
    except CheckpointError:
        if ranks.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return final


def load(folder: Path, ranks: Ranks, shapes: Mapping[str, tuple[int, ...]]) -> Loaded | None:
    """Read the newest complete checkpoint in `folder`, or return None if there is none. All ranks call it.

    `shapes`: name -> shape of the tensors of this rank's model state dict, to refuse another model's checkpoint.

    Raises:
        CheckpointError: it belongs to another model or layout, or a file in it cannot be read.
    """
    choice: list[Any] = [None]
    if ranks.rank == 0:
        choice = [_newest(folder)]
    dist.broadcast_object_list(choice, src=0)
    name, meta, notes = choice[0]
    if name is None:
        return None
    path = folder / name
    _check_layout(path, meta, ranks)
    _together(lambda: _check_model(path, meta["parameters"][_model_file(ranks)], shapes), path)
    loaded = _together(lambda: _read_files(path, ranks), path)
    return Loaded(meta["step"], path, loaded[0], loaded[1], meta["extra"], notes)


def _together(work: Callable[[], Any], path: Path) -> Any:
    """Run `work` on every rank; if it fails on one, fail on all (peers would wait in the next collective)."""
    failure: Exception | None = None
    result = None
    try:
        result = work()
    except Exception as error:
        failure = error
    if any_rank(failure is not None):
        if isinstance(failure, CheckpointError):
            raise failure
        reason = f"{type(failure).__name__}: {failure}" if failure else "failed on another rank, see its log"
        raise CheckpointError(f"{path}: {reason}") from failure
    return result


def _prepare(unfinished: Path) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a run that was killed while saving
    unfinished.mkdir(parents=True)


def _part(ranks: Ranks) -> str:
    """What tells this rank's part of the model in a file name; nothing if every rank has the whole model."""
    return f"_tp{ranks.tp_rank:02d}_pp{ranks.pp_rank:02d}" if ranks.tp_size * ranks.pp_size > 1 else ""


def _model_file(ranks: Ranks) -> str:
    return f"model{_part(ranks)}.pt"


def _optimizer_file(ranks: Ranks) -> str:
    return f"optimizer{_part(ranks)}_{ranks.dp_rank:05d}.pt"


def _write_files(
    folder: Path, ranks: Ranks, model_state: Mapping[str, torch.Tensor] | None, shard: Mapping[str, Any]
) -> None:
    _save_tensors(folder / _optimizer_file(ranks), dict(shard))
    if ranks.dp_rank == 0:
        if model_state is None:
            raise ValueError("data-parallel rank 0 must give model_state")
        _save_tensors(folder / _model_file(ranks), {name: tensor.detach() for name, tensor in model_state.items()})


def _parameters(ranks: Ranks, state: Mapping[str, torch.Tensor] | None) -> dict[str, dict[str, list[int]]]:
    """{model file: {name: shape}} of all ranks' parts of the model. Collective."""
    own = (_model_file(ranks), {name: list(tensor.shape) for name, tensor in (state or {}).items()})
    everybody: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everybody, own if ranks.dp_rank == 0 else None)
    return dict(entry for entry in everybody if entry is not None)


def _publish(
    final: Path,
    unfinished: Path,
    step: int,
    ranks: Ranks,
    parameters: dict[str, dict[str, list[int]]],
    extra: Mapping[str, Any],
    keep: int,
) -> None:
    if ranks.rank != 0:
        return
    meta = {
        "step": step,
        "layout": _layout(ranks),
        "parameters": parameters,
        "files": {file.name: file.stat().st_size for file in sorted(unfinished.iterdir())},
        "extra": dict(extra),
    }
    _write_text(unfinished / _META, json.dumps(meta, indent=1))
    _sync_folder(unfinished)
    shutil.rmtree(final, ignore_errors=True)  # the same step saved again, after a rewind
    os.replace(unfinished, final)
    _sync_folder(final.parent)
    latest = final.parent / "latest"
    _write_text(latest.with_name("latest.tmp"), final.name + "\n")
    os.replace(latest.with_name("latest.tmp"), latest)
    _sync_folder(final.parent)
    for old in list(_finished(final.parent))[max(1, keep) :]:
        shutil.rmtree(old, ignore_errors=True)


def _save_tensors(path: Path, content: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _finished(folder: Path) -> Iterator[Path]:
    """Renamed checkpoint folders, newest first."""
    numbered = [p for p in folder.glob("step_*") if p.is_dir() and p.name[5:].isdigit()]
    yield from sorted(numbered, key=lambda p: int(p.name[5:]), reverse=True)


def _newest(folder: Path) -> tuple[str | None, dict[str, Any], list[str]]:
    """(name, meta, notes) of the newest complete checkpoint; name None if there is none."""
    notes = [f"skipped {p.name}: the run was killed while saving it" for p in sorted(folder.glob("step_*.tmp"))]
    for path in _finished(folder):
        try:
            return path.name, _read_meta(path), notes
        except (OSError, ValueError, KeyError) as error:
            notes.append(f"skipped {path.name}: {error}")
    return None, {}, notes


def _read_meta(path: Path) -> dict[str, Any]:
    meta = json.loads((path / _META).read_text(encoding="utf-8"))
    for name, size in meta["files"].items():
        found = (path / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes of {size}")
    return meta


def _layout(ranks: Ranks) -> dict[str, int]:
    dims = ranks.dims
    return {
        "tensor": dims.tensor,
        "pipeline": dims.pipeline,
        "virtual_pipeline": dims.virtual_pipeline,
        "data": dims.data,
    }


def _check_layout(path: Path, meta: dict[str, Any], ranks: Ranks) -> None:
    saved, own = meta["layout"], _layout(ranks)
    if saved != own:
        say = lambda layout: " x ".join(f"{key} {degree}" for key, degree in layout.items())
        raise CheckpointError(
            f"{path} was saved in the layout {say(saved)}, and this run has {say(own)}; "
            "resume in the layout that saved it"
        )


def _check_model(path: Path, saved: dict[str, list[int]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    differences = _differences({n: tuple(s) for n, s in saved.items()}, shapes)
    if differences:
        shown = "".join(f"\n  {line}" for line in differences[:5])
        raise CheckpointError(
            f"{path} belongs to another model, {len(differences)} tensors differ:{shown}\n"
            "  use the model section that it was trained with, or another run folder"
        )


def _differences(saved: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]) -> list[str]:
    lines = []
    for name in [*own, *(n for n in saved if n not in own)]:
        here, there = own.get(name), saved.get(name)
        if here is None or there is None or tuple(here) != tuple(there):
            said = [
                f"{who} {tuple(shape)}" if shape is not None else f"{who} has none"
                for who, shape in (("checkpoint", there), ("model", here))
            ]
            lines.append(f"{name}: {', '.join(said)}")
    return lines


def _read_files(path: Path, ranks: Ranks) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    read = lambda name: torch.load(path / name, map_location="cpu", weights_only=True)
    return read(_model_file(ranks)), read(_optimizer_file(ranks))
