"""A site profile: what a cluster wants in every job, apart from the run. YAML files in launch/profiles/ or anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig, OmegaConf

from configs.errors import ConfigError
from configs.given import gather
from configs.merge import BAD, Fitter, defaults
from configs.source import plain
from configs.tree import leaves
from hope.sections import Problem
from launch.slurm import seconds

FOLDER = Path(__file__).parent / "profiles"

BUS_GB_S = 329.0
"""An all-reduce of 1 GiB over two H100s of one host, NVLink, through NCCL. Four of them have 355."""

# what the script says itself, and what says it here
OWN_OPTIONS = {
    **dict.fromkeys(("--time", "-t"), "site.time"),
    **dict.fromkeys(("--array", "-a"), "site.requeue=array and site.chain"),
    **dict.fromkeys(("--nodes", "-N"), "the option --nodes of `launch submit`"),
    **dict.fromkeys(("--ntasks-per-node", "--ntasks", "-n"), "site.tasks_per_node"),
    **dict.fromkeys(("--job-name", "-J"), "run.name"),
    **dict.fromkeys(("--output", "-o", "--open-mode"), "nothing: `launch logs` reads RUN/logs/JOB.out"),
    "--signal": "launch.checkpoint_s and launch.margin_s",
    **dict.fromkeys(("--wait", "-W", "--wrap", "--test-only", "--parsable"), "nothing: `launch submit` calls sbatch"),
}


@dataclass(kw_only=True)
class ContainerConfig:
    """What the tasks run in; the batch script itself runs on the host."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """none: the host's own Python; pyxis: srun --container-image; apptainer: apptainer exec."""
    image: str = ""
    """Path or address of the image."""
    mounts: list[str] = field(default_factory=list)
    """HOST:CONTAINER folders; the run folder and the folder of submission must be among them or visible anyway."""


@dataclass(kw_only=True)
class PreflightConfig:
    """Checks of every node before training; a bad node is excluded and the job starts again elsewhere."""

    enabled: bool = False
    """Run them at every start."""
    bandwidth_gb_s: float = 0
    """Least all-reduce bus bandwidth inside a node and between two nodes, GB/s; 0: only correctness."""
    free_gb: float = 10
    """Least free space of the run folder, GB."""
    local_gb: float = 1
    """Least free space of a node's own temporary folder, GB."""
    skew_s: float = 2
    """Largest difference of a node's clock from the first node's, seconds."""


