"""What a resumed run does about a configuration that differs from its checkpoint's."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from configs.changes import differences, settle
from configs.errors import ConfigError
from configs.renamed import current
from configs.schema import Config, of_record
from configs.used import lookup, recorded, without_unused
from hope.config import CmsConfig, ModelConfig
from hope.memory.config import MemoryConfig
from hope.mixers.attention import AttentionConfig
from hope.optim.config import OptimConfig
from hope.train.config import RunConfig, TrainConfig


def config(**on_change: str) -> Config:
    train = TrainConfig(steps=100, seq_len=64, global_batch=8, micro_batch=2)
    found = Config(run=RunConfig(name="a"), train=train)
    found.checkpoint.on_change = {key.replace("_dot_", "."): word for key, word in on_change.items()}
    return found


SAVED = recorded(config())


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
    now.optim.lr, now.train.steps, now.model.mixers["hope"].eta_max = 1e-4, 200, 0.125
    with pytest.raises(ConfigError) as error:
        settle(now, SAVED, 1)
    assert [path for path, _, _ in error.value.problems] == ["model.mixers.hope.eta_max", "optim.lr", "train.steps"]
    _, what, fix = error.value.problems[1]
    assert what == "checkpoint 0.0015, now 0.0001"
    assert fix == "'checkpoint.on_change={optim.lr: override}' for 0.0001, keep for 0.0015"


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


def wsd(**settings: object) -> Config:
    """Stable from step 10 to step 80 of 100."""
    found = config()
    found.optim.decay, found.optim.warmup, found.optim.decay_length = "wsd", 10, 20
    for key, value in settings.items():
        setattr(found.train if key in ("steps", "tokens") else found.optim, key, value)
    return found


@pytest.mark.parametrize(
    "change", [{"steps": 300}, {"steps": 70, "decay_length": 0.1}, {"decay": "constant"}, {"decay_shape": "sqrt"},
               {"steps": None, "tokens": 300 * 512}, {"final_lr": 0.0}],
)  # fmt: skip
def test_a_schedule_that_has_made_no_difference_yet_needs_no_word(change: dict) -> None:
    saved, now = recorded(wsd()), wsd(**change)
    settled, rows = settle(now, saved, 1, step=60)
    assert settled == now
    assert rows
    assert all(row.endswith("(same so far)") for row in rows)
    with pytest.raises(ConfigError):
        settle(now, saved, 1)  # nobody says how far the run has come
    with pytest.raises(ConfigError):
        settle(now, saved, 1, step=99)  # the decay has begun
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        settle(wsd(lr=1e-4, **change), saved, 1, step=60)


def test_under_a_cosine_more_steps_need_a_word() -> None:
    now = config()
    now.train.steps = 200
    with pytest.raises(ConfigError, match=r"train\.steps"):
        settle(now, SAVED, 1, step=61)


def test_records_without_the_newer_keys_say_what_was_done_then() -> None:
    saved = copy.deepcopy(SAVED)
    for section, key in (("optim", "lr_elementwise"), ("optim", "level_rate"), ("optim", "groups"),
                         ("optim", "momentum_warmup"), ("train", "tokens"), ("train", "eval_levels")):  # fmt: skip
        del saved[section][key]
    before = copy.deepcopy(saved)
    assert settle(config(), saved, 1) == (config(), [])
    assert saved == before
    now = config()
    now.optim.level_rate = 0.5
    with pytest.raises(ConfigError, match=r"optim\.level_rate *checkpoint 0\.0, now 0\.5"):
        settle(now, saved, 1)


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
    now = recorded(config())
    assert [(c.path, c.saved, c.now) for c in differences(saved, now, {})] == [
        ("optim.eps", "(absent)", 1e-8),
        ("optim.nesterov", True, "(absent)"),
    ]


def test_a_choice_is_asked_about_once_and_its_keys_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("configs.changes.validate", lambda *args: None)  # there is no data to find
    now = config()
    now.optim.name, now.optim.m3.alpha = "m3", 2.0
    with pytest.raises(ConfigError) as error:
        settle(now, SAVED, 1)
    assert [path for path, _, _ in error.value.problems] == ["optim.name"]
    now.checkpoint.on_change = {"optim.name": "override"}
    settled, rows = settle(now, SAVED, 1)
    assert settled == now
    assert "optim.m3.alpha: checkpoint (absent), config 2.0, effective 2.0 (override)" in rows
    now.checkpoint.on_change = {"optim": "keep"}
    settled, rows = settle(now, SAVED, 1)
    assert settled.optim == config().optim
    assert "optim.dmgd.erase: checkpoint 0.0, config (absent), effective 0.0 (keep)" in rows


def test_a_mixer_that_is_kept_keeps_its_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("configs.changes.validate", lambda *args: None)
    saved = copy.deepcopy(SAVED)
    saved["model"]["mixers"]["hope"]["eta_max"] = 0.125
    now = config(model="keep")
    now.model = ModelConfig(["attention"])
    settled, _ = settle(now, saved, 1)
    assert settled.model.pattern == ["hope"]
    assert settled.model.mixers == {"hope": MemoryConfig(eta_max=0.125)}
    now.checkpoint.on_change = {"model": "override"}
    assert settle(now, saved, 1)[0] == now


# Written by the version before mixers had sections, for a tiny model of each kind.
OLD = json.loads((Path(__file__).parents[1] / "golden/old_config.json").read_text())


@pytest.mark.parametrize(
    ("kind", "mixer", "section", "periods"),
    [
        (
            "hope",
            "hope",
            MemoryConfig(forget="zero", static="learned", output_gate="silu", projection_chunk=4, main_chunk=8),
            [1, 3],
        ),
        ("transformer", "attention", AttentionConfig(), [1]),
    ],
)
def test_a_record_of_an_earlier_version_says_what_it_said(kind, mixer, section, periods) -> None:
    record = without_unused(current(OLD[kind]), Config)
    settled = of_record(record)
    model = ModelConfig([mixer], 64, 16, 2, 2, mixers={mixer: section}, cms=CmsConfig(periods=periods))
    assert settled.model == model
    assert (settled.optim.lr, settled.optim.name, settled.optim.dmgd) == (0.01, "dmgd", OptimConfig().dmgd)
    record["train"]["tasks"] = {}  # a key that came later
    assert recorded(settled) == record
    assert settle(settled, OLD[kind], 1) == (settled, [])


@pytest.mark.parametrize(
    ("old", "values"),
    [
        ({"name": "m3", "m3_alpha": 2.0, "matrix_rms": 0.5}, {"optim.m3.alpha": 2.0, "optim.m3.matrix_rms": 0.5}),
        ({"name": "muon", "matrix_rms": 0.5}, {"optim.muon.matrix_rms": 0.5}),
        ({"memory": "mlp", "mlp_width": 3}, {"optim.dmgd.memory": "mlp", "optim.dmgd.mlp.width": 3}),
    ],
)
def test_flat_optimizer_sections_of_records(old: dict, values: dict) -> None:
    saved = copy.deepcopy(OLD["hope"])
    saved["optim"] |= old
    found = without_unused(current(saved), Config)
    assert {path: lookup(found, path) for path in values} == values
    assert found["optim"].keys() & {"dmgd", "muon", "m3"} == {saved["optim"]["name"]}
    assert not found["optim"].keys() & {"memory", "erase", "mlp_width", "matrix_rms", "m3_alpha"}
    recorded(of_record(found))  # knows every key


def test_a_record_that_says_what_nothing_says_today_is_refused() -> None:
    saved = copy.deepcopy(OLD["hope"])
    saved["model"]["kind"] = "mamba"
    with pytest.raises(ConfigError, match=r"model\.kind 'mamba' is none of hope, hope_attention, transformer"):
        settle(config(), saved, 1)
