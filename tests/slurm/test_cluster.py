"""The long ones, `make slurm-test`: power failure, a real time limit, every starter, preflight, sweeps, a real hang."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import config_file

from launch.__main__ import main
from launch.folder import RunFolder, read_json
from launch.runs import records
from launch.sweep import verdict

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parent.parent.parent
SHORT = ("parallel.tensor=2", "train.steps=6", "train.eval_every=0")
# of width 16 with two heads, a gate bias's gradient (a sum that cancels) is 1.1e-5 off by rounding alone
ROUNDED_WELL = ("model.layers=4", "model.heads=4", "model.width=32")


def losses(folder: Path) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(folder)]


def test_a_node_loses_power_and_the_job_comes_back(submitted):
    job = submitted("power", "site.sbatch=['--nodelist=node[3-4]']", behaviour={"first": 10**6, "steps": 100})
    job.wait_for("some steps", lambda: len(job.steps(3)) > 3)
    job.cluster.power_off("node4")
    try:
        job.wait("PENDING", seconds=60)
        assert job.cluster.restarts(job.job) == 1
    finally:
        job.cluster.power_on("node4")
    job.wait("COMPLETED", seconds=120)
    assert job.words() == ["requeue", "done"]
    assert "without a verdict" in job.verdicts()[0]["cause"] or "rank" in job.verdicts()[0]["cause"]


def test_the_time_limit_is_reached_and_the_job_goes_on(submitted):
    """USR1 comes at least checkpoint_s + margin_s = 10 s, at most a minute more, before the limit of two minutes."""
    job = submitted("limit", "site.time=00:02:00", behaviour={"first": 10**6, "steps": 100})
    job.wait_for("the verdict", lambda: "done" in job.words(), 300)
    assert job.words() == ["requeue", "done"]
    assert job.verdicts()[0]["cause"] == "saved on signal USR1"
    job.wait("COMPLETED", seconds=20)


@pytest.mark.parametrize("requeue", ["array", "requeue"])
def test_a_run_without_gpus_asks_for_fake_ones_too(submitted, requeue):
    """GPU requests are scheduled, and every task sees the devices of its node."""
    job = submitted(
        f"gpus-{requeue}", "site.gpus_per_node=2", "site.tasks_per_node=0", "site.gpu_memory_gb=0",
        f"site.requeue={requeue}", behaviour={"steps": 8},
    )  # fmt: skip
    job.wait_for("the verdict", lambda: job.words() == ["done"], 60)
    assert "CUDA_VISIBLE_DEVICES=0,1" in (job.run.root / "devices").read_text()


def test_all_starters_give_the_same_losses(submitted, tmp_path):
    jobs = {name: submitted(name, *SHORT, f"site.starter={name}") for name in ("srun", "torchrun", "c10d")}
    for job in jobs.values():
        job.wait("COMPLETED", seconds=240)
    path = config_file(tmp_path)
    words = [sys.executable, "-m", "launch", "local", path, "--processes=4", *SHORT]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    here = losses(tmp_path / "runs" / "tiny")
    assert len(here) == 7
    for name, job in jobs.items():
        assert losses(job.run.root) == here, name


@pytest.mark.parametrize("name", ["INT", "TERM", "USR1"])
@pytest.mark.parametrize("starter", ["srun", "torchrun", "c10d"])
def test_every_signal_under_every_starter(submitted, starter, name):
    """To the tasks, as `scancel --signal` and preemption send it. Rank 0 leaves 4 s after the others."""
    behaviour = {"first": 10**6, "steps": 60, "step_s": 0.05, "lingers_s": 4}
    job = submitted(f"{starter}-{name}", f"site.starter={starter}", behaviour=behaviour)
    job.wait_for("some steps", lambda: len(job.steps(3)) > 3)
    job.cluster.run("scancel", f"--signal={name}", job.job)
    job.wait_for("the verdict", lambda: job.words()[-1:] in (["done"], ["cancelled"]), 90)
    assert [job.steps(rank).count("left") for rank in range(4)] == [1, 1, 1, 1], job.log()
    assert {e["signalled"] for e in job.exits(f"{job.job}.0")} == {name}
    if name == "INT":
        assert job.words() == ["cancelled"]
        assert job.verdicts()[0]["cause"].startswith("ended on request at step")
    else:
        assert job.words() == ["requeue", "done"]
        assert job.verdicts()[0]["cause"] == f"saved on signal {name}"


@pytest.mark.parametrize("starter", ["torchrun", "c10d"])
def test_a_save_of_more_than_thirty_seconds_is_finished_under_torchrun(submitted, starter):
    """torchrun kills its workers 30 s after the first has left with anything but 0."""
    behaviour = {"first": 10**6, "steps": 60, "step_s": 0.05, "lingers_s": 40}
    job = submitted(f"long-{starter}", f"site.starter={starter}", nodes=1, behaviour=behaviour)
    job.wait_for("some steps", lambda: len(job.steps(1)) > 3)
    job.cluster.run("scancel", "--signal=USR1", "--batch", job.job)
    job.wait_for("the verdict", lambda: job.words(), 90)
    assert job.verdicts()[0]["cause"] == "saved on signal USR1"
    assert [job.steps(rank).count("left") for rank in range(2)] == [1, 1]


@pytest.mark.parametrize("name", ["a b", "q'uote", "p%j", "hash#1"])
def test_odd_names_keep_their_log(submitted, name):
    job = submitted(f'"{name}"', behaviour={"steps": 8}, nodes=1)
    job.wait("COMPLETED")
    assert job.run.root.name == name
    assert "every rank finished" in (job.run.logs / f"{job.job}.out").read_text()


@pytest.mark.parametrize("export", ["NONE", "A=b"])
def test_sbatch_export_starts_the_ranks_all_the_same(submitted, export):
    job = submitted(f"export-{export[0]}", f"site.sbatch=['--export={export}']", behaviour={"steps": 8})
    job.wait("COMPLETED", seconds=60)
    assert job.words() == ["done"]


def test_the_shells_own_ranks_do_not_reach_the_tasks(submitted, monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "PMI_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    job = submitted("foreign", behaviour={"steps": 8})
    job.wait("COMPLETED", seconds=60)
    assert [e["rank"] for e in job.exits(f"{job.job}.0")] == [0, 1, 2, 3]


def test_a_controller_that_does_not_answer_is_not_taken_for_an_ended_job(submitted, capsys):
    job = submitted("mute", behaviour={"steps": 10**6})
    job.wait_for("some steps", lambda: len(job.steps(3)) > 3)
    controller = job.cluster.daemons["slurmctld"]
    controller.send_signal(signal.SIGSTOP)
    try:
        assert main(["resume", str(job.run.root)]) == 1
        assert f"SLURM does not say whether job {job.job} is over" in capsys.readouterr().err
        assert main(["cancel", str(job.run.root)]) == 1
        assert f"job {job.job} may still run" in capsys.readouterr().err
    finally:
        controller.send_signal(signal.SIGCONT)
    assert main(["cancel", str(job.run.root)]) == 0
    job.wait("CANCELLED")


def test_a_line_of_the_site_that_fails_is_named_in_the_verdict(submitted):
    job = submitted("unready", "site.setup=['source nowhere.sh']", behaviour={"steps": 8})
    job.wait("FAILED", seconds=60)
    assert job.words() == ["stop"]
    assert job.verdicts()[0]["cause"] == "site.setup: source nowhere.sh ended with 1"


@pytest.mark.parametrize("starter", ["torchrun", "c10d"])
def test_usr1_under_torchrun_saves_and_requeues(submitted, starter):
    job = submitted(f"usr1-{starter}", "parallel.tensor=2", "train.steps=80", f"site.starter={starter}")
    job.wait_for("the first step", lambda: len(records(job.run.root)) > 1, 180)
    job.cluster.run("scancel", "--signal=USR1", "--batch", job.job)
    job.wait("COMPLETED", seconds=300)
    assert job.words() == ["requeue", "done"]
    assert job.verdicts()[0]["cause"] == "saved on signal USR1"
    assert {e["code"] for e in job.exits(f"{job.job}.0")} == {85}


def test_a_frozen_rank_of_a_real_run_is_named_and_the_run_recovers_bit_equal(submitted, tmp_path):
    limits = "launch.limits={init: 120, first_step: 60, data: 15, forward: 15, backward: 15, optimizer: 15}"
    more = ("parallel.tensor=2", "train.steps=60", "checkpoint.every=10", "train.eval_every=0")
    job = submitted("hang", *more, limits)
    job.wait_for("step 12", lambda: len(records(job.run.root)) > 13, 180)
    attempt = f"{job.job}.0"
    program = str(job.run.code / "pretrain_hope.py")
    args = {int(p.name): (p / "cmdline").read_bytes().split(b"\0") for p in Path("/proc").glob("[0-9]*") if p.is_dir()}
    trainers = [pid for pid, words in args.items() if program.encode() in words and b"launch.agent" not in words]
    victim = next(pid for pid in trainers if _variable(pid, "SLURM_PROCID") == "3")
    os.kill(victim, signal.SIGSTOP)
    job.wait("COMPLETED", seconds=300)
    assert job.words() == ["requeue", "done"]
    culprit = job.verdicts()[0]["first"]
    assert (culprit["rank"], culprit["why"]) == (3, "stopped by a signal")
    stacks = job.run.attempt(attempt) / "stacks"
    assert all("pretrain_hope.py" in (stacks / f"rank-{rank:05d}.txt").read_text() for rank in range(4))
    assert read_json(job.run.attempt(attempt) / "hang.json")["limit_s"] == 15
    whole = submitted("nohang", *more)
    whole.wait("COMPLETED", seconds=240)
    assert losses(job.run.root) == losses(whole.run.root)


def _variable(pid: int, name: str) -> str:
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((w.decode().partition("=")[2] for w in words if w.startswith(name.encode() + b"=")), "")


def test_a_bad_node_is_named_excluded_and_the_job_runs_elsewhere(submitted, tmp_path):
    """node2's temporary folder is full; the other nodes' are not."""
    full = tmp_path / "local"
    full.mkdir()
    job = submitted("bad", "train.steps=4", "site.preflight={enabled: true, free_gb: 0.1, local_gb: 0.5}",
                    f"site.env={{TMPDIR: {full}}}", "site.exclude=[node1]", "site.sbatch=[--hold]")  # fmt: skip
    init = _children(job.cluster.daemons["node2"].pid)[0]
    mount = ["nsenter", "-t", str(init), "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(full)]
    subprocess.run(mount, check=True)
    job.cluster.run("scontrol", "release", job.job)
    job.wait("COMPLETED", seconds=400)
    assert job.words() == ["requeue", "done"], job.log()
    assert "node2: 0.00 GB free in" in job.verdicts()[0]["cause"]
    assert job.run.exclude.read_text() == "node2\n"
    nodes = [read_json(job.run.attempt(f"{job.job}.{n}") / "attempt.json")["nodes"] for n in (0, 1)]
    assert nodes == ["node[2-3]", "node[3-4]"]


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_sweep_is_killed_and_goes_on_without_repeating_a_cell(submitted, tmp_path):
    path = config_file(tmp_path)
    site = submitted.site  # type: ignore[attr-defined]
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"""
name: scaling
config: {path}
profile: {site}
nodes: [1, 2]
scaling: weak
layouts: [{{}}, {{tensor: 2}}]
overrides: [train.steps=8, train.global_batch=8]
throttle: 2
""")
    words = [sys.executable, "-m", "launch", "sweep", str(grid)]
    first = subprocess.Popen(words, cwd=REPOSITORY, start_new_session=True)
    done = lambda: [p.parent.parent.name for p in sorted(tmp_path.glob("runs/scaling/*/control/verdict.json"))]
    deadline = time.monotonic() + 240
    while len(done()) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    first.kill()
    first.wait()
    assert 2 <= len(done()) < 4
    again = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(done()) == 4
    runs = [RunFolder(p) for p in (tmp_path / "runs/scaling").iterdir()]
    assert [len(run.job_ids()) for run in runs] == [1, 1, 1, 1]
    assert all(verdict(run) == "done" for run in runs)
    third = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert "4 cells, 4 of them over" in third.stdout
    collected = subprocess.run([*words[:3], "collect", str(grid), "--out", str(tmp_path / "out")], cwd=REPOSITORY,
                               capture_output=True, text=True, timeout=120)  # fmt: skip
    assert collected.returncode == 0, collected.stdout + collected.stderr
    rows = list(csv.DictReader((tmp_path / "out/results.csv").open()))
    assert [(r["cell"], r["devices"], r["global_batch"]) for r in rows] == [
        ("n1_dp", "2", "8"), ("n1_tp2", "2", "8"), ("n2_dp", "4", "16"), ("n2_tp2", "4", "16")]  # fmt: skip
    assert [float(r["efficiency"]) for r in rows[:2]] == [1.0, 1.0]
    assert all(float(r["tokens_per_s"]) > 0 for r in rows)
    picture = (tmp_path / "out/scaling.svg").read_text()
    assert picture.count("dashed: ideal") == 2
    assert picture.count("<circle") == 4


def test_the_referee_judges_the_layout_before_the_job_trains(submitted):
    job = submitted("judged", *SHORT, *ROUNDED_WELL, parity=True)
    job.wait("COMPLETED", seconds=300)
    assert "EQUAL  tolerances: gradients 1e-05" in job.log()
    assert job.words() == ["done"]


def test_preflight_with_the_referee(submitted, tmp_path):
    words = [sys.executable, "-m", "launch", "preflight", "--nodes=2", "--profile", str(submitted.site)]
    path = Path(config_file(tmp_path))
    path.write_text(path.read_text().replace("width: 16", "width: 32").replace("heads: 2", "heads: 4"))
    words += ["--parity", str(path)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 nodes, 4 of 4 ranks answered" in done.stdout
    assert "EQUAL  tolerances" in done.stdout


def test_preflight_from_the_command_line(submitted, tmp_path):
    words = [sys.executable, "-m", "launch", "preflight", "--nodes=3", "--profile", str(submitted.site)]
    began = time.monotonic()
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 nodes, 6 of 6 ranks answered" in done.stdout
    assert time.monotonic() - began < 100
    high = [*words, "site.preflight.bandwidth_gb_s=1e6"]
    done = subprocess.run(high, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 77
    assert "BAD node1" in done.stdout
