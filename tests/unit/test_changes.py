"""What a resumed run does about a configuration that differs from its checkpoint's."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from configs.changes import differences, settle
from configs.errors import ConfigError
from configs.schema import Config
from hope.train.config import RunConfig, TrainConfig


def config(**on_change: str) -> Config:
    train = TrainConfig(steps=100, seq_len=64, global_batch=8, micro_batch=2)
    found = Config(run=RunConfig(name="a"), train=train)
    found.checkpoint.on_change = {key.replace("_dot_", "."): word for key, word in on_change.items()}
    return found


SAVED = dataclasses.asdict(config())


def test_the_same_configuration_has_no_differences() -> None:
    now = config(all="override")
    assert settle(now, SAVED, 1) == (now, [])


def test_layout_name_logging_and_saving_are_free() -> None:
    now = config()
    now.run.name, now.parallel.pipeline, now.log.every, now.checkpoint.every = "b", 2, 1, 7
    now.train.micro_batch, now.data.train = 4, "elsewhere/train"
    settled, rows = settle(now, SAVED, 2)
    assert settled == now
    assert len(rows) == 6
    assert "train.micro_batch: checkpoint 2, config 4, effective 4 (free)" in rows


def test_all_that_needs_a_word_is_asked_for_at_once() -> None:
    now = config()
    now.optim.lr, now.train.steps, now.model.mixers.hope.eta_max = 1e-4, 200, 0.125
    with pytest.raises(ConfigError) as error:
        settle(now, SAVED, 1)
    assert [path for path, _, _ in error.value.problems] == ["model.mixers.hope.eta_max", "optim.lr", "train.steps"]
    _, what, fix = error.value.problems[1]
    assert what == "checkpoint 0.0015, now 0.0001"
    assert fix == "checkpoint.on_change={optim.lr: override} for 0.0001, keep for 0.0015"


def test_keep_and_override_by_key_section_and_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("configs.changes.validate", lambda *args: None)  # there is no data to find
    now = config(optim="keep", optim_dot_lr="override", all="override")
    now.optim.lr, now.optim.beta1, now.train.steps = 1e-4, 0.8, 200
    settled, rows = settle(now, SAVED, 1)
    assert (settled.optim.lr, settled.optim.beta1, settled.train.steps) == (1e-4, 0.9, 200)
    assert rows == [
        "optim.lr: checkpoint 0.0015, config 0.0001, effective 0.0001 (override)",
        "optim.beta1: checkpoint 0.9, config 0.8, effective 0.9 (keep)",
        "train.steps: checkpoint 100, config 200, effective 200 (override)",
    ]


@pytest.mark.parametrize("word", ["keep", "override"])
def test_the_order_of_the_data_is_not_up_for_choice(word: str) -> None:
    now = config(all=word)
    now.data.seed, now.train.global_batch = 5, 16
    with pytest.raises(ConfigError) as error:
        settle(now, SAVED, 1)
    assert [path for path, _, _ in error.value.problems] == ["data.seed", "train.global_batch"]
    assert "the order of the data would change" in str(error.value)


def test_what_is_kept_must_fit_the_rest() -> None:
    saved = copy.deepcopy(SAVED)
    saved["train"]["steps"], saved["optim"]["warmup"] = 1000, 500
    now = config(optim="keep", train="override")
    now.optim.warmup = 10
    with pytest.raises(ConfigError, match="with the checkpoint's values") as error:
        settle(now, saved, 1)
    assert "optim.warmup" in [path for path, _, _ in error.value.problems]


def test_a_record_of_before_forget_was_a_key_says_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("configs.changes.validate", lambda *args: None)  # there is no data to find
    saved = copy.deepcopy(SAVED)
    del saved["model"]["mixers"]["hope"]["forget"]
    with pytest.raises(ConfigError, match=r"model\.mixers\.hope\.forget"):
        settle(config(), saved, 1)
    settled, _ = settle(config(model="keep"), saved, 1)
    assert settled.model.mixers["hope"].forget == "zero"


def test_keys_that_one_side_does_not_know() -> None:
    """From another version: a new key has its default, a dropped one is shown."""
    saved = copy.deepcopy(SAVED)
    del saved["optim"]["eps"]
    saved["optim"]["nesterov"] = True
    now = dataclasses.asdict(config())
    assert [(c.path, c.saved, c.now) for c in differences(saved, now, {})] == [
        ("optim.eps", "(absent)", 1e-8),
        ("optim.nesterov", True, "(absent)"),
    ]
