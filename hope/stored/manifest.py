"""The manifest of a checkpoint: every tensor, its chunks, and the files they lie in, as JSON. No torch, no pickle.

{"format": 1, "step": 1200, "layout": {...}, "counters": {...}, "extra": {...},
 "tensors": {"master/blocks.0.norm.weight": {"dtype": "float32", "shape": [512], "chunks": [
     {"file": "rank_00003.bin", "start": 4096, "bytes": 2048, "at": [0], "shape": [512]}]}},
 "files": {"rank_00003.bin": {"bytes": 6144, "sha256": "..."}},
 "sha256": "... of all the rest"}
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hope.nesting import json_of
from hope.stored.errors import CheckpointError, DamagedCheckpoint

FORMAT = 1
NAME = "manifest.json"
OLD_NAME = "meta.json"  # of the format that could only resume in the layout that saved
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}

MEMORY_STATE = "none: fast-weight states are created with every sequence and never carried from one step to the next"


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, row-major, at byte `start` of `file`: `at` is its first corner, `shape` its extent."""

    file: str
    start: int
    bytes: int
    at: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorEntry:
    """A whole (single-device) tensor; its chunks cover it without overlap."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def bytes(self) -> int:
        return BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class FileEntry:
    """Size and hash that a file must have."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder holds. `tensors`: by KEY/NAME, key "master" being the fp32 weights.

    layout: parallel degrees of the run that wrote it (informational). counters: clocks per parameter group. extra: what
    the caller recorded: order and fingerprint of the data, consumed samples, schedule, configuration.
    """

    step: int
    layout: dict[str, int]
    counters: dict[str, dict[str, int]]
    extra: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    carried_memory_state: str = MEMORY_STATE

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file.bytes for file in self.files.values())

    def write(self, folder: Path) -> None:
        """Write manifest.json into `folder`, on disk when this returns."""
        body = {"format": FORMAT, **asdict(self)}
        text = json.dumps({**body, "sha256": _digest(body)}, indent=1)
        write_durably(folder / NAME, text)


def read(folder: Path) -> Manifest:
    """The manifest of `folder`, checked against its own hash and for sense.

    Raises:
        DamagedCheckpoint: there is none, or it is not what was written.
        CheckpointError: it is sound, but of another format.
    """
    path = folder / NAME
    if not path.exists():
        if (folder / OLD_NAME).exists():
            raise CheckpointError(
                f"{folder} has the old format (resumable only in its own layout), which this version does not read; "
                "finish that run with the version that wrote it, or start another run.name"
            )
        raise DamagedCheckpoint(f"{NAME} is missing")
    try:
        body = json_of(path.read_text(encoding="utf-8"))
        claimed = body.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedCheckpoint(f"{NAME} is not a manifest: {error!r}") from error
    if _digest(body) != claimed:
        raise DamagedCheckpoint(f"{NAME} has another content than was written: its sha256 does not fit")
    if body.pop("format") != FORMAT:
        raise CheckpointError(f"{path} has a format that this version does not read; it reads format {FORMAT}")
    return _parsed(body)


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raises DamagedCheckpoint, naming every file that is missing or has another size than recorded."""
    wrong = []
    for name, entry in manifest.files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            wrong.append(f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}")
            continue
        if found != entry.bytes:
            wrong.append(f"{name} has {found} bytes of {entry.bytes}")
    if wrong:
        raise DamagedCheckpoint(", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))


def check_hashes(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Raises DamagedCheckpoint for the first file of `names` whose content is not what was written."""
    for name in names:
        try:
            with open(folder / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DamagedCheckpoint(f"{name} cannot be read: {error.strerror}") from error
        if found != manifest.files[name].sha256:
            raise DamagedCheckpoint(
                f"{name} has another content than was written: sha256 {found[:12]}..., not "
                f"{manifest.files[name].sha256[:12]}..."
            )


def write_durably(path: Path, text: str) -> None:
    """Write a small file and wait until it is on disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _parsed(body: dict[str, Any]) -> Manifest:
    try:
        files = {name: FileEntry(**entry) for name, entry in body.pop("files").items()}
        tensors = {name: _tensor(entry) for name, entry in body.pop("tensors").items()}
        content = Manifest(files=files, tensors=tensors, **body)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{NAME} lacks something: {error!r}") from error
    for name in files:
        if name != os.path.basename(name) or name.startswith("."):
            raise DamagedCheckpoint(f"{NAME} names the file {name!r}, which is not one of this folder")
    for name, tensor in tensors.items():
        problem = _problem(tensor, files)
        if problem:
            raise DamagedCheckpoint(f"{NAME}: {name} {problem}")
    return content


def _problem(tensor: TensorEntry, files: Mapping[str, FileEntry]) -> str:
    """What makes a tensor's entry senseless, or nothing."""
    size = BYTES.get(tensor.dtype)
    if size is None:
        return f"has the dtype {tensor.dtype!r}; known: {', '.join(BYTES)}"
    for chunk in tensor.chunks:
        dims = {len(chunk.at), len(chunk.shape), len(tensor.shape)}
        inside = zip(chunk.at, chunk.shape, tensor.shape, strict=False)
        if len(dims) > 1 or not all(0 <= a <= a + s <= whole for a, s, whole in inside):
            return f"has a chunk {list(chunk.shape)} at {list(chunk.at)} outside of {list(tensor.shape)}"
        if chunk.bytes != size * math.prod(chunk.shape) or chunk.start < 0 or chunk.start % size:
            return f"has a chunk of {chunk.bytes} bytes at byte {chunk.start} for {list(chunk.shape)} {tensor.dtype}"
        if chunk.file not in files or chunk.start + chunk.bytes > files[chunk.file].bytes:
            return f"has a chunk beyond the end of {chunk.file}"
    covered = sum(math.prod(chunk.shape) for chunk in tensor.chunks)
    return (
        "" if covered == math.prod(tensor.shape) else f"has chunks with {covered} of {math.prod(tensor.shape)} elements"
    )


def _tensor(entry: dict[str, Any]) -> TensorEntry:
    chunks = tuple(Chunk(c["file"], c["start"], c["bytes"], tuple(c["at"]), tuple(c["shape"])) for c in entry["chunks"])
    return TensorEntry(entry["dtype"], tuple(entry["shape"]), chunks)
