"""From a request to a queued job: plan, render the script, write the launch folder, `sbatch`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from configs.errors import ConfigError
from launch import slurm
from launch.checks import notes, time_limit
from launch.folder import RunFolder, append_line, read_json
from launch.outlook import outlook
from launch.placement import PlannedRun, Request
from launch.plan import plan
from launch.prepare import install, prepare, reopen
from launch.script import render


def submit(request: Request, *, dry_run: bool) -> str:
    """Submit a run and return its job id; with `dry_run` return the script instead, and write nothing.

    Raises:
        ConfigError: with every problem.
        SlurmError: with what sbatch says.
    """
    planned = plan(request, ask_slurm=not dry_run)
    for note in [*notes(planned.config, planned.job), *slurm.dropped(os.environ)]:
        print(f"note: {note}")
    if dry_run:
        print("\n".join(outlook(planned.config, planned.job.run.root, planned.job.world)))
        return render(planned.job)
    return send(planned)


def send(planned: PlannedRun, program: str | None = None) -> str:
    """Write a launch folder, submit its script, and put the folder in its place; the job's id.

    `program`: see `render`. A refusal leaves the run as it was.

    Raises:
        ConfigError: the partition allows less time.
        SlurmError: with what sbatch says.
    """
    job = planned.job
    if found := list(time_limit(job)):
        raise ConfigError("the site", found)
    fresh = prepare(planned, render(job, program))
    try:
        if said := slurm.test_only(fresh / job.run.script.name, job.folder):
            print(said.splitlines()[-1])
        number = queue(job.run, fresh, job.folder)
    except BaseException:
        shutil.rmtree(fresh)
        raise
    install(job.run, number)
    append_line(job.run.history, {"submitted": number})
    return number


def queue(run: RunFolder, launch: Path, folder: Path) -> str:
    """Submit the script in a launch folder of a run; the job's id. Nothing is written."""
    found = run.exclude.read_text().split() if run.exclude.exists() else []
    # on the command line it replaces the script's own list
    excluded = [*read_json(launch / run.job.name)["exclude"], *found]
    options = [f"--exclude={','.join(excluded)}"] if found else []
    return slurm.submit(launch / run.script.name, folder, *options)


def resume(root: str) -> str:
    """Submit the script of an existing run again, with the same code and configuration; the new job's id.

    Raises:
        NoRun: it has no script, or its launch folder is not whole.
        SlurmError: a job of it still waits or runs, or sbatch refuses: then nothing has changed.
    """
    run = RunFolder(root)
    if not run.script.exists():
        raise slurm.NoRun(f"{run.script} is not there: this run was not submitted; use `submit`, or `local` again")
    folder = read_json(run.job, {}).get("folder")
    if not isinstance(folder, str):
        raise slurm.NoRun(f"{run.job} is not what `submit` wrote; `submit` the run again, which keeps its checkpoints")
    if (number := slurm.newest_live(run.job_ids())) is not None:
        raise slurm.SlurmError(f"job {number} of this run waits or runs: nothing to resume")
    for note in slurm.dropped(os.environ):
        print(f"note: {note}")
    number = queue(run, run.launch, Path(folder))
    reopen(run)
    with run.jobs.open("a") as file:  # last: the job waits until its number is there
        file.write(f"{number}\n")
    append_line(run.history, {"submitted": number})
    return number
