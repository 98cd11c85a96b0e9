"""A mixer in one file, through the whole program as a user starts it: dry run, training, log, checkpoint, resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

from multirank import run_ranks
from tiny import config_file

import pretrain_hope
from hope.stored.manifest import read

ROOT = Path(__file__).parents[2]
NAME = "gated_delta_of_a_test"
OWN = ["model.imports=[gated_delta]", f"model.pattern=[{NAME},attention]"]


def run(path: str, *words: str) -> subprocess.CompletedProcess:
    """The program in a process of its own, with the mixer's file on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "pretrain_hope.py", path, *OWN, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def again(path: str, *words: str) -> int:
    """The same in a fork, which has imported the program."""
    return pretrain_hope.main([path, *OWN, *words])


def test_the_dry_run_tells_the_truth_about_it(tmp_path, capfd):
    words = ["--dry-run", "model.layers=3", "parallel.pipeline=2", "--devices", "2"]
    assert run_ranks(again, 1, config_file(tmp_path, "attention"), *words, timeout=120) == [0]
    printed = capfd.readouterr().out
    assert f"model       2 {NAME} + 1 attention" in printed
    assert "% of them memory writes" in printed
    assert "0.0% of them memory writes" not in printed
    assert "stage 1  blocks" in printed


def test_it_trains_is_logged_saved_and_resumed(tmp_path, capfd):
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
    assert run_ranks(again, 1, path, timeout=120) == [0]
    assert "RESUME" in capfd.readouterr().out
    assert run_ranks(again, 1, path, "run.name=whole", timeout=120) == [0]
    losses = lambda name: [
        json.loads(line)["loss"] for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses("tiny")[-4:] == losses("whole")[-4:]  # bit-equal after the resume


def test_what_it_cannot_do_is_a_problem_of_the_configuration(tmp_path, capfd):
    """A chunk of zero, by the section's own check; exit code 2, no traceback."""
    words = [f"model.mixers.{NAME}.chunk=0", "--dry-run"]
    assert run_ranks(again, 1, config_file(tmp_path, "attention"), *words, timeout=120) == [2]
    error = capfd.readouterr().err
    assert f"model.mixers.{NAME}.chunk" in error
    assert "Traceback" not in error
