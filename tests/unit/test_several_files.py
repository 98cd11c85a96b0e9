"""YAML files among the overrides: merged in order, and named in messages."""

import re
from pathlib import Path

import pytest
import torch
from tiny import config_file, token_set

import pretrain_hope
from configs.errors import ConfigError
from configs.given import is_file
from configs.schema import load
from data_prep.config import DataConfig
from data_prep.training.index_build import read_config
from hope.config import CmsConfig, ModelConfig
from hope.memory.config import MemoryConfig
from hope.memory.in_context_config import InContextConfig
from hope.memory.linear_config import RULES, LinearConfig
from hope.memory.titans_config import TitansConfig
from hope.mixers.attention import AttentionConfig
from hope.mixers.mamba2 import Mamba2Config
from hope.mixers.titans_attention import GateConfig, LayerConfig
from hope.mixers.titans_context import ContextConfig
from hope.model import Model

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "configs/models").glob("*.yaml"))
FAMILY = {
    **{rule: {"linear": LinearConfig(rule=rule)} for rule in RULES if rule != "ssd"},
    "titans_lmm": {"titans": TitansConfig()},
    "titans_mag": {"titans_mag": GateConfig(window=512)},
    "titans_mac": {"titans_mac": ContextConfig(segment=128)},
    "titans_mal": {"titans_mal": LayerConfig(window=512)},
    "ttt_linear": {"titans": TitansConfig(rule="ttt_linear")},
    "ttt_mlp": {"titans": TitansConfig(rule="ttt_mlp")},
    "mamba2": {"mamba2": Mamba2Config()},
    "samba": {"mamba2": Mamba2Config(), "attention": AttentionConfig(window=512)},
}
"""Presets after papers: the sections of the mixers in their pattern."""


def files(folder: Path, **texts: str) -> list[str]:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return [str(folder / f"{name}.yaml") for name in texts]


def test_files_and_overrides_win_in_order(tmp_path):
    path = config_file(tmp_path)
    more, last = files(tmp_path, more="model: {cms: {periods: [1]}}\ntrain: {steps: 5}", last="train: {steps: 7}")
    assert load(path, [more]).train.steps == 5
    assert load(path, [more, "train.steps=6"]).train.steps == 6
    assert load(path, ["train.steps=6", more]).train.steps == 5
    assert load(path, [more, last]).train.steps == 7
    config = load(path, [more])
    assert (config.model.cms.periods, config.model.cms.variant, config.model.width) == ([1], "sequential", 16)


def test_problems_name_the_file_of_the_key(tmp_path):
    path = config_file(tmp_path)
    more, twice = files(tmp_path, more="model:\n  widht: 3\n  heads: two\n", twice="log:\n  every: 1\n  every: 2\n")
    with pytest.raises(ConfigError) as caught:
        load(path, [more, twice, "optim.lr=fast"])
    assert {problem.path: problem.what for problem in caught.value.problems} == {
        "model.widht": f"unknown key (line 2 of {more})",
        "model.heads": f"'two' is not a whole number (line 3 of {more})",
        "log.every": f"given twice, on lines 2 and 3 (in {twice})",
        "optim.lr": "'fast' is not a number (command line: optim.lr=fast)",
    }


def test_a_key_is_placed_where_it_was_given_last(tmp_path):
    path = config_file(tmp_path)
    [more] = files(tmp_path, more="model:\n  width: wide\n")
    for words, place in (([more, "model.width=broad"], "command line"), (["model.width=broad", more], "line 2 of")):
        with pytest.raises(ConfigError, match=rf"model\.width .*\({place}"):
            load(path, words)


