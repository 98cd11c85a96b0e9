"""Where checkpoints lie, how one becomes visible, and which ones stay.

checkpoints/latest               name of the newest folder, for other tools; written last
checkpoints/step_00001200/       a durable checkpoint: manifest.json and its files
            step_00001500.doubtful/         whole, but its weights are not finite or its last step was skipped
            step_00001400.bad/              found damaged on resume and moved aside
            .unfinished-step_00001600/      being written, or left by a run that was killed while writing it
            .leftover-step_00000800/        being removed

Only the first kind counts: it is resumed from, named in `latest`, and a reason to remove older ones. What a run removes
without asking begins with a dot, so that no copy which a person made there has such a name.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from hope.stored.manifest import write_durably

LATEST = "latest"
DOUBTFUL = ".doubtful"
_UNFINISHED, _LEFTOVER = ".unfinished-", ".leftover-"
_STEP = re.compile(r"step_(\d{8,})")


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in `folder`."""
    return folder / f"step_{step:08d}"


def unfinished(path: Path) -> Path:
    """Where the checkpoint `path` lies while it is written."""
    return path.with_name(_UNFINISHED + path.name)


def left_unfinished(folder: Path) -> list[Path]:
    """What runs that were killed while saving left in `folder`, by name."""
    return sorted(folder.glob(f"{_UNFINISHED}step_*"))


def step_name(path: Path) -> str:
    """The name of a checkpoint, or the one that an unfinished one would have got."""
    return path.name.removeprefix(_UNFINISHED)


def doubtful(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that do not count, newest first; see `publish`."""
    found = [path for path in folder.glob(f"step_*{DOUBTFUL}") if _STEP.fullmatch(path.name.removesuffix(DOUBTFUL))]
    return sorted(found, key=step_of, reverse=True)


def finished(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first, damaged ones included."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and _STEP.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, also of an unfinished or a doubtful one."""
    match = _STEP.match(step_name(path))
    if match is None:
        raise ValueError(f"{path.name} is not the name of a checkpoint")
    return int(match[1])


def prepare(path: Path) -> None:
    """An empty folder to write the checkpoint `path` in."""
    shutil.rmtree(unfinished(path), ignore_errors=True)  # left by a run that was killed while saving
    unfinished(path).mkdir(parents=True)


def discard(path: Path) -> None:
    """Remove what a failed save of `path` has written."""
    shutil.rmtree(unfinished(path), ignore_errors=True)
    (path.parent / f"{LATEST}.tmp").unlink(missing_ok=True)


def publish(path: Path) -> Path:
    """Make the written folder visible as `path`, durably, and then name it in `latest`; returns `path`."""
    sync_folder(unfinished(path))
    prepared = _next_latest(path)  # now, while a full disk still means that nothing happened
    _appear(unfinished(path), path)
    os.replace(prepared, path.parent / LATEST)
    sync_folder(path.parent)
    return path


def publish_doubtful(path: Path) -> Path:
    """Make the written folder visible as `path`.doubtful, which does not count as a checkpoint; returns that path."""
    sync_folder(unfinished(path))
    place = path.with_name(path.name + DOUBTFUL)
    _appear(unfinished(path), place)
    return place


def _appear(written: Path, place: Path) -> None:
    if place.exists():  # the same step saved again, after a fall-back to an older one
        old = _leftover(place)
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
    os.replace(written, place)
    sync_folder(place.parent)


def _leftover(path: Path) -> Path:
    return path.with_name(_LEFTOVER + path.name)


def set_latest(path: Path) -> None:
    """Let `latest` name the checkpoint `path`."""
    os.replace(_next_latest(path), path.parent / LATEST)
    sync_folder(path.parent)


def _next_latest(path: Path) -> Path:
    temporary = path.parent / f"{LATEST}.tmp"
    write_durably(temporary, path.name + "\n")
    return temporary


def prune(folder: Path, keep: int, keep_every: int) -> list[str]:
    """Remove all checkpoints but the newest `keep` and those whose step is a multiple of `keep_every` (0: none), and
    what killed runs left. Doubtful ones are counted apart. Only between two saves. Returns a line for each that could
    not be removed."""
    leftovers = [*folder.glob(f"{_LEFTOVER}step_*"), *left_unfinished(folder)]
    spare = [p for p in finished(folder)[max(1, keep) :] if not (keep_every > 0 and step_of(p) % keep_every == 0)]
    spare += doubtful(folder)[max(1, keep) :]
    problems = []
    for path in leftovers + spare:
        try:
            _remove(path) if path in spare else shutil.rmtree(path)
        except OSError as error:
            problems.append(f"{path} cannot be removed: {error.strerror}")
    return problems


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it neither counts as one nor is lost; returns its new place."""
    aside = path.with_name(path.name + ".bad")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.bad{number}")
    os.replace(path, aside)
    sync_folder(path.parent)
    return aside


def sync_folder(path: Path) -> None:
    """Wait until the names in `path` are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Rename first: a kill in the middle of the removal must not leave what looks like a damaged checkpoint."""
    old = _leftover(path)
    shutil.rmtree(old, ignore_errors=True)
    os.replace(path, old)
    shutil.rmtree(old)
