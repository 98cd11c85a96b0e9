"""Agents and verdicts without SLURM: real processes, a control folder, no cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hope.train import heartbeat
from launch import agent as agents
from launch import hang, job
from launch.folder import RunFolder, first, read_json, write_json

REPOSITORY = Path(__file__).parent.parent.parent
PRELUDE = """
import os, signal, sys, time
from hope.train.heartbeat import Heartbeat
beat = Heartbeat()
{handles}
beat("init")
"""


def agent(
    control: Path, body: str, rank: int = 0, world: int = 1, handles: str = "", **environment: str
) -> subprocess.Popen:
    """An agent around a small program."""
    program = control.parent.parent / f"program{rank}.py"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(PRELUDE.format(handles=handles) + body)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    env = {**os.environ, **{k: str(v) for k, v in place.items()}, "HOPE_CONTROL": str(control), **environment}
    env["PYTHONPATH"] = str(REPOSITORY)
    return subprocess.Popen([sys.executable, "-m", "launch.agent", str(program)], env=env, cwd=REPOSITORY)


def exit_of(control: Path, rank: int = 0) -> dict:
    return read_json(control / "exit" / f"{rank:05d}.json")


@pytest.fixture
def control(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "control" / "7.0"
    folder.mkdir(parents=True)
    write_json(folder / "limits.json", {"init": 60, "first_step": 60, "data": 1.0, "forward": 60, "save": 60})
    return folder


def test_the_exit_code_and_the_place_are_written_down(control):
    assert agent(control, "beat('forward', 3); sys.exit(7)").wait(20) == 7
    found = exit_of(control)
    assert {key: found[key] for key in ("rank", "code", "how", "signalled", "step", "phase")} == {
        "rank": 0, "code": 7, "how": "failed", "signalled": None, "step": 3, "phase": "forward"}  # fmt: skip
    assert read_json(control / "failed")["rank"] == 0


@pytest.mark.parametrize("place", [{}, {"RANK": "3", "WORLD_SIZE": "2"}])
def test_a_rank_of_another_world_does_not_start_and_ends_the_run(control, place):
    """RANK=0 WORLD_SIZE=1 in the shell made every task of a job rank 0 of a world of one, all in one folder."""
    write_json(control.parent.parent / "launch" / "job.json", {"world": 2})
    assert agent(control, "sys.exit(0)", **place).wait(20) == 2
    assert exit_of(control, int(place.get("RANK", 0)))["how"] == "refused"
    verdict = job.classify(control, 2, 0, signalled=False)
    assert verdict.word == "stop"
    assert "but the job has 2 ranks" in verdict.cause
    assert "unset them" in verdict.cause


def test_without_limits_the_defaults_watch_and_it_is_said(control, capfd):
    (control / "limits.json").unlink()
    assert agent(control, "sys.exit(0)").wait(20) == 0
    assert f"no limits.json in {control}: watching with the default limits" in capfd.readouterr().err
    assert agents.limits_of(control)["data"] == 600


def test_torchrun_is_not_told_that_85_is_a_failure(control):
    """It would kill the ranks that still save 30 s later."""
    write_json(control.parent.parent / "launch" / "job.json", {"world": 1})
    assert agent(control, "sys.exit(85)", TORCHELASTIC_RUN_ID="x").wait(20) == 0
    assert exit_of(control)["code"] == 85
    assert agent(control, "sys.exit(2)", TORCHELASTIC_RUN_ID="x").wait(20) == 2


def test_a_fault_in_c_code_leaves_its_stack(control):
    assert agent(control, "def culprit():\n    os.kill(os.getpid(), signal.SIGSEGV)\nculprit()").wait(20) == 139
    assert exit_of(control)["signal"] == "SIGSEGV"
    assert "in culprit" in (control / "stacks" / "rank-00000.txt").read_text()


def test_a_signal_is_passed_on_and_85_is_no_failure(control):
    mark = control.parent.parent / "up"
    handles = f"signal.signal(10, lambda *_: sys.exit(85)); open({str(mark)!r}, 'w')"
    process = agent(control, "while True: time.sleep(0.05)", handles=handles)
    while not mark.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 85
    assert (exit_of(control)["signalled"], exit_of(control)["how"]) == ("USR1", "exit")
    assert not (control / "failed").exists()


def test_a_request_from_before_the_start_reaches_the_trainer_once_it_can_take_it(control):
    (control / "USR1").touch()
    handles = "time.sleep(1); signal.signal(10, lambda *_: sys.exit(85))"  # imports that take their time
    process = agent(control, "while True: time.sleep(0.05)", handles=handles)
    assert process.wait(30) == 85
    assert exit_of(control)["signalled"] == "USR1"


def test_the_others_end_soon_after_a_failure(control):
    waits = agent(control, "beat('forward', 1); time.sleep(600)", rank=1, world=2)
    began = time.monotonic()
    assert agent(control, "sys.exit(3)", rank=0, world=2).wait(20) == 3
    assert waits.wait(20) == 87
    assert time.monotonic() - began < 15
    assert exit_of(control, 1)["how"] == "peer failed"


def test_a_killed_agent_takes_its_trainer_along(control, tmp_path):
    mark = tmp_path / "pid"
    process = agent(control, f"open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    while not (mark.exists() and mark.read_text()):
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{mark.read_text()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{mark.read_text()}").exists()


def test_a_rank_that_sleeps_in_a_phase_is_named_with_its_stack(control):
    """Rank 1 loads data for ever; rank 0 waits for it in the next phase, which has a long limit."""
    slow = agent(control, "def load_data():\n    time.sleep(600)\nbeat('data', 1); beat('data', 2); load_data()", 1, 2)
    other = agent(control, "beat('data', 1); beat('data', 2); beat('forward'); time.sleep(600)", 0, 2)
    assert (slow.wait(30), other.wait(30)) == (86, 86)
    verdict = read_json(control / "culprits.json")
    assert [(c["rank"], c["why"], c["phase"]) for c in verdict["culprits"]] == [(1, "behind the others", "data")]
    assert "in load_data" in (control / "stacks" / "rank-00001.txt").read_text()
    [event] = [json.loads(line) for line in (control.parent.parent / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["limit_s"]) == ("HANG", 1.0)


RECORDS = """
import threading
def record():  # as torch's monitor thread does it, see DumpPipe in ProcessGroupNCCL.hpp
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1" and int(os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"]) > 0
    pipe = os.environ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] + os.environ["RANK"] + ".pipe"
    os.mkfifo(pipe)
    stream = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    beat("forward")
    while not os.read(stream, 128):
        time.sleep(0.05)
    with open(os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] + os.environ["RANK"], "w") as file:
        file.write("all-reduce 7\\n")
