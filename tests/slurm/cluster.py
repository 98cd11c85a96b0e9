"""A private Slurm of four nodes on this one host: real daemons, real jobs, nothing outside one temporary folder.

A node is a set of pid, mount and uts namespaces with its own hostname and /etc/hosts; killing its first process is a
power failure. All nodes share 127.0.0.1, so ports must differ between concurrent jobs. Needs root (or CAP_SYS_ADMIN)
and the packages slurmctld, slurmd, munge and slurm-client.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NODES, CPUS, GPUS, MEMORY_MB = 4, 8, 4, 16000
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"

CONF = """
ClusterName=sandbox
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
# quick failures; a site has 300, 30, 120 here
SlurmdTimeout=10
KillWait=5
MessageTimeout=5
UnkillableStepTimeout=20
MinJobAge=86400
FirstJobId={first}
ReturnToService=2
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=1000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
PartitionName=train Nodes=node[1-{nodes}] Default=YES MaxTime=UNLIMITED DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=node[1-{nodes}] MaxTime=UNLIMITED DefaultTime=10 PriorityTier=10 PreemptMode=OFF
"""  # noqa: E501

# pid 1 of a node: it reaps orphans, and everything on the node dies with it
NODE = """hostname "$1"; mount --bind "$2/hosts" /etc/hosts
slurmd -D -N "$1" -f "$2/slurm.conf" &
while :; do wait; sleep 1; done"""


def missing() -> list[str]:
    """Programs of Slurm that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def wait_for(what: str, condition: Callable[[], object], seconds: float = 60, pause: float = 0.1) -> object:
    """Poll until `condition()` is true and return its value; fail with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:.0f} s for {what}")
        time.sleep(pause)
    return found


class Cluster:
    """Daemons started by `start`, ended by `stop`; `run` calls a Slurm command."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """All daemons; returns when every node is idle."""
        for name in ("log", "state", "spool", "dev"):
            (self.folder / name).mkdir()
        self._write_files()
        self._daemon("munged", "munged", "-F", "--force", f"--socket={self.folder}/munge.sock",
                     f"--key-file={self.folder}/munge.key", f"--seed-file={self.folder}/munge.seed",
                     f"--log-file={self.folder}/log/munged.log", f"--pid-file={self.folder}/munged.pid")  # fmt: skip
        wait_for("munged", (self.folder / "munge.sock").exists, 20, 0.02)
        self._daemon("slurmctld", "slurmctld", "-D", "-f", f"{self.folder}/slurm.conf")
        for number in range(1, NODES + 1):
            self.power_on(f"node{number}")
        wait_for("idle nodes", lambda: self.idle() == NODES, 60)

    def _write_files(self) -> None:
        port = _free_ports(NODES + 1)
        user = os.environ.get("USER") or "root"
        first = 1 + 30 * (os.getpid() % 2000)  # a job's port follows its number, and this host may have other clusters
        text = CONF.format(host=socket.gethostname().split(".")[0], port=port, user=user, folder=self.folder,
                           nodes=NODES, first=first)  # fmt: skip
        hosts = Path("/etc/hosts").read_text()
        for number in range(1, NODES + 1):
            name = f"node{number}"
            hosts += f"127.0.0.1 {name}\n"
            where = f"NodeHostname={name} NodeAddr=127.0.0.1 Port={port + number}"
            size = f"Sockets=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory={MEMORY_MB} Gres=gpu:fake:{GPUS}"
            text += f"NodeName={name} {where} {size}\n"
        for gpu in range(GPUS):  # Slurm wants device files before it sets CUDA_VISIBLE_DEVICES
            (self.folder / "dev" / f"gpu{gpu}").symlink_to("/dev/null")
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(f"Name=gpu Type=fake File={self.folder}/dev/gpu[0-{GPUS - 1}]\n")
        (self.folder / "plugstack.conf").touch()
        (self.folder / "hosts").write_text(hosts)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)

    def _daemon(self, name: str, *command: str) -> None:
        log = (self.folder / "log" / f"{name}.out").open("a")
        self.daemons[name] = subprocess.Popen(
            command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        log.close()

    def power_on(self, node: str) -> None:
        """Boot a node."""
        isolate = ("unshare", "--fork", "--pid", "--mount", "--uts", "--kill-child", "--mount-proc")
        self._daemon(node, *isolate, "bash", "-c", NODE, "node", node, str(self.folder))

    def power_off(self, node: str) -> None:
        """Every process on the node is killed at once."""
        process = self.daemons.pop(node)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """End everything and remove the folder."""
        for name in reversed(list(self.daemons)):
            process = self.daemons.pop(name)
            process.send_signal(signal.SIGKILL if name.startswith("node") else signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """Output of a command with this cluster's SLURM_CONF."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120, cwd=cwd)
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def idle(self) -> int:
        """Nodes that wait for work."""
        return len(re.findall("^idle$", self.run("sinfo", "-h", "-N", "-p", "train", "-o", "%T", check=False), re.M))

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ... of the job (of the first element that has not ended, of an array)."""
        return (self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T", check=False).split() or [""])[0]

    def restarts(self, job: str) -> int:
        """How often the job was requeued."""
        found = re.search(r"Restarts=(\d+)", self.run("scontrol", "-o", "show", "job", job))
        return int(found[1]) if found else 0

    def wait(self, job: str, *states: str, seconds: float = 90) -> str:
        """Poll until the job is in one of `states`; returns it. (`sbatch --wait` polls with growing pauses.)"""
        try:
            return str(wait_for(f"job {job}", lambda: (now := self.state(job)) in states and now, seconds))
        except AssertionError as error:
            shown = self.run("scontrol", "show", "job", job, check=False)
            raise AssertionError(f"{error} to be {' or '.join(states)}\n{shown}") from None


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring TCP ports that nobody listens on, below the ephemeral ones."""
    for base in range(12000 + os.getpid() % 1000, 15000, count):
        try:
            for port in range(base, base + count):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
            return base
        except OSError:
            continue
    raise RuntimeError(f"no {count} free neighbouring ports in 12000-15000")
