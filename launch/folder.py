"""Where everything of a run is stored. Standard library only: the batch script's host may have nothing else.

runs/NAME/launch/     job.sbatch, config.yaml (the exact one), job.json, jobs.txt, code/ (snapshot), git.txt
         /control/    budget.json, verdict.json, verdicts.jsonl, exclude.txt, cancelled, local.json
         /control/JOB.RESTART/   of one attempt: exit/RANK.json, failed, hang.json, reports/, stacks/, preflight/
         /logs/       JOB.out (rank 0 and the batch script), JOB.RESTART/rank-00001.log ...
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hope.nesting import json_of

PACKAGES = ("hope", "parallel", "data_prep", "configs", "launch")
PROGRAM = "pretrain_hope.py"


class RunFolder:
    """Paths of one run. Nothing is created until something is written."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).absolute()
        self.launch, self.control, self.logs = (self.root / name for name in ("launch", "control", "logs"))
        self.fresh = self.root / "launch.new"  # becomes `launch` once SLURM has taken the job
        self.code, self.config, self.script = (self.launch / name for name in ("code", "config.yaml", "job.sbatch"))
        self.job, self.jobs = self.launch / "job.json", self.launch / "jobs.txt"
        self.budget, self.verdict = self.control / "budget.json", self.control / "verdict.json"
        self.history, self.exclude = self.control / "verdicts.jsonl", self.control / "exclude.txt"
        self.cancelled = self.control / "cancelled"
        self.here = self.control / "local.json"  # of a `launch local` that runs: host, kernel, pid, started

    def attempt(self, name: str) -> Path:
        """Control folder of one attempt, `JOB.RESTART`."""
        return self.control / name

    def saved_step(self) -> int:
        """Step of the newest complete checkpoint, -1 without one."""
        found = [
            int(match[1])
            for path in (self.root / "checkpoints").glob("step_*")
            if (match := re.fullmatch(r"step_(\d+)", path.name)) and (path / "manifest.json").exists()
        ]
        return max(found, default=-1)

    def saved_config(self) -> dict[str, Any] | None:
        """The configuration that the newest complete checkpoint recorded, None if it cannot be read here."""
        return self._recorded("config")

    def saved_order(self) -> dict[str, Any]:
        """What the newest complete checkpoint recorded of the order of the data, {} if it cannot be read here."""
        return self._recorded("order") or {}

    def _recorded(self, key: str) -> dict[str, Any] | None:
        manifest = read_json(self.root / "checkpoints" / f"step_{self.saved_step():08d}" / "manifest.json", {})
        extra = manifest.get("extra") if isinstance(manifest, dict) else None
        found = extra.get(key) if isinstance(extra, dict) else None
        return found if isinstance(found, dict) else None

    def job_ids(self) -> list[str]:
        """Every job that was submitted for this run, oldest first: `NUMBER`, or `NUMBER;CLUSTER`."""
        files = [path for path in (self.jobs, self.fresh / self.jobs.name) if path.exists()]
        words = [word for path in files for word in path.read_text(errors="replace").split()]
        return [word for word in words if re.fullmatch(r"\d+(;\S+)?", word)]


def write_json(path: Path, value: object) -> None:
    """Replace `path` by the value as JSON: readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def read_json(path: Path, default: Any = None) -> Any:
    """The JSON value in `path`, `default` if there is no such file, or it is not whole or of another kind."""
    try:
        found = json_of(path.read_text())
    except (OSError, ValueError):
        return default
    return found if default is None or isinstance(found, type(default)) else default


def first(path: Path, value: object) -> bool:
    """Write `value` as JSON only if `path` does not exist; whether this caller was the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    temporary.write_text(json.dumps(value) + "\n")
    try:
        os.link(temporary, path)  # atomic on NFS too, and the file is whole from the start
        return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink()


def append_line(path: Path, value: object) -> None:
    """Add one JSON line; a single write, so that lines of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def snapshot(source: Path, target: Path) -> None:
    """Copy the program and its packages to `target`, which a running job then uses whatever happens to `source`."""
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    shutil.copy2(source / PROGRAM, target / PROGRAM)
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in PACKAGES:
        shutil.copytree(source / name, target / name, ignore=skip)


def describe_source(source: Path) -> str:
    """Commit and uncommitted changes of the checkout at `source`; a line that says so if it is none."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(source), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

    try:
        return f"commit {git('rev-parse', 'HEAD')}{git('diff', 'HEAD', '--', *PACKAGES, PROGRAM)}"
    except (OSError, subprocess.SubprocessError):
        return "commit unknown: not a git checkout\n"
