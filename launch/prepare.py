"""Writing the launch folder of a run: script, exact configuration, code, and the facts that its job must know."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from configs.schema import to_yaml
from launch.folder import RunFolder, describe_source, snapshot, write_json
from launch.placement import Job, PlannedRun

SOURCE = Path(__file__).resolve().parent.parent


def prepare(planned: PlannedRun, script: str | None) -> Path:
    """Write the launch folder of a run beside the one that is there, and return it; `install` puts it in its place.

    Until then nothing of an earlier submission has changed.
    """
    run, train = planned.job.run, planned.config.train
    if (run.fresh / run.jobs.name).exists():  # killed between the job's number and the swap
        install(run)
    shutil.rmtree(run.fresh, ignore_errors=True)
    run.fresh.mkdir(parents=True)
    run.logs.mkdir(exist_ok=True)
    snapshot(SOURCE, run.fresh / run.code.name)
    (run.fresh / run.config.name).write_text(to_yaml(planned.config))
    (run.fresh / "git.txt").write_text(describe_source(SOURCE))
    last = min(train.stop_after or train.total_steps, train.total_steps)
    write_json(run.fresh / run.job.name, {**facts(planned.job), "steps": last})
    if script is not None:  # without one, nothing submits it
        (run.fresh / run.script.name).write_text(script)
    return run.fresh


def install(run: RunFolder, number: str | None = None) -> None:
    """Swap the launch folder that `prepare` wrote into its place; an earlier one becomes launch.1 (.2 ...).

    `number`: of the job that was submitted from it. The job waits until it finds its number in launch/jobs.txt, so
    that the last rename is the one moment at which everything is new.
    """
    if number is not None:
        (run.fresh / run.jobs.name).write_text(f"{number}\n")
    if run.launch.exists():
        run.launch.rename(_aside(run))
    reopen(run)
    run.fresh.rename(run.launch)


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


def _aside(run: RunFolder) -> Path:
    """The first of launch.1, launch.2 ... that is free."""
    number = 1
    while (aside := run.launch.with_name(f"launch.{number}")).exists():
        number += 1
    return aside


def reopen(run: RunFolder) -> None:
    """Forget the verdict and the spent budget, so that a new job may start; the history stays."""
    for path in (run.verdict, run.budget, run.cancelled):
        path.unlink(missing_ok=True)
