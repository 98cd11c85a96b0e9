"""What happens to a job on a real SLURM: signals, failures, chains. The payload is a stand-in with the same contract.

The jobs are independent and most of their time is SLURM's pause before a requeued job (6 s), so all are queued at the
start of the module, on node1 to node3; the preemption has node4 to itself.
"""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from launch import slurm
from launch.__main__ import main
from launch.folder import read_json
from launch.runs import records
from launch.status import cancel, row

pytestmark = pytest.mark.slurm

THREE = "site.exclude=[node4]"
ENDLESS = {"steps": 10**6, "step_s": 0.1}


@pytest.fixture(scope="module")
def jobs(submitted: Any, real: Any) -> dict[str, Any]:
    """All jobs of this module; the real one is for test_training.py and runs meanwhile."""
    limits = "launch.limits={init: 60, first_step: 8, data: 8, forward: 8, backward: 8, optimizer: 60}"
    fails_once = {"fail": {"rank": 0, "step": 3, "code": 7}}
    signalled = {"first": 10**6, "steps": 200, "step_s": 0.05}
    array = ("site.requeue=array", "site.chain=4")
    wanted: dict[str, tuple[tuple[str, ...], dict]] = {
        "usr1": ((), signalled),
        "killed": ((), {"fail": {"rank": 3, "step": 5, "code": "kill"}}),
        "fails": ((), {"fail": {"rank": 1, "step": 1, "code": 7}, "attempts": [*range(9)]}),
        "frozen": ((limits,), {"fail": {"rank": 2, "step": 4, "code": "freeze"}}),
        "array": (array, fails_once),
        "single": (("site.requeue=singleton",), fails_once),
        "over": ((), {"steps": 2, "exit": 93}),
        "ends": ((), ENDLESS),
        "scancel": ((), ENDLESS),
    }
    started = {name: submitted(name, THREE, *words, behaviour=does) for name, (words, does) in wanted.items()}
    alone = submitted("preempted", "site.sbatch=[--nodelist=node4]", nodes=1, behaviour=signalled)
    return {**started, "preempted": alone}


def test_usr1_saves_all_ranks_at_one_step_and_the_job_comes_back(jobs):
    job = jobs["usr1"]
    job.wait_for("some steps", lambda: len(job.steps(3)) > 3)
    job.cluster.run("scancel", "--signal=USR1", "--batch", job.job)
    job.wait("COMPLETED")
    saved = [[line for line in job.steps(rank) if "saved" in line] for rank in range(4)]
    assert saved[0]
    assert saved == [saved[0]] * 4
    assert job.words() == ["requeue", "done"]
    assert job.verdicts()[0]["cause"] == "saved on signal USR1"
    assert job.verdicts()[0]["step"] == int(saved[0][0].split()[1])
    made = [line for line in job.steps(0) if "saved" not in line]
    assert made == [str(n) for n in range(1, max(200, int(saved[0][0].split()[1])) + 1)]  # none twice, none left out
    assert job.cluster.restarts(job.job) == 1


def test_a_preempted_job_is_requeued_not_completed(jobs, cluster):
    job = jobs["preempted"]
    job.wait_for("some steps", lambda: len(job.steps(1)) > 3)
    urgent = cluster.run("sbatch", "--parsable", "-p", "urgent", "--nodelist=node4", "--exclusive", "-o", "/dev/null",
                         "--wrap", "sleep 3").strip()  # fmt: skip
    cluster.wait(urgent, "COMPLETED")
    job.wait("COMPLETED")
    assert job.words() == ["requeue", "done"]
    assert job.verdicts()[0]["cause"] == "saved on signal TERM"
    made = [line for line in job.steps(0) if "saved" not in line]
    assert made == [str(n) for n in range(1, len(made) + 1)]


def test_a_killed_task_ends_the_job_within_ten_seconds_and_the_verdict_names_it(jobs):
    job = jobs["killed"]
    job.wait("COMPLETED")
    first = job.verdicts()[0]
    assert (first["verdict"], first["first"]["rank"], first["first"]["signal"]) == ("requeue", 3, "SIGKILL")
    assert "rank 3 on node" in first["cause"]
    exits = job.exits(first["attempt"])
    assert [e["how"] for e in exits] == ["peer failed"] * 3 + ["failed"]
    assert first["time"] - exits[3]["time"] < 10
    assert job.words() == ["requeue", "done"]


def test_a_job_that_fails_at_once_three_times_is_given_up(jobs):
    job = jobs["fails"]
    job.wait("FAILED")
    assert job.words() == ["requeue", "requeue", "stop"]
    assert "rank 1 on node" in job.verdicts()[-1]["cause"]
    assert "3 starts in a row made no checkpoint newer than step -1" in job.verdicts()[-1]["cause"]
    assert job.cluster.restarts(job.job) == 2