def test_a_file_that_cannot_be_read(tmp_path):
    path = config_file(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(path, ["configs/models/transformr.yaml", "log.every=0"])
    [problem] = caught.value.problems
    assert problem.what == "cannot read configs/models/transformr.yaml: No such file or directory"
    assert problem.fix.startswith("did you mean: configs/models/transformer.yaml")
    [flat] = files(tmp_path, flat="model: {cms: [1]}\n")
    with pytest.raises(ConfigError, match=r"flat\.yaml cannot be merged: Cannot merge incompatible"):
        load(path, [flat])
    [bad] = files(tmp_path, bad="model: [a\n")
    with pytest.raises(ConfigError, match=r"not valid YAML.*in .*bad\.yaml"):
        load(path, [bad])


@pytest.mark.parametrize(
    ("word", "file"),
    [
        ("a.yaml", True),
        ("./a=b/c.yml", True),
        ("run.name=a.yaml", False),
        ("a.yaml=3", False),
        ("train.steps=5", False),
    ],
)
def test_which_words_are_files(word, file):
    assert is_file(word) is file


@pytest.mark.parametrize("preset", [*PRESETS, ROOT / "configs/optim/muon.yaml"], ids=lambda path: path.stem)
def test_a_preset_over_the_quickstart_would_run(tmp_path, capsys, preset):
    token_set(tmp_path / "train", 200, 0, 8192)
    token_set(tmp_path / "heldout", 60, 1, 8192)
    data = [f"data.train={tmp_path}/train", f"data.heldout={tmp_path}/heldout"]
    words = [str(ROOT / "configs/quickstart.yaml"), str(preset), *data, "--dry-run"]
    assert pretrain_hope.main(words) == 0, capsys.readouterr().err
    assert preset.read_text().startswith("# ")


def test_presets_are_the_models_they_are_called_after(monkeypatch):
    monkeypatch.setattr(DataConfig, "problems", lambda *args: iter(()))
    models = {path.stem: load(str(ROOT / "configs/quickstart.yaml"), [str(path)]).model for path in PRESETS}
    size = {"vocab_size": 8192, "width": 128, "layers": 4, "heads": 4}
    assert models["hope"] == ModelConfig(["hope"], **size)
    assert models["hope_hybrid"] == ModelConfig(["hope", "hope", "hope", "attention"], **size)
    assert models["hope_attention"] == ModelConfig(["attention"], **size)
    assert (models["transformer"].pattern, models["transformer"].periods) == (["attention"], [1])
    printed = models["hope_paper"].mixers["hope"]
    assert (printed.memory, printed.forget, printed.read, printed.static) == ("mlp", "zero", "boundary", "identity")
    assert (printed.contribution, printed.momentum, printed.adaptive_query) == (1.0, 0.0, False)
    for name, sections in FAMILY.items():
        assert (models[name].pattern, models[name].periods) == (list(sections), [1])
        assert models[name].mixers == sections
    fast = [InContextConfig(chunk=chunk, objective="next", head_dim=32, hidden=64) for chunk in (16, 64)]
    hope = MemoryConfig(static="projected", output_gate="sigmoid")
    cms = CmsConfig(periods=[1, 4], in_context=fast)
    assert models["hope_in_context"] == ModelConfig(["hope"], **size, mixers={"hope": hope}, cms=cms)
    assert len(models) == 6 + len(FAMILY)


@pytest.mark.parametrize("rule", [*FAMILY, "hope_in_context"])
def test_a_preset_says_which_mlp_gives_it_the_parameters_of_a_transformer(monkeypatch, rule):
    """ "such as N at WIDTH", or "the same MLP"; within 2 %."""
    monkeypatch.setattr(DataConfig, "problems", lambda *args: iter(()))
    size = ["model.vocab_size=8192", "model.width=384", "model.layers=8", "model.heads=6"]
    preset = ROOT / f"configs/models/{rule}.yaml"
    said = re.search(r"such as (\d+) at 384|with the same MLP", preset.read_text())
    hidden = [f"model.cms.hidden={said[1]}"] if said[1] else []
    count = {}
    for path, words in ((preset, hidden), (ROOT / "configs/models/transformer.yaml", [])):
        model = load(str(ROOT / "configs/quickstart.yaml"), [str(path), *size, *words]).model
        with torch.device("meta"):
            count[path] = sum(p.numel() for p in Model(model).parameters())
    one, other = count.values()
    assert one == pytest.approx(other, rel=0.02)


def test_data_prep_reads_them_too(tmp_path):
    path = config_file(tmp_path)
    [more] = files(tmp_path, more="data: {seed: 7}\ntrain: {seq_len: 8}\n")
    data, seq_len = read_config(path, ["data.seed=3", more])
    assert (data.seed, seq_len) == (7, 8)
