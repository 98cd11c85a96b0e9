"""What is refused on the login node, before a job waits in the queue for days: every problem at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from configs.errors import ConfigError, Problem
from configs.schema import Config, load, validate
from launch import slurm
from launch.folder import RunFolder
from launch.profile import Profile
from launch.runs import measured_step_s

NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs", "orangefs", "glusterfs", "cifs", "afs",
           "9p", "virtiofs", "vastnfs")  # fmt: skip


def check(path: str, overrides: list[str], site: Profile, nodes: int, *, queue: bool = True) -> Config:
    """The configuration of a run that can be submitted to `nodes` nodes of `site`.

    `queue`: also ask SLURM whether a job of this run is still waiting or running.

    Raises:
        ConfigError: with every problem of the configuration, the layout, the data, the folder, the time limit and the
            memory of a device.
    """
    config = load(path, overrides, check=False)  # keys and types; a file that cannot be read ends here
    problems: list[Problem] = []
    if nodes < 1:
        problems.append(("--nodes", f"{nodes} is less than 1", "1"))
    world = max(nodes, 1) * site.ranks_per_node
    try:
        validate(config, world, path)
    except ConfigError as error:
        problems += error.problems
    sound = not problems
    run = RunFolder(Path(config.run.dir) / config.run.name)
    problems += _folder(run, site, nodes)
    problems += _time(config, site, run, world, sound)
    if sound and site.gpus_per_node and site.gpu_memory_gb:
        problems += _memory(config, site, world)
    if queue:
        problems += _queue(run)
    if problems:
        raise ConfigError(path, problems)
    return config


def notes(config: Config, site: Profile, nodes: int) -> Iterator[str]:
    """What works and is worth a word."""
    if nodes > 1 and config.parallel.tensor > site.ranks_per_node:
        yield (f"parallel.tensor {config.parallel.tensor} spans nodes of {site.ranks_per_node} devices: every layer "
               "waits for the network")  # fmt: skip
    if config.checkpoint.every == 0:
        yield "checkpoint.every is 0: a node failure loses everything since the last start"


def _folder(run: RunFolder, site: Profile, nodes: int) -> Iterator[Problem]:
    """Is the run folder writable, large enough, and the same on all nodes?"""
    there = run.root
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        yield (
            "run.dir",
            f"{there} is not a folder that you can write to",
            "a folder on a file system that all nodes share",
        )
        return
    free = shutil.disk_usage(there).free / 1e9
    if free < site.preflight.free_gb:
        yield "run.dir", f"{there} has {free:.1f} GB free, less than {site.preflight.free_gb:g}", "another file system"
    kind = _file_system(there)
    listed = any(run.root.is_relative_to(folder) for folder in site.shared)
    if nodes > 1 and not listed and kind not in NETWORK and not kind.startswith("fuse"):
        what = f"{there} is on {kind}, which the {nodes} nodes do not share"
        yield "run.dir", what, f"a folder on a network file system; or say so in the profile: shared: [{there}]"


def _file_system(path: Path) -> str:
    """Type of the file system that holds `path`."""
    best, kind = "", "an unknown file system"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, found = line.split()[:3]
        mount = mount.replace("\\040", " ")
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, found
    return kind


def _time(config: Config, site: Profile, run: RunFolder, world: int, sound: bool) -> Iterator[Problem]:
    """Does at least one checkpoint fit into the time limit?"""
    launch = config.launch
    reserve = launch.checkpoint_s + launch.margin_s
    if site.seconds <= reserve:
        what = (
            f"{site.time} is not longer than launch.checkpoint_s {launch.checkpoint_s} + margin_s {launch.margin_s} s"
        )
        yield "site.time", what, f"more than {reserve // 60 + 1} minutes"
        return
    step_s = measured_step_s(run.root) or (_estimated_step_s(config, site, world) if sound else None)
    if step_s is None or config.checkpoint.every == 0:
        return
    interval = config.checkpoint.every * step_s
    if site.seconds < interval + reserve:
        what = (f"{site.time} is shorter than {config.checkpoint.every} steps of {step_s:.2f} s between checkpoints "
                f"({interval:.0f} s) + {reserve} s for saving and leaving")  # fmt: skip
        fits = max(1, int((site.seconds - reserve) / step_s))
        yield "checkpoint.every", what, f"at most {fits}; or site.time of {(interval + reserve) / 3600:.1f} hours"


def _estimated_step_s(config: Config, site: Profile, world: int) -> float | None:
    from launch import estimate  # imports torch: seconds

    return estimate.step_seconds(config, world, site.gpu, estimate.ASSUMED_MFU) if site.gpus_per_node else None


def _memory(config: Config, site: Profile, world: int) -> Iterator[Problem]:
    from launch import estimate

    worst = estimate.worst_rank(config, config.parallel, world)
    limit = site.gpu_memory_gb * estimate.USABLE
    if worst.peak / estimate.GIB <= limit:
        return
    parts = estimate.parts(worst)
    what = (f"the fullest rank needs {worst.peak / estimate.GIB:.1f} GiB ({parts}), "
            f"more than {estimate.USABLE:.0%} of {site.gpu_memory_gb:g} GiB")  # fmt: skip
    fits = [row for row in estimate.layouts(config, world, site) if row.fits][:3]
    fix = "fits: " + " · ".join(str(row) for row in fits) if fits else "more nodes, a smaller train.micro_batch, or " \
        "train.recompute=block"  # fmt: skip
    yield "parallel", what, fix


def _queue(run: RunFolder) -> Iterator[Problem]:
    """Two jobs in one run folder would overwrite each other."""
    for job in run.job_ids()[-1:]:
        if slurm.live(job):
            yield "run.name", f"job {job} of this run waits or runs", f"another run.name, or `cancel {run.root}` first"
