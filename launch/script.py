"""The batch script: one jinja2 template, filled from a site profile and a run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import jinja2

from launch.folder import PROGRAM
from launch.placement import Job
from launch.profile import Profile
from parallel.start.launcher import LAUNCHER_PREFIXES, LAUNCHERS

TEMPLATES = Path(__file__).parent / "templates"


def render(job: Job, program: str | None = None) -> str:
    """The sbatch file. `program` replaces the snapshot's pretrain_hope.py (tests start stand-ins)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # a shell script
    )
    environment.filters["quote"] = shlex.quote
    environment.filters["sbatch_quote"] = sbatch_quote
    python = task_python(job)
    return environment.get_template("job.sbatch.j2").render(
        site=job.site,
        run_name=job.run.root.name,
        job_name=re.sub(r"[^\w.-]", "-", job.run.root.name),
        nodes=job.nodes,
        run=str(job.run.root),
        script=str(job.run.script),
        folder=str(job.folder),
        code=str(job.run.code),
        config=str(job.run.config),
        program=program or str(job.run.code / PROGRAM),
        warning_s=job.warning_s,
        checkpoint_s=job.launch.checkpoint_s,
        parity=job.parity,
        host_python=job.site.host_python or job.site.python,
        python=python,
        lines=prepared_by(job.site),
        launcher_variables=unset_words(),
        srun_rank=srun(job, job.site.ranks_per_node),
        srun_node=srun(job, 1),
    )


def prepared_by(site: Profile) -> list[tuple[str, str]]:
    """What a site runs before the program: (key of the profile, shell line)."""
    loads = [("site.modules", f"module load {shlex.quote(name)}") for name in site.modules]
    return [*(("site.setup", line) for line in site.setup), *loads]


def unset_words() -> str:
    """Names for bash's `unset`: all that another launcher may have set."""
    return " ".join([*LAUNCHERS, *(f"${{!{prefix}@}}" for prefix in LAUNCHER_PREFIXES)])


def sbatch_quote(text: str) -> str:
    """A path as it stands in an #SBATCH line: sbatch splits at blanks, ends at #, and replaces % and a letter."""
    text = text.replace("%", "%%")
    return text if re.fullmatch(r"[\w./+,=@:%-]+", text) else f'"{text}"'


def srun(job: Job, tasks: int) -> str:
    """`srun` with `tasks` tasks on every node; together they have all cores of the job."""
    site = job.site
    # all three: srun takes the number of tasks from the job's environment, and then ignores --ntasks-per-node
    words = ["srun", f"--nodes={job.nodes}", f"--ntasks={job.nodes * tasks}", f"--ntasks-per-node={tasks}"]
    # srun has not inherited --cpus-per-task from sbatch since SLURM 22.05
    words.append(f"--cpus-per-task={site.cpus_per_task * (site.ranks_per_node // tasks)}")
    # a rank that has saved leaves with 85 while others still write: the agents end the others when a rank FAILS
    words += ["--kill-on-bad-exit=0", f"--wait={max(120, job.launch.checkpoint_s)}", *site.srun]
    if site.container.kind == "pyxis":
        words += [f"--container-image={site.container.image}", f"--container-workdir={job.folder}"]
        words.append(f"--container-mounts={','.join(_mounts(job))}")
    return shlex.join(words)


def task_python(job: Job) -> str:
    """The interpreter of the tasks, with the container around it."""
    site = job.site
    if site.container.kind != "apptainer":
        return shlex.quote(site.python)
    words = ["apptainer", "exec", *(["--nv"] if site.gpus_per_node else []), f"--pwd={job.folder}"]
    words += [f"--bind={mount}" for mount in _mounts(job)]
    return shlex.join([*words, site.container.image, site.python])


def _mounts(job: Job) -> list[str]:
    own = [f"{path}:{path}" for path in dict.fromkeys((str(job.folder), str(job.run.root)))]
    return [*own, *(mount for mount in job.site.container.mounts if mount not in own)]
