"""`launch local`: signals reach every rank, nothing outlives it, and its exit code is the run's own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import config_file

from launch.__main__ import main
from launch.folder import RunFolder, read_json, write_json
from launch.runs import records
from parallel.start.holders import kernel
from parallel.start.holders import started as started_at
from parallel.start.launcher import free_port

REPOSITORY = Path(__file__).parent.parent.parent
STAND_IN = Path(__file__).parent / "stand_in.py"
DRIVER = """
import sys
from launch.local import local_request, run_here
from launch.plan import plan
ended = run_here(plan(local_request(sys.argv[1], [], 2), ask_slurm=False), sys.argv[2])
sys.exit(getattr(ended, "code", ended))
"""


def wait_for(what: str, condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Started:
    """A run of two stand-ins under `launch local`, which has reached its loop."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.run = RunFolder(folder / "runs" / "tiny")
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
        self.process = subprocess.Popen([sys.executable, "-c", DRIVER, config_file(folder), str(STAND_IN)], env=env,
                                        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        start_new_session=True)  # fmt: skip
        pids = [self.run.root / f"pid.{rank}" for rank in (0, 1)]
        wait_for("both ranks", lambda: all(path.exists() and path.read_text().endswith("\n") for path in pids))
        self.trainers = [int(path.read_text()) for path in pids]

    def saved(self) -> list[str]:
        return [path.read_text().strip() for path in sorted(self.run.root.glob("saved.*"))]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    runs: list[Started] = []

    def start(**environment: str) -> Started:
        runs.append(Started(tmp_path, environment))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()
        run.process.stdout.close()
        for pid in run.trainers:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("name", "code"), [("INT", 0), ("TERM", 85), ("USR1", 85)])
def test_a_signal_reaches_every_rank_and_the_code_is_the_runs_own(started, name, code):
    run = started()
    run.process.send_signal(signal.Signals[f"SIG{name}"])
    assert run.process.wait(20) == code
    assert run.saved() == [name, name]
    assert all(gone(pid) for pid in run.trainers)


