"""Names of earlier versions: whoever writes one is told what to write now."""

import pytest

from configs.errors import ConfigError
from configs.renamed import RENAMED
from configs.schema import Config, load
from configs.tree import leaves
from data_prep.config import DataConfig
from hope.config import ModelConfig

RUN = "run: {name: a}\ntrain: {steps: 100, seq_len: 64, global_batch: 8, micro_batch: 2}\n"


@pytest.fixture(autouse=True)
def _data_is_there(monkeypatch):
    monkeypatch.setattr(DataConfig, "problems", lambda self, vocab_size, seq_len: iter(()))


def problems(tmp_path, text: str, *words: str) -> list[tuple[str, str, str]]:
    file = tmp_path / "a.yaml"
    file.write_text(RUN + text)
    with pytest.raises(ConfigError) as caught:
        load(str(file), words)
    return [tuple(problem) for problem in caught.value.problems]


def test_every_new_name_is_one_and_no_old_name_is():
    known = {key.path for key in leaves(Config)}
    assert {new for names in RENAMED.values() for new in names} <= known
    assert not RENAMED.keys() & known


@pytest.mark.parametrize("old", list(RENAMED))
def test_every_old_name_is_refused_with_the_new_one_and_the_value(tmp_path, old):
    word = f"{old}=0.25"
    use = " or ".join(f"{new}=0.25" for new in RENAMED[old])
    assert problems(tmp_path, "", word) == [(old, f"was renamed (command line: {word})", f"use: {use}")]


def test_old_sections_in_a_file_are_refused_key_by_key(tmp_path):
    text = "model:\n  memory: {kind: mlp, eta_max: null}\noptim:\n  name: m3\n  matrix_rms: 0.1\n"
    assert problems(tmp_path, text) == [
        ("model.memory.kind", "was renamed (line 4)", "use: model.mixers.hope.memory=mlp"),
        ("model.memory.eta_max", "was renamed (line 4)", "use: model.mixers.hope.eta_max=null"),
        ("optim.matrix_rms", "was renamed (line 7)", "use: optim.m3.matrix_rms=0.1"),
    ]


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("hope", "model.pattern=[hope]"),
        ("hope_attention", "model.pattern=[attention]"),
        ("transformer", "model.pattern=[attention] model.cms.periods=[1]"),
        ("mamba", "model.pattern, a list of mixers; model.kind was one of hope, hope_attention, transformer"),
    ],
)
def test_the_kind_of_the_model_became_its_pattern(tmp_path, kind, use):
    what = f"was renamed (command line: model.kind={kind})"
    assert problems(tmp_path, "", f"model.kind={kind}") == [("model.kind", what, f"use: {use}")]


def test_a_rule_of_the_linear_family_that_is_a_mixer_now(tmp_path):
    word, use = "model.mixers.linear.rule=mamba2", "use: model.mixers.linear.rule=ssd, or model.pattern=[mamba2]"
    [(path, what, fix)] = problems(tmp_path, "", "model.pattern=[linear]", word)
    assert (path, what) == ("model.mixers.linear.rule", f"mamba2 was renamed (command line: {word})")
    assert fix.startswith(use)
    record = {"pattern": ["linear"], "mixers": {"linear": {"rule": "mamba2", "chunk": 32}}}
    section = ModelConfig.of(record).mixers["linear"]
    assert (section.rule, section.chunk) == ("ssd", 32)
    assert record["mixers"]["linear"]["rule"] == "mamba2"  # a record is not changed


def test_the_model_section_of_an_export_with_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match=r"the recorded model section cannot be read: .*'depth'"):
        ModelConfig.of({"pattern": ["hope"], "depth": 3})
    with pytest.raises(ValueError, match=r"cannot be read: .*'taps'"):
        ModelConfig.of({"kind": "hope", "memory": {"taps": 3}})
    assert ModelConfig.of({"kind": "transformer"}).periods == [1]
