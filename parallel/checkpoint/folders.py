"""Where checkpoints lie, how one becomes visible, and which ones stay.

checkpoints/latest               name of the newest folder, for people and tools; written last
checkpoints/step_00001200/       a durable checkpoint: manifest.json and its files
            step_00001600.tmp/   being written, or left by a run that was killed while writing it
            step_00001400.bad/   found damaged on resume and moved aside
            step_00000800.old/   being removed
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from parallel.checkpoint.manifest import write_durably

LATEST = "latest"
_STEP = re.compile(r"step_(\d{8,})")


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in `folder`."""
    return folder / f"step_{step:08d}"


def unfinished(path: Path) -> Path:
    """Where the checkpoint `path` lies while it is written."""
    return path.with_name(path.name + ".tmp")


def finished(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first, damaged ones included."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and _STEP.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a folder's name."""
    match = _STEP.match(path.name)
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


def publish(path: Path) -> None:
    """Make the written folder visible as `path`, durably, and then name it in `latest`."""
    sync_folder(unfinished(path))
    prepared = _next_latest(path)  # now, while a full disk still means that nothing happened
    if path.exists():  # the same step saved again, after a fall-back to an older one
        shutil.rmtree(path.with_name(path.name + ".old"), ignore_errors=True)
        os.replace(path, path.with_name(path.name + ".old"))
    os.replace(unfinished(path), path)
    sync_folder(path.parent)
    os.replace(prepared, path.parent / LATEST)
    sync_folder(path.parent)


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
    what killed runs left. Only between two saves. Returns a line for each that could not be removed."""
    leftovers = [*folder.glob("step_*.old"), *folder.glob("step_*.tmp")]
    spare = [p for p in finished(folder)[max(1, keep) :] if not (keep_every > 0 and step_of(p) % keep_every == 0)]
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
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(path, old)
    shutil.rmtree(old)