def test_cancel_ends_a_local_run_for_good(started, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # no SLURM: no job of it, nothing to ask
    run = started()
    folder = str(run.run.root)
    facts = read_json(run.run.here)
    write_json(run.run.here, {**facts, "kernel": "another", "host": "elsewhere"})
    assert main(["cancel", folder]) == 1
    assert f"it runs on elsewhere as process {run.process.pid}" in capsys.readouterr().err
    write_json(run.run.here, {**facts, "started": facts["started"] + 1})
    assert main(["cancel", folder]) == 0
    assert "no job of this run waits or runs" in capsys.readouterr().out, "that process is another one by now"
    write_json(run.run.here, {**facts, "kernel": "another"})
    assert main(["cancel", folder]) == 0
    assert "no job of this run waits or runs" in capsys.readouterr().out, "this machine was started anew since"
    write_json(run.run.here, facts)
    assert main(["cancel", folder]) == 0
    assert f"process {run.process.pid} was asked to save and end" in capsys.readouterr().out
    assert run.process.wait(20) == 0
    assert run.saved() == ["INT", "INT"]
    assert read_json(run.run.verdict)["verdict"] == "cancelled"
    assert not run.run.here.exists()


@pytest.mark.parametrize("name", ["control/local.json", "owner.json"])
def test_a_second_start_is_refused_and_leaves_the_first_as_it_is(tmp_path, name, capsys):
    """Also beside a run that torchrun started, of which only owner.json tells."""
    path, folder = config_file(tmp_path), tmp_path / "runs/tiny"
    facts = {"host": os.uname().nodename, "kernel": kernel(), "pid": os.getpid(), "started": started_at(os.getpid())}
    write_json(folder / name, facts)
    write_json(folder / "launch/job.json", {})
    before = sorted(folder.rglob("*"))
    assert main(["local", path]) == 2
    error = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert f"{folder} is trained already: host {os.uname().nodename}, pid {os.getpid()}" in error
    assert sorted(folder.rglob("*")) == before


def test_ranks_save_and_end_when_launch_local_is_killed(started):
    run = started()
    run.process.kill()
    wait_for("the ranks' end", lambda: all(gone(pid) for pid in run.trainers), 20)
    assert run.saved() == ["TERM", "TERM"]


def test_a_killed_agent_is_a_failed_rank(started):
    """Its trainer dies with it; the other one must not train on alone."""
    run = started()
    agent = int(Path(f"/proc/{run.trainers[1]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(agent, signal.SIGKILL)
    wait_for("the other's end", lambda: gone(run.trainers[0]), 20)
    [attempt] = run.run.control.glob("local*.0")
    assert read_json(attempt / "failed")["rank"] == 1


def test_what_ranks_print_is_in_the_log_and_on_the_terminal(started):
    run = started()
    run.process.send_signal(signal.SIGTERM)
    shown = run.process.communicate(timeout=20)[0].decode()
    [log] = run.run.logs.glob("local*.out")
    assert "rank 0 trains" in shown
    assert log.read_text() == shown
    assert "REQUEUE saved on signal TERM" in shown


def test_the_shells_own_ranks_do_not_reach_the_run(started):
    run = started(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="x", MASTER_PORT="1", OMPI_COMM_WORLD_RANK="0")
    names = [
        word.split(b"=")[0].decode() for word in Path(f"/proc/{run.trainers[1]}/environ").read_bytes().split(b"\0")
    ]
    assert not [name for name in names if name.startswith("OMPI")]
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(20) == 0


def test_the_file_stop_ends_a_real_run_with_its_own_code(tmp_path):
    words = [sys.executable, "-m", "launch", "local", config_file(tmp_path), "train.steps=100000", "checkpoint.every=0"]
    process = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    folder = tmp_path / "runs" / "tiny"
    try:
        wait_for("a step", lambda: len(records(folder)) > 2, 120)
        (folder / "STOP").touch()
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert read_json(folder / "control" / "verdict.json")["verdict"] == "cancelled"


def test_a_data_error_ends_it_with_2(tmp_path):
    path = config_file(tmp_path)
    bad = tmp_path / "stand_in.py"
    bad.write_text("import sys; sys.exit(2)")
    done = subprocess.run([sys.executable, "-c", DRIVER, path, str(bad)], cwd=REPOSITORY, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY)})  # fmt: skip
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("name", "save_s"), [("TERM", 0), pytest.param("INT", 33, marks=pytest.mark.slow)], ids=["TERM", "INT-33s"]
)
def test_under_make_trains_torchrun_every_rank_saves(tmp_path, name, save_s):
    """Also when a save takes more than the 30 seconds that torchrun gives by itself."""
    recipe = next(line for line in (REPOSITORY / "Makefile").read_text().splitlines() if "/torchrun" in line)
    given = dict(word.split("=") for word in recipe.split() if re.fullmatch(r"[A-Z_]+=\d+", word))
    env = {**os.environ, **given, "PYTHONPATH": str(REPOSITORY), "HOPE_RUN": str(tmp_path), "SAVE_S": str(save_s)}
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    process = subprocess.Popen([*words, str(STAND_IN)], env=env, start_new_session=True)
    try:
        wait_for("both ranks", lambda: len(list(tmp_path.glob("pid.*"))) == 2)
        time.sleep(1)
        process.send_signal(signal.Signals[f"SIG{name}"])
        process.wait(60)
    finally:
        process.kill()
    assert [path.read_text() for path in sorted(tmp_path.glob("saved.*"))] == [f"{name}\n"] * 2


def test_a_verdict_without_a_checkpoint_is_a_record(tmp_path):
    (tmp_path / "verdicts.jsonl").write_text('{"verdict": "requeue", "step": -1}\n{"verdict": "requeue", "step": -2}\n')
    assert records(tmp_path, "verdicts.jsonl") == [{"verdict": "requeue", "step": -1}]
