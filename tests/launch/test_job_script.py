"""The batch script itself, run by bash with stand-ins for SLURM's commands: what happens before the ranks start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm

from configs.launch_section import LaunchConfig
from launch import profile
from launch.folder import RunFolder, read_json, write_json
from launch.placement import Job
from launch.prepare import SOURCE
from launch.script import render
from parallel.start.launcher import first_host

TEMPLATE = SOURCE / "launch" / "templates" / "job.sbatch.j2"
ENDED = '{"rank": %d, "host": "n1", "code": 0, "how": "exit", "signalled": null, "time": 1}'
ENDS_DONE = f"""
mkdir -p "$HOPE_CONTROL/exit"
for rank in 0 1; do printf '{ENDED}' "$rank" >"$HOPE_CONTROL/exit/0000$rank.json"; done
env >"$HOPE_RUN/env.of.tasks"
"""


class Script:
    """A job of two ranks whose tasks end at once with 0."""

    def __init__(self, folder: Path, fake: FakeSlurm, name: str = "demo") -> None:
        fake.says(srun=ENDS_DONE, scontrol="echo node1")
        self.folder, self.run = folder, RunFolder(folder / name)
        self.run.launch.mkdir(parents=True)
        self.run.code.symlink_to(SOURCE)
        self.run.jobs.write_text("5\n")
        write_json(self.run.job, {"attempts": 3, "world": 2, "limits": {}, "steps": -1})

    def start(self, *overrides: str, python: str = sys.executable, **environment: str) -> subprocess.Popen[str]:
        site = profile.load("cpu", [f"python={python}", "preflight.enabled=false", *overrides])
        job = Job(self.run, site, LaunchConfig(), 1, self.folder)
        path = self.run.launch / "job.sbatch"
        path.write_text(render(job, "program.py"))
        env = {**os.environ, "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "node1", **environment}
        return subprocess.Popen(["bash", str(path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, start_new_session=True)  # fmt: skip

    def __call__(self, *overrides: str, **more: str) -> tuple[int, str]:
        process = self.start(*overrides, **more)
        said = process.communicate(timeout=120)[0]
        return process.returncode, said

    def verdict(self) -> dict:
        return read_json(self.run.verdict, {})


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(tmp_path, FakeSlurm(tmp_path, monkeypatch))


def test_a_job_whose_ranks_finish_is_done(script):
    assert script("setup=['export A=1']")[0] == 0
    assert script.verdict()["verdict"] == "done"
    assert "A=1" in (script.run.root / "env.of.tasks").read_text().splitlines()


@pytest.mark.parametrize(
    ("site", "cause"),
    [
        ("setup=['source nowhere.sh']", "site.setup: source nowhere.sh ended with 1"),
        ("setup=['true', 'false']", "site.setup: false ended with 1"),
        ("modules=[cuda/13]", "site.modules: module load cuda/13 ended with 127"),
        ("setup=['source ends.sh']", "site.setup: source ends.sh ended with 4"),
        ("setup=['source strict.sh']", "site.setup: source strict.sh ended with 1"),
        ("setup=['if']", "site.setup: if ended with"),
    ],
)
def test_a_line_of_the_site_that_fails_stops_the_run_and_is_named(script, site, cause):
    (script.folder / "ends.sh").write_text("exit 4\n")
    (script.folder / "strict.sh").write_text('set -u\necho "$NOBODY_SETS_THIS"\n')
    code, said = script(site)
    assert code == 93, said
    assert script.verdict()["verdict"] == "stop"
    assert script.verdict()["cause"].startswith(cause)
    assert not (script.run.root / "env.of.tasks").exists()


def test_a_sourced_file_may_use_unset_variables_and_set_options(script):
    (script.folder / "site.sh").write_text('echo "$NOBODY_SETS_THIS"\nset -e\ntrap - USR1 EXIT\n')
    code, said = script("setup=['source site.sh']")
    assert (code, script.verdict()["verdict"]) == (0, "done"), said


def test_without_any_python_the_verdict_is_written_all_the_same(script):
    assert script(python="nowhere/python")[0] == 93
    assert script.verdict() == {"attempt": "5.0", "verdict": "stop",
                                "cause": "nowhere/python -m launch.job begin ended with 127"}  # fmt: skip


def test_usr1_during_the_sites_lines_is_not_lost(script):
    process = script.start("setup=['touch began; sleep 2']")
    deadline = time.monotonic() + 20
    while not (script.folder / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert (script.run.attempt("5.0") / "USR1").exists()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "TORCHELASTIC_RUN_ID"])
def test_what_launchers_left_in_the_shell_does_not_reach_the_tasks(script, name):
    assert script(**{name: "0"})[0] == 0
    lines = (script.run.root / "env.of.tasks").read_text().splitlines()
    assert not [line for line in lines if line.startswith(f"{name}=")]


def test_what_the_site_says_itself_does(script):
    assert script("env.PMIX_MCA_psec=native", "setup=['export OMPI_MCA_btl=tcp']")[0] == 0
    lines = (script.run.root / "env.of.tasks").read_text().splitlines()
    assert {"PMIX_MCA_psec=native", "OMPI_MCA_btl=tcp"} <= set(lines)


def test_sbatch_export_does_not_keep_the_environment_from_the_tasks(script):
    assert script(SLURM_EXPORT_ENV="NONE")[0] == 0
    lines = (script.run.root / "env.of.tasks").read_text().splitlines()
    assert not [line for line in lines if line.startswith("SLURM_EXPORT_ENV")]


def test_a_job_waits_until_its_launch_folder_is_in_its_place(script):
    script.run.jobs.unlink()
    process = script.start()
    time.sleep(2)
    assert not script.run.budget.exists()
    script.run.jobs.write_text("4\n5;far\n")
    assert process.communicate(timeout=120)[0]
    assert process.returncode == 0


def test_the_successors_number_is_found_behind_banners(script, tmp_path):
    (tmp_path / "fake-slurm" / "sbatch").write_text("#!/bin/bash\necho 'Welcome to 12 racks'\necho '6;far'\n")
    assert script("requeue=singleton")[0] == 0
    assert script.run.jobs.read_text() == "5\n6;far\n"
    assert "scancel --state=PENDING 6" in (tmp_path / "slurm-calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-07,11],x1", "gpu03"), ("rack[1-2]node[3-4]", "rack1node3"), ("a,b[1-2]", "a"), ("n1", "n1"),
     ("r[1,3]n[2]-ib,z", "r1n2-ib"), ("node[1-2]", "node1")],
)  # fmt: skip
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_no_start_shares_a_port_with_the_starts_around_it():
    """Ten jobs of eight starts each. In a sum of both numbers, job N's eighth start had job N + 1's first port."""
    text = next(line for line in TEMPLATE.read_text().splitlines() if "MASTER_PORT=$((" in line)
    port = text.partition("MASTER_PORT=")[2]
    starts = [f"SLURM_JOB_ID={100 + job} SLURM_RESTART_COUNT={count}" for job in range(10) for count in range(8)]
    script = "\n".join(f"{start.replace(' ', '; ')}; echo {port}" for start in starts)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    ports = [int(word) for word in done.stdout.split()]
    assert len(ports) == len(starts)
    assert all(15000 <= number < 32000 for number in ports)
    assert len(set(ports)) == len(ports)
