"""Which checkpoint to resume from: the newest that is exactly what was written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hope.stored import folders, manifest
from hope.stored.manifest import Manifest
from parallel.checkpoint.errors import CheckpointError, DamagedCheckpoint
from parallel.checkpoint.together import HostGroups, first_only, together
from parallel.start.groups import Ranks


@dataclass(frozen=True)
class Found:
    """A durable checkpoint, every byte of it verified."""

    path: Path
    manifest: Manifest


def find_newest(folder: Path, ranks: Ranks, groups: HostGroups) -> tuple[Found | None, list[str]]:
    """The newest sound checkpoint in `folder`, or None if there never was one; and notes on what was skipped on the
    way to it, one line each. All ranks call it.

    Each rank verifies the hashes of its share of the files. Damaged checkpoints are skipped and, if an older one
    serves, renamed to `step_N.bad`.

    Raises:
        CheckpointError: all are damaged or doubtful (starting anew silently would lose the run), or one has another
            format.
    """
    notes, names = first_only(partial(_look, folder), folder, ranks, groups.world)
    damaged: dict[str, str] = {}
    for name in names:
        path = folder / name
        try:
            content = first_only(partial(_open, path), path, ranks, groups.world)
            mine = sorted(content.files)[ranks.rank :: ranks.world_size]
            together(partial(manifest.check_hashes, path, content, mine), path, groups.world)
        except DamagedCheckpoint as error:
            damaged[name] = str(error)
            continue
        notes += first_only(partial(_set_aside, damaged, path), path, ranks, groups.world)
        return Found(path, content), notes
    if damaged:
        shown = "".join(f"\n  {name}: {why}" for name, why in damaged.items())
        raise CheckpointError(
            f"{folder} holds no sound checkpoint:{shown}\n"
            "  put one back from a copy, or start another run.name: this run would begin again at step 0"
        )
    return None, notes


def _look(folder: Path) -> tuple[list[str], list[str]]:
    """Notes on saves that do not count and a `latest` that leads nowhere; names of the checkpoints, newest first."""
    names = [path.name for path in folders.finished(folder)]
    newest = max(map(folders.step_of, folders.finished(folder)), default=-1)
    doubts = [f"{path.name}: {_doubt(path)}" for path in folders.doubtful(folder) if folders.step_of(path) > newest]
    if doubts and not names:
        shown = "".join(f"\n  {line}" for line in doubts)
        raise CheckpointError(
            f"{folder} holds no checkpoint that can be gone on from, only doubtful ones:{shown}\n"
            f"  to begin again, take another run.name or move them away; to begin from the weights of one, name it in "
            "model.init of another run.name; to go on from one after all, take "
            f"{folders.DOUBTFUL} off its name"
        )
    left = folders.left_unfinished(folder)
    notes = [f"skipped {folders.step_name(path)}: the run was killed while saving it" for path in left]
    notes += [f"skipped {line}" for line in doubts]
    latest = folder / folders.LATEST
    if latest.is_file():
        named = latest.read_text(encoding="utf-8", errors="replace").strip()
        if named not in names:
            notes.append(f"latest names {named!r}, which is not there; looking for the newest checkpoint instead")
    return notes, names


def _doubt(path: Path) -> str:
    try:
        return str(manifest.read(path).extra.get("doubt", "it does not say why"))
    except (CheckpointError, OSError) as error:
        return str(error)


def _open(path: Path) -> Manifest:
    content = manifest.read(path)
    manifest.check_sizes(path, content)
    return content


def _set_aside(damaged: dict[str, str], good: Path) -> list[str]:
    """Rename the damaged ones and let `latest` name the good one; returns a note for each."""
    notes = []
    for name, why in damaged.items():
        try:
            where = f"moved to {folders.set_aside(good.parent / name).name}"
        except OSError as error:
            where = f"cannot be moved aside: {error.strerror}"
        notes.append(f"skipped {name}: {why}; {where}")
    if damaged:
        folders.set_latest(good)
    return notes
