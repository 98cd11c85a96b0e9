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


def prepare(planned: PlannedRun, script: str) -> None:
    """Write the launch folder of a run. An earlier one is set aside; its verdict no longer counts."""
    run, train = planned.job.run, planned.config.train
    _set_aside(run)
    run.launch.mkdir(parents=True)
    run.logs.mkdir(exist_ok=True)
    snapshot(SOURCE, run.code)
    run.config.write_text(to_yaml(planned.config))
    (run.launch / "git.txt").write_text(describe_source(SOURCE))
    last = min(train.stop_after or train.steps, train.steps)
    write_json(run.job, {**facts(planned.job), "steps": last})
    run.script.write_text(script)


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
    """Rename the launch folder of an earlier submission to launch.1 (.2 ...), and forget its verdict."""
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
