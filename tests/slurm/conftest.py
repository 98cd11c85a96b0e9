"""One private cluster for the whole session, and jobs in it."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import config_file

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, missing, wait_for

from launch.folder import RunFolder, read_json
from launch.placement import Request
from launch.plan import plan
from launch.runs import records
from launch.submit import send

PAYLOAD = Path(__file__).parent / "payload.py"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four virtual nodes with SLURM_CONF set for this process."""
    if absent := missing():
        pytest.skip(f"SLURM is not installed: no {', '.join(absent)} "
                    "(apt-get install --no-install-recommends slurmctld slurmd munge slurm-client)")  # fmt: skip
    started = Cluster()
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}
    os.environ.update({name: started.env[name] for name in before})
    try:
        started.start()
        yield started
    finally:
        started.stop()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class Submitted:
    """A job of the test: its run folder and its number."""

    def __init__(self, cluster: Cluster, run: RunFolder, job: str) -> None:
        self.cluster, self.run, self.job = cluster, run, job

    def wait(self, *states: str, seconds: float = 90) -> str:
        try:
            return self.cluster.wait(self.job, *states, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def wait_for(self, what: str, condition: Any, seconds: float = 60) -> Any:
        try:
            return wait_for(what, condition, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def log(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted(self.run.logs.rglob("*.*")) if p.is_file())

    def verdicts(self) -> list[dict]:
        return [v for v in records(self.run.control, "verdicts.jsonl") if "verdict" in v]

    def words(self) -> list[str]:
        return [v["verdict"] for v in self.verdicts()]

    def steps(self, rank: int) -> list[str]:
        """What the payload noted, `3` per step and `saved 3`."""
        path = self.run.root / f"steps.{rank}"
        return path.read_text().splitlines() if path.exists() else []

    def exits(self, attempt: str) -> list[dict]:
        return [read_json(path) for path in sorted((self.run.attempt(attempt) / "exit").glob("*.json"))]


@pytest.fixture(scope="session")
def submitted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`submitted(name, config overrides, site overrides, behaviour)`: a queued job; without a behaviour a real one."""
    folder = tmp_path_factory.mktemp("runs")
    site = folder / "site.yaml"
    site.write_text(
        f"{{partition: train, time: '00:10:00', gpus_per_node: 0, tasks_per_node: 2, cpus_per_task: 1, mem: '200', "
        f"exclusive: false, python: {sys.executable}, shared: [/tmp], preflight: {{free_gb: 0.1}}}}\n"
    )
    path = config_file(folder)

    def start(
        name: str, *overrides: str, behaviour: dict | None = None, nodes: int = 2, parity: bool = False
    ) -> Submitted:
        words = [f"run.name={name}", "launch.checkpoint_s=5", "launch.margin_s=5", *overrides]
        planned = plan(Request(path, tuple(words), str(site), nodes, parity))
        run = planned.job.run
        run.root.mkdir(parents=True, exist_ok=True)
        if behaviour is not None:
            (run.root / "behaviour.json").write_text(json.dumps(behaviour))
        number = send(planned, str(PAYLOAD) if behaviour is not None else None)
        return Submitted(cluster, run, number)

    start.site = site  # type: ignore[attr-defined]
    return start


LAYOUT = ("parallel.tensor=2", "train.steps=30", "checkpoint.every=10", "train.eval_every=0")


@pytest.fixture(scope="session")
def real(submitted: Any) -> Submitted:
    """The real program, tensor 2 x data 2 on two nodes, which gets USR1 once, as soon as it has made a step."""
    job = submitted("real", *LAYOUT, "site.exclude=[node4]")

    def interrupt() -> None:
        job.wait_for("the first step", lambda: len(records(job.run.root)) > 1, 180)
        job.cluster.run("scancel", "--signal=USR1", "--batch", job.job)

    threading.Thread(target=interrupt, daemon=True).start()
    return job
