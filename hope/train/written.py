"""Small files of a run, on a disk that may be full: nothing is half written, and a log that has to wait does."""

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hope.nesting import json_of

WAITING = 100_000  # lines; about 50 MB of metrics


class LineFile:
    """A file that grows by whole lines. Those that cannot be written wait for the next one, and `say` hears of it once.

    At most WAITING lines wait; older ones are lost, which `say` hears when the others are written, or at the end.
    """

    def __init__(self, path: Path, say: Callable[[str], object]) -> None:
        self._path, self._say = path, say
        self._waiting: deque[bytes] = deque()
        self._handle: int | None = None
        self._failing, self._lost = False, 0
        with contextlib.suppress(OSError):  # the first line will say so
            self._open()

    def write(self, line: str) -> None:
        """Append `line`, which has no end yet, after all that wait."""
        self._waiting.append(line.encode() + b"\n")
        if len(self._waiting) > WAITING:
            self._waiting.popleft()
            self._lost += 1
        try:
            while self._waiting:
                self._append(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self._release()  # the next try opens it anew: a file on a server may have become another one
            if not self._failing:
                self._say(f"log: {self._path} cannot be written: {error.strerror}; training goes on, the lines wait")
            self._failing = True
        else:
            if self._failing:
                self._say(f"log: {self._path} is written again{self._losses()}")
            self._failing, self._lost = False, 0

    def close(self) -> None:
        """Let go of the file; says how many lines never got into it."""
        self._release()
        self._lost += len(self._waiting)
        self._waiting.clear()
        if self._lost:
            self._say(f"log: {self._path} was not written to the end{self._losses()}")

    def _losses(self) -> str:
        return f"; {self._lost} lines are lost" if self._lost else ""

    def _append(self, line: bytes) -> None:
        handle = self._open()
        end = os.fstat(handle).st_size
        if (written := os.write(handle, line)) == len(line):
            return
        os.ftruncate(handle, end)
        raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes of a line found room")

    def _open(self) -> int:
        if self._handle is None:
            self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        return self._handle

    def _release(self) -> None:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            with contextlib.suppress(OSError):  # what a server says late about earlier lines: they are gone
                os.close(handle)


def check_replaceable(path: Path) -> None:
    """Raises OSError, naming `path`, if it is there and no file: a folder, or a device, which a file would replace."""
    if path.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no file but a device or a pipe, which a file would replace", str(path))


def replace_text(path: Path, text: str | bytes) -> None:
    """Let `path` hold `text`, durably: whoever reads it sees the old content or the new. Raises OSError, naming it."""
    check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # a full disk names nothing, and nobody knows the temporary
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def move_aside(path: Path) -> None:
    """Rename an existing file to the first free name.1, name.2, ... Raises OSError."""
    if path.is_file() and path.stat().st_size > 0:
        number = 1
        while (aside := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        path.rename(aside)


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Leave in a .jsonl file the whole lines that `keep` accepts; returns the last step in it, or -1.

    Raises OSError: then the file is as it was. Cutting off its end, which is what a resume needs, takes no room on a
    full disk.
    """
    if not path.is_file():  # a device has no lines, and may have no end
        return -1
    old = path.read_bytes()
    entries = [(line, _parse(line)) for line in old.split(b"\n")[:-1]]
    kept = [(line, entry) for line, entry in entries if entry is not None and keep(entry)]
    new = b"".join(line + b"\n" for line, _ in kept)
    if old.startswith(new):
        if len(new) < len(old):
            os.truncate(path, len(new))
    else:
        replace_text(path, new)
    return max((entry.get("step", -1) for _, entry in kept), default=-1)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json_of(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
