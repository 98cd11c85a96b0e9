"""Two runs never share a folder, nor a port: whoever is second is told who is first."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from multirank import run_ranks
from test_training_run import metrics, run
from tiny import config_file

import pretrain_hope
from parallel.layout.topology import ParallelConfig
from parallel.start import groups, owner
from parallel.start.errors import LaunchError, NotNow
from parallel.start.owner import NAME, hold

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 40
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.05)


def plain_starts(path: str, folder: Path) -> int:
    """Of two processes without a launcher the second begins when the first is in its third step, which waits for it."""
    second = os.environ["RANK"] == "1"
    for name in LAUNCHER:
        del os.environ[name]
    original = pretrain_hope.Run._one_step

    def one_step(self, log, last):
        if self.step == 2 and not second:
            (folder / "in_step_3").touch()
            wait_for(folder / "second_is_over")
        original(self, log, last)

    pretrain_hope.Run._one_step = one_step
    if not second:
        return run(path)
    wait_for(folder / "in_step_3")
    try:
        return run(path)
    finally:
        (folder / "second_is_over").touch()


def test_the_second_of_two_plain_starts_is_refused_and_writes_nothing(tmp_path, capfd):
    assert run_ranks(plain_starts, 2, config_file(tmp_path), tmp_path, timeout=90) == [0, 2]
    assert [record["step"] for record in metrics(tmp_path)] == list(range(9))
    error = capfd.readouterr().err
    assert f"runs/tiny is in use by host {os.uname().nodename}, pid " in error
    assert "take another run.name" in error
    assert not (tmp_path / "runs/tiny" / NAME).exists()
    assert not (tmp_path / "runs/tiny/metrics.jsonl.1").exists()


def steps_of_one_job(folder: Path) -> str:
    """Four processes: two runs of two ranks at one port. What this one summed, or what it was told."""
    number = int(os.environ["RANK"])
    step, rank = divmod(number, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", SLURM_JOB_ID="7", SLURM_STEP_ID=str(step))
    if number == 2:
        wait_for(folder / "listens")
    try:
        with groups.start(ParallelConfig(), timeout_s=30, who={"folder": f"runs/{step}"}):
            (folder / "listens").touch()
            total = torch.tensor(10.0**step)
            dist.all_reduce(total)
            if step == 0:
                wait_for(folder / "refused")
            return str(total.item())
    except (LaunchError, RuntimeError) as error:
        if number == 2:
            (folder / "refused").touch()
        return f"{type(error).__name__}: {error}"


def test_two_steps_of_one_job_at_one_port_refuse_each_other_by_name(tmp_path):
    first, also_first, no_port, stranger = run_ranks(steps_of_one_job, 4, tmp_path, timeout=120)
    assert (first, also_first) == ("2.0", "2.0")
    assert no_port.startswith("NotNow: rank 0 cannot listen at 127.0.0.1:")
    assert stranger.startswith("LaunchError: two runs meet at ")
    assert "rank 1: job 7, step 1, restart 0, folder runs/1, world 2" in stranger
    assert "rank 0: job 7, step 0, restart 0, folder runs/0, world 2" in stranger
    assert "MASTER_PORT" in stranger


def of_another_world() -> str:
    """Rank 1 thinks that it is one of three."""
    if os.environ["RANK"] == "1":
        os.environ["WORLD_SIZE"] = "3"
    try:
        with groups.start(ParallelConfig(), timeout_s=5):
            return "started"
    except (LaunchError, RuntimeError) as error:
        return str(error)


def test_ranks_of_other_worlds_do_not_join(tmp_path):
    stranger = run_ranks(of_another_world, 2, timeout=120)[1]
    assert "world 3" in stranger
    assert "world 2" in stranger


def held_by(folder: Path, age_s: float = 0.0, **facts) -> None:
    """A run's folder with the file of another holder, whose last heartbeat is `age_s` old."""
    folder.mkdir(exist_ok=True)
    place = {"host": "elsewhere", "pid": 1, "started": 1, "kernel": "another", "nonce": "theirs"}
    path = folder / NAME
    path.write_text(json.dumps({**place, "job": "-", "step": "-", "restart": "0", **facts}))
    os.utime(path, (time.time() - age_s,) * 2)


def own(folder: Path) -> dict:
    with hold(folder):
        return owner.read(folder / NAME)


def child_that_holds(folder: Path) -> int:
    """Pid of a process that holds the folder until it is killed."""
    pid = os.fork()
    if pid == 0:
        with hold(folder):
            time.sleep(60)
        os._exit(1)
    wait_for(folder / NAME)
    return pid


