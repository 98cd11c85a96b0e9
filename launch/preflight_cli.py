"""`python -m launch preflight`: the checks alone, in the allocation at hand or in one of their own."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

from configs.launch_section import LaunchConfig
from configs.schema import load
from launch import profile
from launch.folder import RunFolder, snapshot, write_json
from launch.placement import SITE, Job
from launch.prepare import SOURCE, facts
from launch.script import prepared_by, srun, task_python
from parallel.start.launcher import without_launchers


def check_site(site_name: str, overrides: list[str], nodes: int, config: str | None) -> int:
    """Run the checks on `nodes` nodes of a site and print what they find; 0, or 77 with the bad nodes named.

    `config`: also compare this configuration's layout with one device (`parallel.parity`); 1 if it differs.
    """
    site = profile.load(site_name, [word.removeprefix(SITE) for word in overrides])
    if config is not None:
        load(config, [], world_size=nodes * site.ranks_per_node)
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=".") as folder:  # here: all nodes share it
        run = RunFolder(Path(folder))
        job = Job(run, site, LaunchConfig(), nodes, Path.cwd())
        snapshot(SOURCE, run.code)
        write_json(run.job, facts(job))
        host, task = shlex.quote(site.host_python or site.python), task_python(job)
        lines = [
            f"{srun(job, 1)} {task} -m launch.preflight node",
            f"{srun(job, site.ranks_per_node)} {task} -m parallel.start.interconnect",
            f"{host} -m launch.preflight judge",
        ]
        if config is not None:
            lines.append(f"{srun(job, site.ranks_per_node)} {task} -m parallel.parity {shlex.quote(config)}")
        return subprocess.run(["bash", "-c", _allocate(job, lines)], env=_environment(job)).returncode


def _allocate(job: Job, lines: list[str]) -> str:
    """The steps, under salloc unless this is an allocation already."""
    head = 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    first = [f"eval {shlex.quote(line)} || {{ echo {shlex.quote(f'{key}: {line} failed')} >&2; exit 1; }}"
             for key, line in prepared_by(job.site)]  # fmt: skip
    script = "\n".join([*first, head, *lines[:2], *(f"{line} || exit" for line in lines[2:])])
    if "SLURM_JOB_ID" in os.environ:
        return script
    site = job.site
    words = ["salloc", "--quiet", f"--nodes={job.nodes}", f"--ntasks-per-node={site.ranks_per_node}",
             f"--cpus-per-task={site.cpus_per_task}", "--time=5"]  # fmt: skip
    for name in ("partition", "account", "qos", "mem"):
        words += [f"--{name}={value}"] if (value := getattr(site, name)) else []
    if site.gpus_per_node and site.gpu_request != "none":
        words.append(f"--gres=gpu:{site.gpus_per_node}" if site.gpu_request == "gres"
                     else f"--gpus-per-node={site.gpus_per_node}")  # fmt: skip
    return shlex.join([*words, *site.sbatch, "bash", "-c", script])


def _environment(job: Job) -> dict[str, str]:
    own = {**job.site.env, "PYTHONPATH": str(job.run.code), "PYTHONSAFEPATH": "1", "HOPE_RUN": str(job.run.root),
           "HOPE_CONTROL": str(job.run.attempt("preflight")), "OMP_NUM_THREADS": "1",
           "MASTER_PORT": str(15000 + int(time.time()) % 17000)}  # fmt: skip
    return {**without_launchers(os.environ), **own}
