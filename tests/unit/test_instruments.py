"""Phases, records and times of a step, without a step."""

from __future__ import annotations

import pytest
import torch
from models import named

from hope.config import CmsConfig
from hope.memory.config import MemoryConfig
from hope.model import Model
from hope.train.config import LogConfig, TrainConfig
from hope.train.heartbeat import Heartbeat
from hope.train.instruments import Instruments, Taken


class Told(Heartbeat):
    """Remembers every beat."""

    def __init__(self) -> None:
        super().__init__({})
        self.phases: list[tuple[str, int | None]] = []

    def __call__(self, phase: str, step: int | None = None) -> None:
        self.phases.append((phase, step))


def instruments(models: list[Model] | None = None, **log: int) -> tuple[Instruments, Told]:
    beat = Told()
    train = TrainConfig(steps=20, seq_len=8, global_batch=2, micro_batch=1, eval_every=4)
    settings = {"every": 3, **log}
    return (
        Instruments(beat, train, LogConfig(**settings), models or [], 0, 2, torch.device("cpu")),
        beat,
    )


def test_a_step_goes_through_its_phases() -> None:
    watching, beat = instruments()
    with watching.step(5, last=20), watching.passes() as phase:
        phase("forward")
        phase("backward")
    assert beat.phases == [("data", 5), ("forward", None), ("backward", None), ("optimizer", None)]
    record = watching.speed(5, flops_per_token=1.0)
    assert record["step_time_s"] >= record["data_time_s"] >= 0
    assert record["tokens_per_s"] == pytest.approx(16 / record["step_time_s"])
    assert record["eta_s"] == pytest.approx(15 * record["step_time_s"])
    assert record["mfu"] is None  # no peak is known of a CPU
    [busy] = watching.readings().items()
    assert busy[0].startswith("busy 0 ")
    assert 0 <= busy[1] <= record["step_time_s"]


def test_only_finished_steps_are_timed() -> None:
    watching, beat = instruments()
    with pytest.raises(ArithmeticError), watching.step(1, last=20), watching.passes():
        raise ArithmeticError
    assert [phase for phase, _ in beat.phases] == ["data"]
    with pytest.raises(RuntimeError, match="no step was timed"):
        watching.speed(1, flops_per_token=1.0)


@pytest.mark.parametrize(
    ("step", "last", "taken"),
    [
        (1, 20, Taken(logged=True, evaluated=False, drawn=False)),  # the first one is always logged
        (2, 20, Taken(logged=False, evaluated=False, drawn=False)),
        (3, 20, Taken(logged=True, evaluated=False, drawn=False)),
        (4, 20, Taken(logged=False, evaluated=True, drawn=False)),
        (5, 20, Taken(logged=False, evaluated=False, drawn=True)),
        (11, 11, Taken(logged=True, evaluated=True, drawn=False)),  # and the last one has everything that ends a run
    ],
)
def test_which_records_a_step_leaves(step: int, last: int, taken: Taken) -> None:
    watching, _ = instruments(histograms=5)
    assert watching.taken(step, last) == taken
    assert taken.line == (taken.logged or taken.evaluated)


def test_the_probe_collects_in_steps_that_leave_records_only() -> None:
    cms = CmsConfig(periods=[1], hidden=16)
    memory = MemoryConfig(projection_chunk=4, main_chunk=4)
    model = Model(named(memory=memory, vocab_size=32, width=16, layers=1, heads=2, cms=cms)).initialise(1)
    watching, _ = instruments([model], histograms=5)
    tokens = torch.zeros(8, 1, dtype=torch.long)
    with watching.step(2, last=20), watching.passes():
        model(tokens)
    assert "memory_norm.0" not in watching.readings()
    with watching.step(3, last=20), watching.passes():
        model(tokens)
    assert watching.readings()["memory_norm.0"] > 0


def test_an_update_is_worth_watching_if_a_line_comes_before_the_next() -> None:
    watching, _ = instruments()
    for period in (1, 2, 3, 4, 7):
        for step in range(1, 21):
            told = any(watching.taken(s, 20).logged for s in range(step, min(step + period, 21)))
            assert watching.logged_within(step, period, last=20) is told, (step, period)
