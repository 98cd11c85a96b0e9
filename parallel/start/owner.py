"""One run per folder: rank 0 holds `owner.json` in it from before anything else is written until it ends.

The file appears whole by a hard link, which is atomic on shared file systems too. Its time is the holder's heartbeat.
A holder that was killed cannot remove it, so it is taken over from one that is dead:

1. on this kernel and in this process namespace: no process has its number and start time, or only a zombie;
2. a start of this same SLURM job with a lower restart count: SLURM ends a start before it requeues;
3. another SLURM job that `squeue` does not know or shows as ended or waiting;
4. anywhere else: no heartbeat for STALE_S seconds, by the clock of the file system.

A holder elsewhere that may live is waited for until it beats, which is a refusal, or until it is stale. A holder that
was only stopped for so long finds the file another's, and ends with the step in hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hope.nesting import json_of
from parallel.start import groups, holders, launcher
from parallel.start.errors import LaunchError, NotNow

NAME = "owner.json"
BEAT_S, STALE_S = 15.0, 180.0


class Owner:
    """Holds a run's folder. `check` must be called before writing, wherever a stop may have lasted long."""

    def __init__(self, path: Path, own: dict[str, Any]) -> None:
        self._path, self._own = path, own
        self._lost: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beats, name="owner", daemon=True)

    def check(self) -> None:
        """Raises LaunchError when another run has taken the folder."""
        if self._lost:
            raise LaunchError(f"{self._path.parent} was taken over by {self._lost}; this run ends without writing")

    def keep(self) -> None:
        """Begin the heartbeat."""
        self._thread.start()

    def release(self) -> None:
        """Let others have the folder."""
        self._over.set()
        self._thread.join(BEAT_S)
        with contextlib.suppress(OSError):
            if self._is_own():
                self._path.unlink()

    def _beats(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a server that is away for a moment
                self.beat()

    def beat(self) -> None:
        """Renew the file's time, or find out that it is no longer this run's. Raises OSError."""
        if self._is_own() or _appears(self._path, self._own):  # somebody may have removed it, for want of patience
            os.utime(self._path)
        else:
            self._lost = holders.described(read(self._path))

    def _is_own(self) -> bool:
        return read(self._path).get("nonce") == self._own["nonce"]


@contextlib.contextmanager
def hold(folder: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[Owner]:
    """Own `folder`, which is created, while the context lasts. For one process of a run; not collective.

    `waiting` is called every second while a holder elsewhere may be alive.

    Raises:
        LaunchError: another run has it; the message names it.
        NotNow: nothing can be written there.
    """
    path, own = folder / NAME, _own()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(path, own, waiting)
    except OSError as error:
        raise NotNow(f"{folder}: the run's folder cannot be written: {error.strerror}; see run.dir") from error
    owner = Owner(path, own)
    owner.keep()
    try:
        yield owner
    finally:
        owner.release()


@contextlib.contextmanager
def hold_for_all(
    folder: Path, ranks: groups.Ranks, waiting: Callable[[], object] = lambda: None
) -> Iterator[Callable[[], None]]:
    """`hold` by rank 0 for all ranks of a run; gives what to call as `Owner.check`. Collective; raises alike on all."""
    with contextlib.ExitStack() as stack:
        check, problem = (lambda: None), None
        if ranks.rank == 0:
            try:
                check = stack.enter_context(hold(folder, waiting)).check
            except LaunchError as error:
                problem = error
        problem = groups.from_first(problem)
        if problem is not None:
            raise problem
        yield check


def read(path: Path) -> dict[str, Any]:
    """Who holds it, as it was written; empty if nobody does or it is not ours to read. Raises OSError."""
    try:
        found = json_of(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _own() -> dict[str, Any]:
    pid = os.getpid()
    place = {"host": socket.gethostname(), "pid": pid, "started": holders.started(pid), "kernel": holders.kernel()}
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {**place, **launcher.attempt(os.environ), "since": since, "nonce": secrets.token_hex(8)}


def _take(path: Path, own: dict[str, Any], waiting: Callable[[], object]) -> None:
    first: dict[Any, float] = {}  # of every holder, its first beat that was seen
    while not _appears(path, own):
        holder, beat = read(path), _time_of(path)
        if beat is None:
            continue  # it has just gone
        life = holders.judge(holder, own, _now(path.parent) - beat, STALE_S)
        if life == "unknown" and first.setdefault(holder.get("nonce"), beat) != beat:
            life = "alive"
        if life == "alive":
            raise LaunchError(
                f"{path.parent} is in use by {holders.described(holder)}; one run per folder: wait for its end, stop "
                f"it, or take another run.name (if it is not running, remove {path})"
            )
        if life == "dead":
            _remove(path, holder)
            continue
        waiting()
        time.sleep(1.0)


def _appears(path: Path, own: dict[str, Any]) -> bool:
    """Create the file with its content; False if there is one."""
    temporary = path.with_name(f".{path.name}.{own['nonce']}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(own, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)


def _remove(path: Path, dead: dict[str, Any]) -> None:
    """Remove the file of a dead holder, and of nobody who took it over meanwhile."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if read(aside).get("nonce") != dead.get("nonce"):
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _time_of(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _now(folder: Path) -> float:
    """By the clock that dates files in `folder`: a server's may be minutes away from this machine's."""
    probe = folder / f".{NAME}.{secrets.token_hex(8)}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()
