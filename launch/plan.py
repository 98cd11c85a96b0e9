"""From a request to a checked run, on the login node: read, place, check. Nothing is written."""

from __future__ import annotations

from pathlib import Path

from configs.errors import ConfigError
from configs.schema import load
from launch import profile
from launch.checks import problems
from launch.placement import PlannedRun, Request, place, split_overrides


def plan(request: Request, *, ask_slurm: bool = True) -> PlannedRun:
    """The checked configuration of a request, and its job.

    `ask_slurm`: also refuse a run of which a job still waits or runs.

    Raises:
        ConfigError: with every problem of the profile or, once that is sound, of the configuration, the layout, the
            data, the folder, the time limit and the memory of a device.
    """
    own, of_site = split_overrides(request.overrides)
    site = profile.load(request.profile, of_site)
    config = load(request.config, own, check=False)  # keys and types only; `problems` has the rest
    job = place(config, site, request, Path.cwd())
    if found := problems(config, job, ask_slurm=ask_slurm):
        raise ConfigError(request.config, found)
    return PlannedRun(config, job)
