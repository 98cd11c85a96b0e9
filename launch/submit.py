"""From a configuration to a queued job: check, snapshot, render, `sbatch --test-only`, `sbatch`."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from configs.schema import Config, to_yaml
from launch import profile, slurm
from launch.checks import check, notes
from launch.folder import RunFolder, append_line, describe_source, read_json, snapshot, write_json
from launch.script import Job, render

SOURCE = Path(__file__).resolve().parent.parent
SITE = "site."


def split_overrides(overrides: list[str]) -> tuple[list[str], list[str]]:
    """(`a.b=c` for the configuration, `key=value` for the profile), the latter given as `site.key=value`."""
    site = [word.removeprefix(SITE) for word in overrides if word.startswith(SITE)]
    return [word for word in overrides if not word.startswith(SITE)], site


def plan(
    path: str, overrides: list[str], nodes: int, site_name: str, parity: bool = False, *, queue: bool = True
) -> tuple[Config, Job]:
    """The checked configuration and its job; nothing is written. Raises ConfigError with every problem."""
    own, sites = split_overrides(overrides)
    site = profile.load(site_name, sites)
    config = check(path, own, site, nodes, queue=queue)
    run = RunFolder(Path(config.run.dir) / config.run.name)
    return config, Job(run, site, config.launch, nodes, Path.cwd(), parity)


def prepare(config: Config, job: Job, program: str | None = None) -> None:
    """Write the launch folder of a run: script, exact configuration, code, facts for launch.job."""
    run = job.run
    _set_aside(run)
    run.launch.mkdir(parents=True)
    run.logs.mkdir(exist_ok=True)
    snapshot(SOURCE, run.code)
    run.config.write_text(to_yaml(config))
    (run.launch / "git.txt").write_text(describe_source(SOURCE))
    last = min(config.train.stop_after or config.train.steps, config.train.steps)
    write_json(run.job, {**facts(job), "steps": last})
    run.script.write_text(render(job, program))


def facts(job: Job) -> dict[str, Any]:
    """What launch.job and launch.preflight must know, as plain JSON."""
    preflight = {**dataclasses.asdict(job.site.preflight), "gpus": job.site.gpus_per_node,
                 "gpu_memory_gb": job.site.gpu_memory_gb if job.site.gpus_per_node else 0}  # fmt: skip
    return {
        "world": job.world,
        "nodes": job.nodes,
        "attempts": job.launch.attempts,
        "folder": str(job.folder),
        "exclude": job.site.exclude,
        "limits": dataclasses.asdict(job.launch.limits),
        "preflight": preflight,
    }


def _set_aside(run: RunFolder) -> None:
    """An earlier submission of this run: its launch folder becomes launch.1 (.2 ...), its verdict is history."""
    if run.launch.exists():
        number = 1
        while (aside := run.launch.with_name(f"launch.{number}")).exists():
            number += 1
        shutil.move(run.launch, aside)
    reopen(run)


def reopen(run: RunFolder) -> None:
    """Forget the verdict and the spent budget, so that a new job may start; the history stays."""
    for path in (run.verdict, run.budget, run.cancelled):
        path.unlink(missing_ok=True)


def submit(path: str, overrides: list[str], nodes: int, site_name: str, *, dry_run: bool, parity: bool) -> str:
    """Submit a run and return its job id; with `dry_run` return the script instead, and write nothing.

    Raises:
        ConfigError: with every problem; SlurmError: with what sbatch says.
    """
    config, job = plan(path, overrides, nodes, site_name, parity, queue=not dry_run)
    for note in notes(config, job.site, nodes):
        print(f"note: {note}")
    if dry_run:
        return render(job)
    return send(config, job)


def send(config: Config, job: Job, program: str | None = None) -> str:
    """Prepare the folder and submit it; the job's id."""
    prepare(config, job, program)
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
    for job in run.job_ids()[-1:]:
        if slurm.live(job):
            raise slurm.SlurmError(f"job {job} of this run waits or runs: nothing to resume")
    reopen(run)
    return queue(run, Path(read_json(run.job)["folder"]))