threading.Thread(target=record, daemon=True).start()
time.sleep(0.5)
"""


def test_a_hang_names_the_record_of_the_collectives(control, tmp_path):
    folder = tmp_path / "pipes"
    folder.mkdir()
    child = agent(control, RECORDS + "beat('data', 1); beat('data', 2); time.sleep(600)", TMPDIR=str(folder))
    assert child.wait(30) == 86
    assert (control / "nccl/rank_0").read_text() == "all-reduce 7\n"
    assert read_json(control / "culprits.json")["nccl"] == str(control / "nccl")
    assert f" nccl={control / 'nccl'}" in hang.line(read_json(control / "culprits.json"))
    assert job.classify(control, 1, 86, signalled=False).cause == f"hang, collectives in {control / 'nccl'}"
    assert list(folder.iterdir()) == []


def report(rank: int, step: int, beats: int, state: str = "S") -> dict:
    return {"rank": rank, "host": f"n{rank}", "step": step, "beats": beats, "state": state, "phase": "forward",
            "silent_s": 9.0}  # fmt: skip


@pytest.mark.parametrize(
    ("reports", "world", "named"),
    [
        ([report(0, 5, 9), report(1, 5, 8), report(2, 5, 9)], 3, [(1, "behind the others")]),
        ([report(0, 5, 9), report(1, 4, 20)], 2, [(1, "behind the others")]),
        ([report(0, 5, 9), report(1, 5, 9, "T")], 2, [(1, "stopped by a signal")]),
        ([report(0, 5, 9), report(1, 5, 7)], 3, [(2, "no report: its agent or node is dead")]),
        ([report(0, 5, 9), report(1, 5, 9)], 2, []),
        ([], 1, [(0, "no report: its agent or node is dead")]),
    ],
)
def test_who_is_to_blame(reports, world, named):
    verdict = hang.judge(reports, world, {"step": 5, "phase": "forward", "limit_s": 3.0})
    assert [(c["rank"], c["why"]) for c in verdict["culprits"]] == named
    line = hang.line(verdict)
    assert line.startswith("HANG step=5 phase=forward limit=3s")
    assert all(f"rank={rank}" in line for rank, _ in named)
    assert ("no rank of 2 lags" in line) == (named == [])


def test_a_rank_that_has_ended_is_not_taken_for_dead():
    found = {"step": 5, "phase": "exit", "limit_s": 3.0}
    reports = [report(0, 5, 9), report(1, 5, 8)]
    assert [c["rank"] for c in hang.judge(reports, 3, found)["culprits"]] == [2]
    assert [c["rank"] for c in hang.judge(reports, 3, found, frozenset({2}))["culprits"]] == [1]


def ended(control: Path, *codes: int, how: str = "exit", signalled: str | None = None) -> None:
    for rank, code in enumerate(codes):
        word = how if code not in (0, 85) else "exit"
        facts = {"rank": rank, "host": "n1", "code": code, "how": word, "signalled": signalled, "time": 100.0 - rank}
        write_json(control / "exit" / f"{rank:05d}.json", facts)


@pytest.mark.parametrize(
    ("codes", "how", "verdict", "cause"),
    [
        ((0, 0), "exit", "done", "every rank finished"),
        ((85, 85), "exit", "requeue", "saved on signal TERM"),
        ((0, 85), "exit", "requeue", "saved on signal TERM"),
        ((93, 93), "exit", "stop", "the program says: do not restart"),
        ((2, 87), "exit", "stop", "configuration or data error"),
        ((137, 7), "failed", "requeue", "rank 1 on n1: exit code 7"),  # rank 1 was first
        ((0,), "exit", "requeue", "no exit record of 1 ranks (1); the starter returned 143"),
        ((), "exit", "requeue", "no exit record of 2 ranks (0, 1); the starter returned 143"),
    ],
)
def test_verdicts(control, codes, how, verdict, cause):
    ended(control, *codes, how=how, signalled="TERM")
    found = job.classify(control, 2, 143, signalled=False)
    assert (found.word, found.cause) == (verdict, cause)


def test_the_budget_is_spent_without_progress_and_refilled_by_it(tmp_path):
    run = RunFolder(tmp_path / "run")
    write_json(run.job, {"attempts": 3, "world": 1, "limits": {}})

    def attempt(number: int, saves: int | None = None) -> str:
        assert job.begin(run, f"7.{number}", {}) == 0
        if saves is not None:
            folder = run.root / "checkpoints" / f"step_{saves:08d}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").touch()
        ended(run.attempt(f"7.{number}"), 7, how="failed")
        return job.end(run, f"7.{number}", 7, signalled=False, in_slurm=False)

    assert [attempt(0), attempt(1), attempt(2, saves=10), attempt(3), attempt(4)] == ["requeue"] * 5
    assert attempt(5) == "stop"
    assert "3 starts in a row made no checkpoint newer than step 10" in read_json(run.verdict)["cause"]
    assert job.begin(run, "7.6", {}) == job.EXIT_STOP


@pytest.mark.parametrize(("saved", "verdict"), [(4, "cancelled"), (8, "done")])
def test_an_end_on_request_before_the_last_step_is_not_done(tmp_path, saved, verdict):
    run = RunFolder(tmp_path / "run")
    write_json(run.job, {"attempts": 3, "world": 2, "limits": {}, "steps": 8})
    job.begin(run, "7.0", {})
    (run.root / "checkpoints" / f"step_{saved:08d}").mkdir(parents=True)
    (run.root / "checkpoints" / f"step_{saved:08d}" / "manifest.json").touch()
    ended(run.attempt("7.0"), 0, 0)
    assert job.end(run, "7.0", 0, signalled=False, in_slurm=False) == verdict


def test_attempts_that_leave_no_verdict_spend_the_budget_too(tmp_path):
    run = RunFolder(tmp_path / "run")
    write_json(run.job, {"attempts": 2, "world": 1, "limits": {}})
    assert [job.begin(run, f"7.{number}", {}) for number in range(3)] == [0, 0, job.EXIT_STOP]


def test_an_unfinished_checkpoint_is_no_progress(tmp_path):
    run = RunFolder(tmp_path / "run")
    for name, whole in (("step_00000004", True), ("step_00000008", False), ("step_00000009.tmp", True)):
        (run.root / "checkpoints" / name).mkdir(parents=True)
        if whole:
            (run.root / "checkpoints" / name / "manifest.json").touch()
    assert run.saved_step() == 4


def test_only_the_first_writes(tmp_path):
    assert [first(tmp_path / "x", {"n": n}) for n in range(3)] == [True, False, False]
    assert read_json(tmp_path / "x") == {"n": 0}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_heartbeat_is_read_as_written_and_knows_its_limit(tmp_path):
    memory = os.memfd_create("page")
    os.ftruncate(memory, heartbeat.SIZE)
    page = heartbeat.mmap.mmap(memory, heartbeat.SIZE)
    assert heartbeat.read(page).limited_by == "init"
    beat = heartbeat.Heartbeat({heartbeat.HEARTBEAT: str(memory)})
    seen = []
    for phase, step in [("init", None), ("data", 5), ("forward", None), ("data", 6), ("save", None), ("exit", None)]:
        beat(phase, step)
        found = heartbeat.read(page)
        seen.append((found.phase, found.step, found.steps, found.limited_by))
    assert seen == [
        ("init", 0, 0, "init"), ("data", 5, 0, "first_step"), ("forward", 5, 0, "first_step"), ("data", 6, 1, "data"),
        ("save", 6, 1, "save"), ("exit", 6, 1, "save")]  # fmt: skip
    assert found.count == 6
    assert abs(found.time - time.monotonic()) < 5
