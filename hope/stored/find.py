"""What a path means: a run, one of its checkpoints, or exported weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hope.stored import folders, manifest
from hope.stored.errors import NothingStored
from hope.stored.manifest import Manifest

WEIGHTS, CONFIG = "model.safetensors", "config.json"
HF_INDEX = "model.safetensors.index.json"
"""What Hugging Face writes beside weights in several files."""
HF_PREFIX = "model."
"""What the names of weights begin with in an export in Hugging Face's layout."""
IMPORT = "`python -m parallel.checkpoint import FOLDER --out EXPORT` makes an export of a Llama's"


def is_export(path: Path) -> bool:
    """Whether `path` is a folder of exported weights.

    Raises:
        NothingStored: it has only one of the two files, or weights in several.
    """
    if (path / HF_INDEX).is_file():
        raise NothingStored(f"{path} has {HF_INDEX}, weights of another program in several files; {IMPORT}")
    there = [name for name in (WEIGHTS, CONFIG) if (path / name).is_file()]
    if len(there) == 1:
        lacking = CONFIG if there == [WEIGHTS] else WEIGHTS
        raise NothingStored(f"{path} has {there[0]} and no {lacking}: exported weights are both; {_EXPORT}")
    return bool(there)


def checkpoints_of(path: Path) -> list[Path]:
    """The checkpoints that `path` means, newest first: itself, or those of the run.

    Raises:
        NothingStored: there is none; the message says what was looked for.
    """
    if (path / manifest.NAME).is_file() or (path / manifest.OLD_NAME).is_file() or _is_named_so(path):
        return [path]
    for folder in (path / "checkpoints", path):
        if found := folders.finished(folder):
            return found
    raise NothingStored(_nothing(path))


def files_of(content: Manifest, prefix: str) -> Iterable[str]:
    """The files that hold the tensors whose names begin with `prefix`."""
    chunks = (chunk for name, tensor in content.tensors.items() if name.startswith(prefix) for chunk in tensor.chunks)
    return sorted({chunk.file for chunk in chunks})


_EXPORT = "`python -m parallel.checkpoint export RUN --out FOLDER` writes them"


def _is_named_so(path: Path) -> bool:
    return path.is_dir() and path in folders.finished(path.parent)


def _nothing(path: Path) -> str:
    if not path.is_dir():
        what = " is a file" if path.exists() else ": no such folder"
        return f"{path}{what}; give the folder of a run, of a checkpoint or of exported weights"
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        doubtful = "".join(f"; {place} was saved in doubt" for place in folders.doubtful(path / "checkpoints")[:1])
        return (
            f"{path} is a run without a finished checkpoint{doubtful}; `touch {path}/SAVE` lets a run that is training "
            "save one"
        )
    return (
        f"{path} is no run, no checkpoint and no export. Looked for\n"
        "  checkpoints/step_N            of a run; `python pretrain_hope.py CONFIG` makes one\n"
        f"  {manifest.NAME}                 of a checkpoint, which is a folder such as RUN/checkpoints/step_00001200\n"
        f"  {WEIGHTS}, {CONFIG}  of exported weights; {_EXPORT}"
    )
