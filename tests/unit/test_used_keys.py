"""A key that the chosen kind does not use is refused by name, and is not recorded."""

import dataclasses
import typing
from typing import Any

import pytest
import yaml

from configs.errors import ConfigError
from configs.schema import Config, load, to_yaml
from configs.tree import Key, Use, leaves, named_sections
from configs.used import put, recorded, word
from data_prep.config import DataConfig
from hope.config import ModelConfig

RUN: dict[str, Any] = {
    "run": {"name": "tiny"},
    "train": {"steps": 100, "seq_len": 64, "global_batch": 8, "micro_batch": 2},
}
KEYS = {key.path: key for key in leaves(Config)}
CONDITIONAL = [key for key in KEYS.values() if key.uses]
# What a governor can be set to so that a condition does not hold.
OTHERWISE = {
    "model.mixers.attention.positions": "none",
    "optim.name": "adamw", "optim.decay": "constant", "optim.m3.reading": "literal",
    "optim.dmgd.preconditioner": "none", "optim.dmgd.output": "identity", "optim.dmgd.memory": "linear",
    "optim.muon.memory": "linear",
    "model.mixers.hope.memory": "matrix", "train.spike_sigma": 0, "train.tasks": {}, "checkpoint.resume": "never",
    "optim.momentum_warmup": 0, "model.init": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _data_is_there(monkeypatch):
    monkeypatch.setattr(DataConfig, "problems", lambda self, vocab_size, seq_len: iter(()))


def written(tmp_path, *settings: tuple[str, Any]) -> str:
    values = yaml.safe_load(yaml.safe_dump(RUN))
    for path, value in settings:
        put(values, path, value)
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def without(use: Use) -> tuple[str, Any]:
    """A setting of the governor that the condition does not allow."""
    if use.listed:
        return use.governor, ["attention" if use.values[0] == "hope" else "hope"]
    return use.governor, OTHERWISE[use.governor]


def having(use: Use) -> tuple[str, Any]:
    """One that it does allow."""
    if use.values:
        return use.governor, [use.values[0]] if use.listed else use.values[0]
    if use.governor == "train.tasks":
        return use.governor, {"name": "file"}
    return use.governor, "a text" if str in typing.get_args(KEYS[use.governor].hint) else 6


def default_of(key: Key) -> Any:
    field = key.field
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]


CASES = [(key, number) for key in CONDITIONAL for number in range(len(key.uses))]


@pytest.mark.parametrize(("key", "number"), CASES, ids=[f"{key.path}-{number}" for key, number in CASES])
def test_every_conditional_key_is_refused_by_name_even_with_its_default(tmp_path, key, number):
    """The conditions before this one hold, so that this one is the reason."""
    use, value = key.uses[number], default_of(key)
    governors = [*map(having, key.uses[:number]), without(use)]
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, *governors, (key.path, value)), [])
    [problem] = [found for found in caught.value.problems if found.path == key.path]
    assert problem.what.startswith("is not used: ")
    assert use.governor in problem.what
    assert "(line " in problem.what
    assert problem.fix.startswith("leave it out, or ")
    assert use.governor in problem.fix


@pytest.mark.parametrize("key", CONDITIONAL, ids=lambda key: key.path)
def test_the_same_key_is_taken_by_the_kind_that_uses_it(tmp_path, key):
    config = load(written(tmp_path, *map(having, key.uses), (key.path, default_of(key))), [])
    found = recorded(config)
    for part in key.path.split("."):
        found = found[part]
    assert found == default_of(key)


def test_every_key_of_a_section_that_belongs_to_a_kind_depends_on_it():
    """Complete: the sections by kind are known here, whatever only_if says."""
    kinds = {name: f"optim.{name}." for name in ("dmgd", "muon", "m3")}
    for name, section in kinds.items():
        own = [key for path, key in KEYS.items() if path.startswith(section)]
        assert own
        assert all(key.uses[0] == Use("optim.name", (name,), listed=False) for key in own)
    [sections] = filter(None, map(named_sections, dataclasses.fields(ModelConfig)))
    assert sections.keys() >= {"hope", "attention"}
    for name in (name for name, section in sections.items() if section.__module__.startswith("hope.")):
        own = [key for path, key in KEYS.items() if path.startswith(f"model.mixers.{name}.")]
        assert own
        assert all(key.uses[0] == Use("model.pattern", (name,), listed=True) for key in own)
    network = [key for path, key in KEYS.items() if path.startswith("optim.dmgd.mlp.")]
    assert len(network) == 4
    assert all(Use("optim.dmgd.memory", ("mlp", "mlp_only"), listed=False) in key.uses for key in network)


