"""A mixer in one file, through the whole program as a user starts it: dry run, training, log, checkpoint, resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny import config_file

from hope.stored.manifest import read

ROOT = Path(__file__).parents[2]
NAME = "gated_delta_of_a_test"
OWN = ["model.imports=[gated_delta]", f"model.pattern=[{NAME},attention]"]


def run(path: str, *words: str) -> subprocess.CompletedProcess:
    """The program in a process of its own, with the mixer's file on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "pretrain_hope.py", path, *OWN, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def test_the_dry_run_tells_the_truth_about_it(tmp_path):
    done = run(
        config_file(tmp_path, "attention"), "--dry-run", "model.layers=3", "parallel.pipeline=2", "--devices", "2"
    )
    assert done.returncode == 0, done.stderr
    assert f"model       2 {NAME} + 1 attention" in done.stdout
    assert "% of them memory writes" in done.stdout
    assert "0.0% of them memory writes" not in done.stdout
    assert "stage 1  blocks" in done.stdout


def test_it_trains_is_logged_saved_and_resumed(tmp_path):
    path = config_file(tmp_path, "attention")
    short = ["train.stop_after=4", "checkpoint.every=4"]
    first = run(path, *short)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "runs" / "tiny"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["memory_norm.0"] > 0
    assert "memory_norm.1" not in records[-1]  # attention reports none
    names = {name.partition("/")[2] for name in read(folder / "checkpoints" / "step_00000004").tensors}
    assert "blocks.0.mixer.beta_weight" in names
    second = run(path)
    assert second.returncode == 0, second.stderr
    assert "RESUME" in second.stdout
    whole = run(path, "run.name=whole")
    assert whole.returncode == 0, whole.stderr
    losses = lambda name: [
        json.loads(line)["loss"] for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses("tiny")[-4:] == losses("whole")[-4:]  # bit-equal after the resume


def test_what_it_cannot_do_is_a_problem_of_the_configuration(tmp_path):
    """A chunk of zero, by the section's own check; exit code 2, no traceback."""
    done = run(config_file(tmp_path, "attention"), f"model.mixers.{NAME}.chunk=0", "--dry-run")
    assert done.returncode == 2, done.stdout
    assert f"model.mixers.{NAME}.chunk" in done.stderr
    assert "Traceback" not in done.stderr
