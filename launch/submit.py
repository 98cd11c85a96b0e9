"""From a request to a queued job: plan, render the script, write the launch folder, `sbatch`."""

from __future__ import annotations

from pathlib import Path

from launch import slurm
from launch.checks import notes
from launch.folder import RunFolder, append_line, read_json
from launch.placement import PlannedRun, Request
from launch.plan import plan
from launch.prepare import prepare, reopen
from launch.script import render


def submit(request: Request, *, dry_run: bool) -> str:
    """Submit a run and return its job id; with `dry_run` return the script instead, and write nothing.

    Raises:
        ConfigError: with every problem.
        SlurmError: with what sbatch says.
    """
    planned = plan(request, ask_slurm=not dry_run)
    for note in notes(planned.config, planned.job):
        print(f"note: {note}")
    if dry_run:
        return render(planned.job)
    return send(planned)


def send(planned: PlannedRun, program: str | None = None) -> str:
    """Write the launch folder and submit its script; the job's id. `program`: see `render`."""
    job = planned.job
    prepare(planned, render(job, program))
    print(slurm.test_only(job.run.script, job.folder).splitlines()[-1])
    return queue(job.run, job.folder)


def queue(run: RunFolder, folder: Path) -> str:
    """Submit the script of a run; the job's id, also in launch/jobs.txt."""
    found = run.exclude.read_text().split() if run.exclude.exists() else []
    # on the command line it replaces the script's own list
    options = [f"--exclude={','.join([*read_json(run.job)['exclude'], *found])}"] if found else []
    number = slurm.submit(run.script, folder, *options)
    with run.jobs.open("a") as file:
        file.write(f"{number}\n")
    append_line(run.history, {"submitted": number})
    return number


def resume(root: str) -> str:
    """Submit the script of an existing run again, with the same code and configuration; the new job's id.

    Raises:
        SlurmError: it has no script, or a job of it still waits or runs.
    """
    run = RunFolder(root)
    if not run.script.exists():
        raise slurm.SlurmError(f"{run.script} is not there: this run was not submitted; use `submit`")
    if (number := slurm.newest_live(run.job_ids())) is not None:
        raise slurm.SlurmError(f"job {number} of this run waits or runs: nothing to resume")
    reopen(run)
    return queue(run, Path(read_json(run.job)["folder"]))