def test_conditions_speak_of_keys_that_exist():
    assert {use.governor for key in CONDITIONAL for use in key.uses} <= KEYS.keys()


def test_the_command_line_is_named_and_what_would_use_the_key(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path), ["optim.m3.alpha=1.0", "model.mixers.attention.rope_base=1e4", "train.spike_window=9"])
    assert [tuple(problem) for problem in caught.value.problems] == [
        (
            "model.mixers.attention.rope_base",
            "is not used: no layer of model.pattern is attention (command line: model.mixers.attention.rope_base=1e4)",
            "leave it out, or name attention in model.pattern",
        ),
        (
            "optim.m3.alpha",
            "is not used: optim.name is dmgd (command line: optim.m3.alpha=1.0)",
            "leave it out, or optim.name=m3",
        ),
        (
            "train.spike_window",
            "is not used: train.spike_sigma is 0.0 (command line: train.spike_window=9)",
            "leave it out, or set train.spike_sigma",
        ),
    ]


def test_an_unused_key_hides_no_other_problem(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path), ["optim.m3.alpha=2", "optim.lr=-1", "log.every=0"])
    assert {problem.path for problem in caught.value.problems} == {"optim.m3.alpha", "optim.lr", "log.every"}


def test_a_governor_that_is_wrong_itself_is_the_only_problem(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path), ["optim.name=adamm", "optim.m3.alpha=2"])
    assert [problem.path for problem in caught.value.problems] == ["optim.name"]


def test_a_condition_on_an_unused_key_does_not_count(tmp_path):
    """muon and m3 leave vectors to AdamW's setting, which has eps: there is no preconditioner to ask."""
    assert load(written(tmp_path), ["optim.name=muon", "optim.eps=1e-6"]).optim.eps == 1e-6
    with pytest.raises(ConfigError, match=r"optim\.dmgd\.preconditioner is none"):
        load(written(tmp_path), ["optim.dmgd.preconditioner=none", "optim.eps=1e-6"])


def test_conditions_follow_values_that_are_interpolated(tmp_path):
    file = written(tmp_path, ("run.dir", "m3"))
    assert load(file, ["optim.name=${run.dir}", "optim.m3.alpha=2"]).optim.m3.alpha == 2
    with pytest.raises(ConfigError, match=r"optim\.name is m3"):
        load(file, ["optim.name=${run.dir}", "optim.muon.matrix_rms=0.1"])


CHOICES = [
    [],
    ["optim.name=adamw"],
    ["model.mixers.hope.static=projected", "model.mixers.hope.output_gate=sigmoid", "model.mixers.hope.erase_max=1.9"],
    ["optim.name=m3", "optim.m3.reading=literal", "optim.decay=constant"],
    ["optim.dmgd.memory=mlp", "optim.dmgd.mlp.width=4", "optim.dmgd.output=rms_clip", "optim.dmgd.output_bound=2"],
    ["model.pattern=[hope, attention]", "model.mixers.hope.memory=mlp", "model.mixers.attention.rope_base=500"],
    ["model.pattern=[attention]", "train.spike_sigma=6", "train.spike_window=9", "checkpoint.resume=never"],
]


@pytest.mark.parametrize("words", CHOICES, ids=" ".join)
def test_what_is_written_has_the_used_keys_and_reads_back_equal(tmp_path, words):
    config = load(written(tmp_path), words)
    file = tmp_path / "b.yaml"
    file.write_text(to_yaml(config))
    assert load(str(file), []) == config
    assert yaml.safe_load(to_yaml(config)) == recorded(config)
    sections = recorded(config)["optim"].keys() & {"dmgd", "muon", "m3"}
    assert sections == ({config.optim.name} - {"adamw"})
    assert recorded(config)["model"]["mixers"].keys() == set(config.model.pattern)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "null"), (True, "true"), ("", '""'), (0.5, "0.5"), ("m3", "m3"), (1, "1")]
)
def test_values_are_shown_as_they_are_typed(value, text):
    assert word(value) == text
