"""Alive, ended, or no answer: what follows from each, with stand-ins for SLURM's commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_slurm import NO_ACCOUNTING, NO_CONTROLLER, NO_SUCH_JOB, FakeSlurm
from tiny import config_file

from launch import slurm
from launch.__main__ import main
from launch.folder import RunFolder, write_json
from launch.status import row

RUNNING = "echo 'RUNNING|None|node1|now'"


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path, monkeypatch)


@pytest.fixture
def submitted_run(tmp_path: Path, fake_slurm: FakeSlurm) -> RunFolder:
    """A run of which job 41 was submitted, then 42."""
    run = RunFolder(tmp_path / "runs" / "tiny")
    write_json(run.job, {"folder": str(tmp_path), "exclude": [], "attempts": 3, "world": 2})
    run.script.write_text("#!/bin/bash\n")
    run.jobs.write_text("41\n42\n")
    write_json(run.verdict, {"verdict": "requeue", "cause": "a node died"})
    write_json(run.budget, {"step": 7, "left": 2, "open": None})
    return run


@pytest.mark.parametrize(
    ("says", "life"),
    [
        ({"squeue": RUNNING}, "alive"),
        ({"squeue": "echo 'COMPLETED|None|node1|now'"}, "ended"),
        ({"squeue": "echo 'FAILED|None||'; echo 'PENDING|Dependency||'"}, "alive"),
        ({"squeue": NO_SUCH_JOB}, "ended"),
        ({"squeue": "exit 0"}, "ended"),
        ({"squeue": NO_CONTROLLER, "scontrol": "echo 'JobId=1 JobState=RUNNING Restarts=0'"}, "alive"),
        ({"squeue": NO_CONTROLLER, "scontrol": NO_CONTROLLER, "sacct": "echo COMPLETED"}, "ended"),
        ({"squeue": NO_CONTROLLER, "scontrol": NO_CONTROLLER, "sacct": "echo 'CANCELLED by 1000'"}, "ended"),
        ({"squeue": NO_CONTROLLER, "scontrol": NO_CONTROLLER, "sacct": "echo RUNNING"}, "alive"),
        ({"squeue": NO_CONTROLLER, "scontrol": NO_CONTROLLER, "sacct": "exit 0"}, "unknown"),
        ({"squeue": NO_CONTROLLER, "scontrol": NO_CONTROLLER, "sacct": NO_ACCOUNTING}, "unknown"),
    ],
)
def test_three_answers(fake_slurm, says, life):
    fake_slurm.says(**says)
    known = slurm.ask("42")
    assert known.life == life
    assert ("Unable to contact" in known.reason) == (life == "unknown")


def silent(fake: FakeSlurm) -> None:
    fake.says(squeue=NO_CONTROLLER, scontrol=NO_CONTROLLER)


def test_resume_submits_nothing_while_slurm_does_not_answer(submitted_run, fake_slurm, capsys):
    silent(fake_slurm)
    assert main(["resume", str(submitted_run.root)]) == 1
    said = capsys.readouterr().err
    assert "SLURM does not say whether job 42 is over" in said
    assert "Unable to contact slurm controller" in said
    assert fake_slurm.calls("sbatch") == []
    assert submitted_run.verdict.exists()


def test_submit_too(submitted_run, fake_slurm, tmp_path, capsys):
    silent(fake_slurm)
    words = ["submit", config_file(tmp_path), "--profile", "cpu", f"site.shared=[{tmp_path}]"]
    assert main(words) == 2
    assert "SLURM does not say whether job 42 is over" in capsys.readouterr().err
    assert fake_slurm.calls("sbatch") == []


def test_the_running_job_of_a_chain_counts_when_its_successor_was_cancelled(submitted_run, fake_slurm, capsys):
    fake_slurm.says(squeue=f'case "$*" in *41*) {RUNNING};; *) echo "CANCELLED|None||";; esac')
    assert main(["resume", str(submitted_run.root)]) == 1
    assert "job 41 of this run waits or runs" in capsys.readouterr().err


def test_cancel_tries_every_number_and_fails_while_one_may_run(submitted_run, fake_slurm, capsys):
    silent(fake_slurm)
    fake_slurm.says(scancel=NO_CONTROLLER)
    assert main(["cancel", str(submitted_run.root)]) == 1
    assert "job 41 may still run" in capsys.readouterr().err
    assert fake_slurm.calls("scancel") == ["scancel 41", "scancel 42"]
    assert submitted_run.cancelled.exists()


def test_cancel_ends_a_job_that_squeue_says_nothing_of(submitted_run, fake_slurm, capsys):
    silent(fake_slurm)
    assert main(["cancel", str(submitted_run.root)]) == 0
    assert capsys.readouterr().out == "cancelled job 41, 42\n"


def test_cancel_of_ended_jobs_says_so(submitted_run, fake_slurm, capsys):
    fake_slurm.says(scancel=NO_SUCH_JOB.replace("Invalid", "Kill job error on job id 41: Invalid"))
    assert main(["cancel", str(submitted_run.root)]) == 0
    assert capsys.readouterr().out == "no job of this run waits or runs\n"


def test_cancel_of_no_run_makes_no_folder(tmp_path, capsys):
    assert main(["cancel", str(tmp_path / "tpyo")]) == 2
    assert "is no run that was submitted" in capsys.readouterr().err
    assert not (tmp_path / "tpyo").exists()


def test_status_says_that_slurm_does_not_answer(submitted_run, fake_slurm):
    silent(fake_slurm)
    assert row(submitted_run)["state"] == "unknown: SLURM does not answer"


def test_a_job_of_another_cluster_is_asked_and_cancelled_there(submitted_run, fake_slurm):
    submitted_run.jobs.write_text("a banner\n42;far\n")
    fake_slurm.says(squeue=f'echo "CLUSTER: far"; {RUNNING}')
    assert submitted_run.job_ids() == ["42;far"]
    assert row(submitted_run)["state"] == "RUNNING"
    assert main(["cancel", str(submitted_run.root)]) == 0
    assert fake_slurm.calls("squeue")[0] == "squeue -M far -h -t all -j 42 -o %T|%r|%N|%S"
    assert fake_slurm.calls("scancel") == ["scancel -M far 42"]
