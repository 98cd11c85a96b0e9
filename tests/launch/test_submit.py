"""`launch submit` and `resume` with stand-ins for SLURM's commands: what is refused, at no cost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from tiny import config_file

from configs.errors import ConfigError
from configs.schema import load
from launch import profile, script, slurm
from launch.__main__ import main
from launch.folder import RunFolder, write_json

REFUSED = "echo 'sbatch: error: invalid partition specified: nowhere' >&2; exit 1"
PARTITIONS = (
    "echo 'PartitionName=short Default=YES MaxTime=04:00:00'; echo 'PartitionName=long Default=NO MaxTime=2-00:00:00'"
)


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path, monkeypatch)


def submit(folder: Path, *more: str) -> int:
    return main(["submit", config_file(folder), "--profile", "cpu", f"site.shared=[{folder}]", *more])


@pytest.fixture
def run(tmp_path: Path, fake_slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> RunFolder:
    """A run that was submitted as job 77, whose last verdict and budget are there."""
    run = RunFolder(tmp_path / "runs" / "tiny")
    assert submit(tmp_path) == 0
    capsys.readouterr()
    write_json(run.verdict, {"verdict": "requeue", "cause": "a node died"})
    write_json(run.budget, {"step": 7, "left": 2, "open": None})
    return run


def files(run: RunFolder) -> dict[str, bytes]:
    return {str(path.relative_to(run.root)): path.read_bytes() for path in run.root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("refuses", ["--test-only", "--parsable"])
def test_a_refused_submit_changes_nothing(run, fake_slurm, tmp_path, capsys, refuses):
    before = files(run)
    fake_slurm.says(sbatch=f'case "$*" in *{refuses}*) {REFUSED};; *) echo 78;; esac')
    assert submit(tmp_path, "optim.lr=3e-3") == 1
    assert "invalid partition" in capsys.readouterr().err
    assert files(run) == before
    assert run.job_ids() == ["77"]


def test_a_refused_resume_changes_nothing(run, fake_slurm):
    before = files(run)
    fake_slurm.says(sbatch=REFUSED)
    assert main(["resume", str(run.root)]) == 1
    assert files(run) == before


def test_an_accepted_one_is_a_new_start_and_the_earlier_folder_stays(run, fake_slurm, tmp_path):
    fake_slurm.says(sbatch='case "$*" in *--test-only*) ;; *) echo 78;; esac')  # some sites' --test-only says nothing
    assert submit(tmp_path, "optim.lr=3e-3") == 0
    assert (run.job_ids(), run.verdict.exists(), run.budget.exists()) == (["78"], False, False)
    assert (run.root / "launch.1" / "jobs.txt").read_text() == "77\n"
    assert "lr: 0.003" in run.config.read_text()
    assert not run.fresh.exists()


def test_a_submitter_that_was_killed_before_the_swap_has_not_lost_the_job(run, fake_slurm, tmp_path):
    run.launch.rename(run.fresh)
    run.launch.mkdir()
    fake_slurm.says(squeue="echo 'RUNNING|None|node1|now'")
    assert run.job_ids() == ["77"]
    assert submit(tmp_path) == 2


@pytest.mark.parametrize(
    ("says", "number"),
    [
        ("echo 'Welcome to 3 racks'; echo 99", "99"),
        ("echo '99;far'", "99;far"),
        ("echo 4; echo 99; echo bye >&2", "99"),
    ],
)
def test_the_number_is_found_in_what_sbatch_prints(tmp_path, fake_slurm, says, number):
    fake_slurm.says(sbatch=f'case "$*" in *--test-only*) ;; *) {says};; esac')
    assert submit(tmp_path) == 0
    assert RunFolder(tmp_path / "runs" / "tiny").job_ids() == [number]


def test_options_of_the_shell_that_are_dropped_are_named(tmp_path, fake_slurm, monkeypatch, capsys):
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    monkeypatch.setenv("SLURM_CLUSTERS", "far")
    assert submit(tmp_path) == 0
    said = capsys.readouterr().out
    assert "note: SBATCH_ACCOUNT=mine of this shell is not used" in said
    assert "(site.account)" in said
    assert "note: SLURM_CLUSTERS=far of this shell is not used" in said


@pytest.mark.parametrize(
    ("partition", "time", "refused"),
    [("", "05:00:00", "04:00:00"), ("", "04:00:00", None), ("long", "05:00:00", None),
     ("long", "UNLIMITED", "2-00:00:00"), ("short,long", "1-00", None), ("elsewhere", "9-00", None)],
)  # fmt: skip
def test_a_time_above_the_partitions_limit_is_refused(tmp_path, fake_slurm, capsys, partition, time, refused):
    fake_slurm.says(scontrol=f'case "$*" in *partition*) {PARTITIONS};; *) exit 1;; esac')
    code = submit(tmp_path, f"site.partition='{partition}'", f"site.time='{time}'")
    assert code == (2 if refused else 0)
    if refused:
        assert f"{time} is above the {refused} of partition" in capsys.readouterr().err
        assert fake_slurm.calls("sbatch") == []


def test_a_partition_without_a_limit_takes_any_time(tmp_path, fake_slurm):
    fake_slurm.says(scontrol="echo 'PartitionName=all Default=YES MaxTime=UNLIMITED'")
    assert submit(tmp_path, "site.time=UNLIMITED") == 0
    assert "#SBATCH --time=UNLIMITED" in RunFolder(tmp_path / "runs" / "tiny").script.read_text()


@pytest.mark.parametrize(
    ("option", "what"),
    [("--no-requeue", "contradicts site.requeue=requeue"), ("--time=1:00", "site.time"), ("-t 60", "site.time"),
     ("--signal=USR2@9", "launch.checkpoint_s"), ("--output=x", "launch logs")],
)  # fmt: skip
def test_options_that_undo_the_script_are_refused(option, what):
    with pytest.raises(ConfigError) as caught:
        profile.load("h100", [f"sbatch=['{option}']"])
    [(path, problem, fix)] = caught.value.problems
    assert path == "site.sbatch"
    assert what in problem + fix
    if option == "--no-requeue":
        assert profile.load("h100", ["sbatch=[--no-requeue]", "requeue=array"])


@pytest.mark.parametrize("name", ['q"uote', "co:lon"])
def test_names_that_nobody_reads_alike_are_refused(tmp_path, fake_slurm, capsys, name):
    assert submit(tmp_path, f"run.name={json.dumps(name)}", "--dry-run") == 2
    said = capsys.readouterr().err
    assert "run.name" in said
    assert "misreads" in said


def test_neither_is_a_folder_with_them(tmp_path, fake_slurm, capsys):
    folder = json.dumps(str(tmp_path / "back\\slash"))
    assert submit(tmp_path, f"run.dir={folder}", "--dry-run") == 2
    assert "run.dir" in (said := capsys.readouterr().err)
    assert "which sbatch misreads" in said


def test_other_names_are_quoted_for_sbatch():
    quoted = ["/r/plain", '"/r/a b"', "/r/p%%j", '"/r/hash#1"', '''"/r/q'uote"''']
    assert [script.sbatch_quote(f"/r/{name}") for name in ("plain", "a b", "p%j", "hash#1", "q'uote")] == quoted


def checkpoint(folder: Path, path: str, *overrides: str) -> None:
    """What is left of a run with these settings that reached step 4."""
    saved = folder / "runs" / "tiny" / "checkpoints" / "step_00000004"
    config = dataclasses.asdict(load(path, list(overrides)))
    write_json(saved / "manifest.json", {"step": 4, "extra": {"config": config}})


def test_another_configuration_is_refused_before_the_queue(tmp_path, fake_slurm, capsys):
    checkpoint(tmp_path, config_file(tmp_path))
    assert submit(tmp_path, "optim.lr=3e-3", "train.global_batch=16") == 2
    said = capsys.readouterr().err
    assert "optim.lr" in said
    assert "checkpoint 0.01, now 0.003" in said
    assert "train.global_batch" in said
    assert "step 4 in" in said
    assert fake_slurm.calls("sbatch") == []
    words = ("optim.lr=3e-3", "checkpoint.on_change={optim.lr: override}", "log.every=2", "parallel.tensor=2")
    assert submit(tmp_path, *words) == 0


def test_never_resuming_beside_checkpoints_is_refused_before_the_queue(tmp_path, fake_slurm, capsys):
    checkpoint(tmp_path, config_file(tmp_path))
    assert submit(tmp_path, "checkpoint.resume=never") == 2
    assert "which this run would mix with its own" in capsys.readouterr().err


def test_infinite_times():
    assert slurm.seconds("UNLIMITED") == slurm.seconds("infinite") == float("inf")


def test_an_sbatch_that_does_not_answer_may_have_queued_the_job(run, fake_slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm.call, "__kwdefaults__", {"timeout": 1, "cwd": None})
    fake_slurm.says(sbatch='case "$*" in *--test-only*) ;; *) exec sleep 5;; esac')
    with pytest.raises(slurm.SlurmError, match="may be queued all the same"):
        slurm.submit(run.script, tmp_path)