@dataclass(kw_only=True)
class Profile:
    """One site."""

    partition: str = ""
    """SLURM partition; empty: the site's default."""
    account: str = ""
    """Account to charge; empty: the user's default."""
    qos: str = ""
    """Quality of service; empty: the default."""
    time: str = "24:00:00"
    """Time limit of one job, HH:MM:SS or D-HH:MM:SS; UNLIMITED where the partition has none."""
    gpus_per_node: int = 8
    """GPUs of a node; 0: train on CPUs."""
    tasks_per_node: int = 0
    """Ranks of a node; 0: one per GPU."""
    cpus_per_task: int = 8
    """Cores of a rank."""
    mem: str = "0"
    """Host memory of a node as sbatch --mem reads it; "0" is all of it, empty the site's default."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for."""
    exclusive: bool = True
    """Whole nodes."""
    exclude: list[str] = field(default_factory=list)
    """Nodes never to use."""
    sbatch: list[str] = field(default_factory=list)
    """More options of sbatch, for example "--switches=1"."""
    srun: list[str] = field(default_factory=list)
    """More options of srun, for example "--cpu-bind=none"."""
    starter: Literal["srun", "torchrun", "c10d"] = "srun"
    """srun: one task per rank, ranks in node order; torchrun: one per node, static ranks; c10d: its rendezvous, whose
    order of ranks does not follow the order of nodes."""
    requeue: Literal["requeue", "array", "singleton"] = "requeue"
    """How a job continues: scontrol requeue; or, where that is forbidden, array: `chain` elements one after another;
    singleton: each start submits its successor."""
    chain: int = 20
    """Elements of the array."""
    python: str = "python"
    """Python of the tasks, inside the container if there is one."""
    host_python: str = ""
    """Python of the batch script (3.9 or newer, standard library only); empty: the same as `python`."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """Container of the tasks."""
    modules: list[str] = field(default_factory=list)
    """`module load` these."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before anything else, for example "source .venv/bin/activate"; one that fails stops the run."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables: NCCL's interfaces and the like. No secrets: the script stays in the run folder."""
    shared: list[str] = field(default_factory=list)
    """Folders that all nodes see though their file system type does not say so."""
    gpu: str = "NVIDIA H100 80GB HBM3"
    """Name of the GPU for `estimate`, as CUDA reports it."""
    gpu_memory_gb: float = 79.1
    """Memory of one GPU, GiB; 0: do not check."""
    bus_gb_s: float = BUS_GB_S
    """All-reduce bus bandwidth of the GPUs of a node for `estimate`, GB/s, as preflight prints it; 0: its collectives
    take no time."""
    network_gb_s: float = 0
    """The same between two nodes, of all GPUs of a node together; 0: not known, and no time is counted."""
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    """Checks of the nodes."""

    @property
    def ranks_per_node(self) -> int:
        """Ranks that a node runs."""
        return self.tasks_per_node or self.gpus_per_node

    @property
    def seconds(self) -> float:
        """The time limit in seconds, infinite for UNLIMITED; 0 if `time` is none."""
        return seconds(self.time) or 0

    def problems(self, path: str = "site") -> Iterator[Problem]:
        """What no job could run with, by key below `path`."""
        if seconds(self.time) is None:
            yield Problem(f"{path}.time", f"{self.time!r} is not a time limit", '"24:00:00" or "2-00:00:00", in quotes')
        if self.gpus_per_node < 0 or self.tasks_per_node < 0 or self.ranks_per_node < 1:
            what = f"gpus_per_node {self.gpus_per_node} and tasks_per_node {self.tasks_per_node} start no rank"
            yield Problem(f"{path}.gpus_per_node", what, "8; or gpus_per_node 0 with tasks_per_node 2 for CPUs")
        elif self.gpus_per_node and self.ranks_per_node != self.gpus_per_node:
            what = f"{self.tasks_per_node} ranks on {self.gpus_per_node} GPUs; a rank drives exactly one"
            yield Problem(f"{path}.tasks_per_node", what, "0 for one per GPU")
        if self.cpus_per_task < 1:
            yield Problem(f"{path}.cpus_per_task", f"{self.cpus_per_task} is less than 1", "8")
        if self.container.kind != "none" and not self.container.image:
            yield Problem(f"{path}.container.image", f"{self.container.kind} needs an image", "/images/hope.sqsh")
        if self.requeue == "array" and self.chain < 2:
            yield Problem(f"{path}.chain", f"{self.chain} elements are no chain", "20")
        yield from self._option_problems(path)
        for key, default in (("bus_gb_s", BUS_GB_S), ("network_gb_s", 0)):
            if (speed := getattr(self, key)) < 0:
                yield Problem(f"{path}.{key}", f"{speed:g} GB/s is less than 0", f"{default:g}")
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                yield Problem(f"{path}.env", f"{name!r} is not the name of a variable", "NCCL_SOCKET_IFNAME")
            elif re.search(r"TOKEN|SECRET|PASSWORD|API_?KEY", name):
                yield Problem(
                    f"{path}.env", f"{name} looks like a secret; the script keeps it readable", "a file of your own"
                )

    def _option_problems(self, path: str) -> Iterator[Problem]:
        """Options of sbatch that would undo what the script relies on."""
        for option in self.sbatch:
            word = re.split(r"[=\s]", option, maxsplit=1)[0]
            if word == "--no-requeue" and self.requeue == "requeue":
                what = f"{option} contradicts {path}.requeue=requeue: the job could not start again"
                yield Problem(f"{path}.sbatch", what, f"{path}.requeue of array or singleton")
            elif word in OWN_OPTIONS:
                yield Problem(
                    f"{path}.sbatch", f"{option} is set by the script", OWN_OPTIONS[word].replace("site", path, 1)
                )


def find(name: str) -> str:
    """Path of a profile given by name (in launch/profiles/) or by path."""
    inside = FOLDER / f"{name}.yaml"
    return str(inside) if inside.exists() else name


def load(name: str, overrides: list[str]) -> Profile:
    """Read a profile and apply `key=value` overrides.

    Raises:
        ConfigError: with every problem at once.
    """
    path = find(name)
    problems: list[Problem] = []
    given = gather(path, overrides, {key.path for key in leaves(Profile) if key.hint is str}, problems)
    if not given.readable:
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise ConfigError(path, [Problem(where, what, f"a path, or one of: {known}") for where, what, _ in problems])
    fitter = Fitter(Profile, given.place)
    good = fitter.fit(plain(given.values), Profile, "")
    problems += fitter.problems
    merged = OmegaConf.merge(defaults(Profile), {} if good is BAD else good)
    assert isinstance(merged, DictConfig)
    if not problems:
        profile = OmegaConf.to_object(merged)
        assert isinstance(profile, Profile)
        problems += profile.problems()
        if not problems:
            return profile
    raise ConfigError(path, problems)
