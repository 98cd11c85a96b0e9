"""log.wandb: a further place for the numbers that can neither end nor hold up a run."""

import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest

from hope.train.metrics import MetricsLog
from hope.train.sink import Background
from hope.train.throughput import Devices
from launch.tracker import wandb_sink

DEVICES = Devices(1, "cpu", None, None)


class Stub:
    """wandb: what it was told, and an error where one is wanted."""

    def __init__(self, fails: str = "", error: BaseException | None = None) -> None:
        self.fails, self.error = fails, error or RuntimeError("no network")
        self.settings, self.logged, self.finished = {}, [], False

    def _may_fail(self, where: str) -> None:
        if where == self.fails:
            raise self.error

    def init(self, **settings):
        self._may_fail("init")
        self.settings = settings
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, numbers, step):
        self._may_fail("log")
        self.logged.append((step, numbers))

    def finish(self):
        self._may_fail("finish")
        self.finished = True


def logged(tmp_path, monkeypatch, stub, resumed=False):
    """The lines on the console of a log with two records."""
    module = ModuleType("wandb")
    module.init = stub.init
    monkeypatch.setitem(sys.modules, "wandb", module if stub.fails != "import" else None)
    said = []
    sink = lambda: wandb_sink(tmp_path / "run", {"optim": {"lr": 1}}, resumed=resumed, say=said.append)
    log = MetricsLog(tmp_path / "run", steps=2, devices=DEVICES, tensorboard=False, sink=sink, say=said.append)
    for step in (1, 2):
        log.scalars({"step": step, "loss": 3.0 / step, "lr": None, "grad_norm": float("nan")})
    log.close()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    return said


def test_numbers_arrive_and_a_resumed_run_continues_its_curve(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    ids = []
    for resumed in (False, True, False):
        stub = Stub()
        assert not any("log:" in line for line in logged(tmp_path, monkeypatch, stub, resumed))
        assert stub.logged == [(1, {"loss": 3.0}), (2, {"loss": 1.5})]
        assert stub.finished
        assert (stub.settings["project"], stub.settings["name"]) == ("mine", "run")
        assert stub.settings["config"] == {"optim": {"lr": 1}}
        ids.append(stub.settings["id"])
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("error", [RuntimeError("no network"), SystemExit(1), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["import", "init", "log", "finish"])
def test_an_error_is_said_once_and_ends_nothing(tmp_path, monkeypatch, where, error):
    said = logged(tmp_path, monkeypatch, Stub(where, error))
    [line] = [line for line in said if line.startswith("log: wandb")]
    assert line.endswith("; training goes on without it")
    assert len(said) == 3


def test_one_that_never_answers_holds_nothing_up():
    never, said, began = threading.Event(), [], time.monotonic()
    sink = Background(never.wait, "wandb", said.append, waiting=3, patience_s=0.2)
    for step in range(9):
        sink.log({"loss": 1.0}, step)
    sink.close()
    assert time.monotonic() - began < 5
    assert said == ["log: wandb does not keep up; training goes on without it"]
    slow = Background(never.wait, "other", said.append, patience_s=0.2)
    slow.close()
    assert said[1:] == ["log: other did not end within 0.2 s; training goes on without it"]
    never.set()
