"""What is refused on the login node, before a job waits in the queue for days: every problem at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from configs.errors import ConfigError
from configs.schema import Config, validate
from hope.sections import Problem
from launch import slurm
from launch.folder import RunFolder
from launch.outlook import not_resumable, unwritable
from launch.placement import Job
from launch.runs import measured_step_s

NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs", "orangefs", "glusterfs", "cifs", "afs",
           "9p", "virtiofs", "vastnfs")  # fmt: skip


def problems(config: Config, job: Job, *, ask_slurm: bool) -> list[Problem]:
    """Everything that keeps a run from being submitted; the configuration's keys and types are already sound.

    `ask_slurm`: also ask whether a job of this run still waits or runs.
    """
    found = list(_configuration(config, job))
    # memory and speed are counted from shapes, for which model, layout and batch must fit together
    countable = not found and job.site.gpus_per_node > 0
    found += [problem for problem in _names(job) if problem[0] not in {path for path, _, _ in found}]
    found += _folder(job)
    found += _time(config, job, countable=countable)
    found += not_resumable(config, job.run, job.world)
    if countable and job.site.gpu_memory_gb:
        found += _memory(config, job)
    if ask_slurm:
        found += _queue(job.run)
    return found


def notes(config: Config, job: Job) -> Iterator[str]:
    """Warnings: what works, though probably not as intended."""
    if job.nodes > 1 and config.parallel.tensor > job.site.ranks_per_node:
        yield (f"parallel.tensor {config.parallel.tensor} spans nodes of {job.site.ranks_per_node} devices: every "
               "layer waits for the network")  # fmt: skip
    if config.checkpoint.every == 0:
        yield "checkpoint.every is 0: a node failure loses everything since the last start"


def _configuration(config: Config, job: Job) -> Iterator[Problem]:
    """Do the sections and the layout fit each other and the job's devices?"""
    if job.nodes < 1:
        yield Problem("--nodes", f"{job.nodes} is less than 1", "1")
    try:
        validate(config, max(job.world, job.site.ranks_per_node))
    except ConfigError as error:
        yield from error.problems


def _names(job: Job) -> Iterator[Problem]:
    """Can sbatch, PYTHONPATH and the container read the path of the run folder?"""
    unreadable = {"\\": "sbatch", '"': "sbatch", ":": "PYTHONPATH"}
    if job.site.container.kind != "none":
        unreadable[","] = "the container's list of mounts"
    path = str(job.run.root)
    bad = {char: who for char, who in unreadable.items() if char in path}
    bad |= {char: "sbatch" for char in path if not char.isprintable()}
    for char, who in bad.items():
        key = "run.name" if char in job.run.root.name else "run.dir"
        yield Problem(
            key, f"{path!r} contains {char!r}, which {who} misreads", "letters, digits, blanks, - _ . + % # '"
        )


def _folder(job: Job) -> Iterator[Problem]:
    """Is the run folder writable, large enough, and the same on all nodes?"""
    if found := list(unwritable(job.run.root)):
        yield from found
        return
    there = next(path for path in (job.run.root, *job.run.root.parents) if path.exists())
    free, floor = shutil.disk_usage(there).free / 1e9, job.site.preflight.free_gb
    if free < floor:
        yield Problem("run.dir", f"{there} has {free:.1f} GB free, less than {floor:g}", "another file system")
    kind = _file_system(there)
    listed = any(job.run.root.is_relative_to(folder) for folder in job.site.shared)
    if job.nodes > 1 and not listed and kind not in NETWORK and not kind.startswith("fuse"):
        what = f"{there} is on {kind}, which the {job.nodes} nodes do not share"
        yield Problem(
            "run.dir", what, f"a folder on a network file system; or say so in the profile: shared: [{there}]"
        )


def _file_system(path: Path) -> str:
    """Type of the file system that holds `path`."""
    best, kind = "", "an unknown file system"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, found = line.split()[:3]
        mount = mount.replace("\\040", " ")
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, found
    return kind


def _time(config: Config, job: Job, *, countable: bool) -> Iterator[Problem]:
    """Does at least one checkpoint fit into the time limit?"""
    site, launch = job.site, job.launch
    if site.seconds <= job.warning_s:
        what = (
            f"{site.time} is not longer than launch.checkpoint_s {launch.checkpoint_s} + margin_s {launch.margin_s} s"
        )
        yield Problem("site.time", what, f"more than {job.warning_s // 60 + 1} minutes")
        return
    step_s = measured_step_s(job.run.root) or (_estimated_step_s(config, job) if countable else None)
    every = config.checkpoint.every
    if step_s is None or every == 0:
        return
    interval = every * step_s
    if site.seconds < interval + job.warning_s:
        what = (f"{site.time} is shorter than {every} steps of {step_s:.2f} s between checkpoints "
                f"({interval:.0f} s) + {job.warning_s} s for saving and leaving")  # fmt: skip
        fits = max(1, int((site.seconds - job.warning_s) / step_s))
        hours = (interval + job.warning_s) / 3600
        yield Problem("checkpoint.every", what, f"at most {fits}; or site.time of {hours:.1f} hours")


def _estimated_step_s(config: Config, job: Job) -> float | None:
    from launch import collectives, estimate  # torch takes 2 s to import, and sites without GPUs need no estimate

    return estimate.step_seconds(config, job.world, job.site.gpu, bus=collectives.Bus.of(job.site))


def _memory(config: Config, job: Job) -> Iterator[Problem]:
    """Does the fullest rank fit into a device?"""
    from launch import estimate  # see _estimated_step_s

    worst = estimate.worst_rank(config, config.parallel, job.world)
    if estimate.fits(worst, job.site):
        return
    fitting = [row for row in estimate.layouts(config, job.world, job.site) if row.fits][:3]
    fix = (
        "fits: " + " · ".join(map(str, fitting))
        if fitting
        else "more nodes, a smaller train.micro_batch, or train.recompute=block"
    )
    yield Problem("parallel", estimate.excess(worst, job.site), fix)


def time_limit(job: Job) -> Iterator[Problem]:
    """Does the partition allow the time? Most sites queue a job of more, and never start it."""
    site = job.site
    allowed = slurm.longest(site.partition)
    if allowed is None or site.qos:  # a quality of service may lift it
        return
    limit = slurm.seconds(allowed)
    if limit is not None and site.seconds > limit:
        what = f"{site.time} is above the {allowed} of partition {site.partition or '(default)'}"
        yield Problem("site.time", f"{what}: the job would wait for ever", allowed)


def _queue(run: RunFolder) -> Iterator[Problem]:
    """Two jobs in one run folder would overwrite each other."""
    fix = f"another run.name, or `cancel {run.root}` first"
    try:
        number = slurm.newest_live(run.job_ids())
    except slurm.SlurmError as error:
        yield Problem("run.name", str(error), f"the same command once SLURM answers; or {fix}")
        return
    if number is not None:
        yield Problem("run.name", f"job {number} of this run waits or runs", fix)