def test_a_living_process_is_named_and_a_killed_one_is_replaced_at_once(tmp_path):
    pid = child_that_holds(tmp_path)
    try:
        with pytest.raises(LaunchError, match=f"is in use by host .*, pid {pid}, "):
            own(tmp_path)
        os.kill(pid, signal.SIGKILL)  # and not waited for: a zombie still has its number
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert own(tmp_path)["pid"] == os.getpid()
    finally:
        os.waitpid(pid, 0)
    assert os.listdir(tmp_path) == []


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path):
    mine = own(tmp_path)
    held_by(tmp_path, kernel=mine["kernel"], pid=os.getpid(), started=mine["started"] - 1)
    assert own(tmp_path)["nonce"] != "theirs"


def test_a_holder_elsewhere_is_waited_for_until_it_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "STALE_S", 3.0)
    held_by(tmp_path, age_s=1.0)
    waited: list[int] = []
    with hold(tmp_path, lambda: waited.append(1)):
        assert 1 <= len(waited) <= 3


def test_a_holder_elsewhere_that_beats_is_alive(tmp_path):
    held_by(tmp_path, age_s=100.0)
    threading.Timer(0.5, lambda: os.utime(tmp_path / NAME)).start()
    with pytest.raises(LaunchError, match="in use by host elsewhere, pid 1"):
        own(tmp_path)
    assert owner.read(tmp_path / NAME)["nonce"] == "theirs"


def slurm_says(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A `squeue` that does this, and this process in job 8."""
    (folder / "bin").mkdir()
    (folder / "bin/squeue").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin/squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")


@pytest.mark.parametrize(
    ("job", "restart", "script"),
    [
        ("7", "0", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"),
        ("7", "0", 'test "$3" = 7 || echo RUNNING'),  # nothing: it is over
        ("7", "0", "echo PENDING"),  # requeued, not started again yet
        ("8", "1", "echo RUNNING"),  # this job, before it was requeued
    ],
)
def test_a_holder_whose_job_has_ended_is_replaced_at_once(tmp_path, monkeypatch, job, restart, script):
    slurm_says(tmp_path, monkeypatch, script)
    held_by(tmp_path / "run", job=job, restart=restart)
    began = time.monotonic()
    assert own(tmp_path / "run")["job"] == "8"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("job", "script"), [("7", "echo SUSPENDED"), ("8", "exit 1")])
def test_a_suspended_job_or_another_step_of_this_one_is_alive(tmp_path, monkeypatch, job, script):
    slurm_says(tmp_path, monkeypatch, script)
    held_by(tmp_path / "run", age_s=0.0 if job == "8" else 9999.0, job=job, restart="2", step="1")
    if job == "8":
        threading.Timer(1.5, lambda: os.utime(tmp_path / "run" / NAME)).start()
    with pytest.raises(LaunchError, match=f"job {job}, step 1, restart 2"):
        own(tmp_path / "run")


def test_a_holder_that_was_stopped_too_long_finds_out_and_leaves_the_file_of_the_other(tmp_path):
    with hold(tmp_path) as holder:
        holder.beat()
        holder.check()
        (tmp_path / NAME).unlink()
        holder.beat()  # somebody lost patience and removed it
        assert owner.read(tmp_path / NAME)["pid"] == os.getpid()
        held_by(tmp_path)
        holder.beat()
        with pytest.raises(LaunchError, match="was taken over by host elsewhere"):
            holder.check()
    assert owner.read(tmp_path / NAME)["nonce"] == "theirs"


def test_who_judged_late_does_not_remove_the_file_of_who_took_over(tmp_path):
    held_by(tmp_path, nonce="new")
    owner._remove(tmp_path / NAME, {"nonce": "dead"})
    assert owner.read(tmp_path / NAME)["nonce"] == "new"
    assert os.listdir(tmp_path) == [NAME]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotNow, match=r"file/run: the run's folder cannot be written: .*; see run\.dir"):
        own(tmp_path / "file" / "run")


def taken(path: str) -> int:
    """A run whose folder somebody takes over in step 3."""
    original = pretrain_hope.Run._one_step
    owner.BEAT_S = 0.05

    def one_step(self, log, last):
        if self.step == 2:
            held_by(self.folder)
            time.sleep(1.0)
        original(self, log, last)

    pretrain_hope.Run._one_step = one_step
    return run(path, "checkpoint.every=1")


def test_a_run_that_lost_its_folder_ends_without_saving(tmp_path, capfd):
    assert run_ranks(taken, 1, config_file(tmp_path), timeout=120) == [2]
    assert "was taken over by host elsewhere" in capfd.readouterr().err
    assert not (tmp_path / "runs/tiny/checkpoints/step_00000003").exists()