def test_a_frozen_rank_is_named_with_its_stack_and_the_job_recovers(jobs):
    job = jobs["frozen"]
    job.wait("COMPLETED")
    first = job.verdicts()[0]
    control = job.run.attempt(first["attempt"])
    assert (first["verdict"], first["cause"], first["first"]["rank"]) == ("requeue", "hang", 2)
    assert first["first"]["why"] == "stopped by a signal"
    assert first["first"]["phase"] == "data"
    assert first["first"]["host"] != "?"
    found = read_json(control / "hang.json")
    assert found["limit_s"] == 8
    reports = [read_json(control / "reports" / f"{rank:05d}.json") for rank in range(4)]
    assert reports[2]["silent_s"] < 8 + 12  # limit, poll, and the time to look
    assert [r["state"] == "T" for r in reports] == [False, False, True, False]
    for rank, line in enumerate(["any_rank", "any_rank", "os.kill", "any_rank"]):
        stack = (control / "stacks" / f"rank-{rank:05d}.txt").read_text()
        assert "payload.py" in stack
        if rank != 2:
            assert line in stack
    assert [e["event"] for e in records(job.run.root, "events.jsonl")] == ["HANG"]
    assert "HANG step=4" in job.log()
    assert job.words() == ["requeue", "done"]


def test_an_array_goes_on_after_a_failure_and_ends_when_done(jobs):
    job = jobs["array"]
    job.wait_for("the array's end", lambda: not slurm.live(job.job), 90)
    assert job.words() == ["requeue", "done"]
    states = job.cluster.run("squeue", "-h", "-r", "-t", "all", "-j", job.job, "-o", "%K %T").split("\n")
    assert {"1 FAILED", "2 COMPLETED"} <= set(states)
    assert {"RUNNING", "PENDING"}.isdisjoint(state.split()[-1] for state in states if state)


def test_a_singleton_chain_submits_its_successor_and_cancels_the_last(jobs):
    job = jobs["single"]
    job.wait_for("the verdict", lambda: "done" in job.words(), 90)
    numbers = job.run.job_ids()
    assert job.words() == ["requeue", "done"]
    assert len(numbers) == 3
    states = [job.cluster.wait(n, "FAILED", "COMPLETED", "CANCELLED", seconds=20) for n in numbers]
    assert states == ["FAILED", "COMPLETED", "CANCELLED"]


def test_exit_93_stops_the_chain(jobs):
    job = jobs["over"]
    job.wait("FAILED")
    assert job.words() == ["stop"]
    assert job.verdicts()[0]["cause"] == "the program says: do not restart"
    assert job.cluster.restarts(job.job) == 0


@pytest.mark.parametrize("how", ["ends", "scancel"])
def test_a_cancelled_job_stays_cancelled(jobs, how):
    """By `launch cancel`, and by plain scancel: the trainers save on its TERM and leave with 85, and yet no requeue."""
    job = jobs[how]
    job.wait_for("some steps", lambda: len(job.steps(3)) > 3)
    assert row(job.run)["state"].startswith("RUNNING")
    if how == "ends":
        assert cancel(job.run) == f"cancelled job {job.job}"
    else:
        job.cluster.run("scancel", job.job)
    job.wait("CANCELLED")
    time.sleep(3)
    assert job.cluster.state(job.job) == "CANCELLED"
    assert job.cluster.restarts(job.job) == 0


def test_a_cancelled_run_is_resumed_on_demand(jobs, capsys):
    job = jobs["ends"]
    job.wait("CANCELLED")
    saved = job.run.saved_step()
    assert saved > 3
    assert main(["resume", str(job.run.root)]) == 0
    number = capsys.readouterr().out.split()[-1]
    assert number == job.run.job_ids()[-1] != job.job
    job.wait_for("a step more", lambda: job.steps(0)[-1].isdigit() and int(job.steps(0)[-1]) > saved + 2)
    assert main(["resume", str(job.run.root)]) == 1
    assert f"job {number} of this run waits or runs" in capsys.readouterr().err
    assert main(["logs", str(job.run.root)]) == 0
    assert f"resumes from step {saved}" in capsys.readouterr().out
    assert main(["logs", str(job.run.root), "--rank", "3"]) == 0
    assert "rank 3 of 4 on node" in capsys.readouterr().out
    assert main(["cancel", str(job.run.root)]) == 0
    job.cluster.wait(number, "CANCELLED")


def test_no_process_is_left_behind(jobs):
    for job in jobs.values():
        job.wait_for("its end", lambda job=job: not slurm.live(job.job), 90)
    left = [p for p in os.popen("ps -eo args").read().splitlines() if "payload.py" in p and "ps -eo" not in p]
    assert left == []
