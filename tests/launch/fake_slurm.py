"""Stand-ins for SLURM's commands: bash scripts in front of PATH that note how they were called."""

from __future__ import annotations

from pathlib import Path

import pytest

NO_CONTROLLER = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
NO_SUCH_JOB = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
NO_ACCOUNTING = "echo 'Slurm accounting storage is disabled' >&2; exit 1"
DEFAULT = {"squeue": NO_SUCH_JOB, "scontrol": NO_SUCH_JOB, "sacct": NO_ACCOUNTING, "scancel": "exit 0",
           "sbatch": 'case "$*" in *--test-only*) echo "sbatch: Job 9 to start at noon" >&2;; *) echo 77;; esac',
           "srun": "exit 1"}  # fmt: skip


class FakeSlurm:
    """`says(squeue="echo ...")` replaces what a command does; `calls` has `sbatch --parsable ...`, one line each."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.noted = folder / "fake-slurm", folder / "slurm-calls"
        self.folder.mkdir()
        monkeypatch.setenv("PATH", str(self.folder), prepend=":")
        self.says(**DEFAULT)

    def says(self, **bodies: str) -> None:
        for name, body in bodies.items():
            path = self.folder / name
            path.write_text(f'#!/bin/bash\necho "{name} $*" >>{self.noted}\n{body}\n')
            path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        lines = self.noted.read_text().splitlines() if self.noted.exists() else []
        return [line for line in lines if line.split()[0] == name]
