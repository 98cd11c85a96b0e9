"""The batch script against golden files: `UPDATE_GOLDEN=1 pytest tests/launch/test_script.py` writes them anew."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from configs.launch_section import LaunchConfig
from launch import profile
from launch.folder import RunFolder
from launch.placement import Job
from launch.script import render

GOLDEN = Path(__file__).parent / "golden"
PROFILES = sorted(path.stem for path in profile.FOLDER.glob("*.yaml"))
VARIANTS = {
    "c10d": ("h100", ["starter=c10d"], False),
    "parity": ("h100", ["preflight.enabled=false", "exclude=[gpu07, gpu11]", "qos=high"], True),
    "setup": ("h100", ["setup=[source env.sh]", "modules=[cuda/13]", "sbatch=[--switches=1]", "env.A=b c"], False),
}


def script(name: str, overrides: list[str], parity: bool = False) -> str:
    run, folder = RunFolder("/shared/me/runs/demo"), Path("/shared/me/hope")
    return render(Job(run, profile.load(name, overrides), LaunchConfig(), 4, folder, parity))


@pytest.mark.parametrize("name", [*PROFILES, *VARIANTS])
def test_the_script_is_the_golden_one(name):
    base, overrides, parity = VARIANTS.get(name, (name, [], False))
    text, path = script(base, overrides, parity), GOLDEN / f"{name}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", [*PROFILES, *VARIANTS])
def test_bash_accepts_the_script(name):
    base, overrides, parity = VARIANTS.get(name, (name, [], False))
    done = subprocess.run(["bash", "-n"], input=script(base, overrides, parity), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_names_with_blanks_survive_the_shell():
    run, folder = RunFolder("/shared/my runs/a b"), Path("/shared/my code")
    text = render(Job(run, profile.load("h100", []), LaunchConfig(), 1, folder))
    assert "cd '/shared/my code' || unready" in text
    assert '#SBATCH --output="/shared/my runs/a b/logs/"%j.out' in text
    assert "'/shared/my runs/a b/launch/config.yaml'" in text
    assert "#SBATCH --job-name=a-b" in text
