"""configs/sizes: every model of configs/models at every size has the parameters of the Transformer++ of that size."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from configs.errors import ConfigError
from configs.schema import Config, load, to_yaml
from data_prep.config import DataConfig
from hope.config import CmsConfig, ModelConfig
from hope.matched import WITHIN, match, matched_hidden, parameters, transformer_of

ROOT = Path(__file__).parents[2]
SIZES = sorted((ROOT / "configs/sizes").glob("*.yaml"))
MODELS = sorted((ROOT / "configs/models").glob("*.yaml"))
FAMILY = (ROOT / "docs/family.md").read_text().partition("# The linear family")[0]
MILLIONS = {"17m": 17.3, "340m": 334.0, "760m": 728.7, "1.3b": 1272.8}


@pytest.fixture(autouse=True)
def _data_is_there(monkeypatch):
    monkeypatch.setattr(DataConfig, "problems", lambda *args: iter(()))


def loaded(*words: str | Path, base: str = "hope_17m_1xh200") -> Config:
    return load(str(ROOT / f"configs/{base}.yaml"), [str(word) for word in words])


def cases() -> Iterator[object]:
    """Every preset at every size, the two in the middle among the slow ones."""
    for size in SIZES:
        marks = pytest.mark.slow if size.stem in ("340m", "760m") else ()
        yield from (pytest.param(size, preset, marks=marks, id=f"{size.stem}-{preset.stem}") for preset in MODELS)


@functools.cache
def wanted_of(size: Path) -> int:
    """Parameters of the Transformer++."""
    return parameters(loaded(ROOT / "configs/models/transformer.yaml", size).model)


@pytest.mark.parametrize(("size", "preset"), cases())
def test_every_model_at_every_size_has_the_parameters_of_its_transformer(size, preset):
    config, wanted = loaded(preset, size), wanted_of(size)
    assert wanted == pytest.approx(1e6 * MILLIONS[size.stem], rel=1e-3)
    assert abs(parameters(config.model) - wanted) <= WITHIN * wanted
    given = yaml.safe_load(size.read_text())
    model = config.model
    assert (model.width, model.layers, model.heads) == tuple(given["model"][k] for k in ("width", "layers", "heads"))
    assert (model.head_dim, config.train.seq_len) == (64, given["train"]["seq_len"])
    assert list(model.problems()) == []
    [line] = [line for line in FAMILY.splitlines() if line.startswith(f"| `{preset.stem}` | ") and line.count("|") == 6]
    assert int(line.split("|")[2 + list(MILLIONS).index(size.stem)]) == model.hidden_per_level()


@pytest.mark.parametrize("preset", MODELS, ids=lambda path: path.stem)
def test_heads_and_mlps_divide_over_the_tensor_ranks_of_a_node(preset):
    config = loaded(preset, ROOT / "configs/sizes/1.3b.yaml")
    assert config.model.heads % 8 == config.model.hidden_per_level() % 8 == 0


def test_the_order_of_files_is_no_matter():
    size, preset = ROOT / "configs/sizes/17m.yaml", ROOT / "configs/models/kda.yaml"
    assert loaded(size, preset).model == loaded(preset, size).model


def test_what_a_run_records_is_the_number(tmp_path):
    config = loaded(ROOT / "configs/models/kda.yaml", ROOT / "configs/sizes/17m.yaml")
    assert config.model.cms.hidden == 832
    (tmp_path / "recorded.yaml").write_text(to_yaml(config))
    assert load(str(tmp_path / "recorded.yaml"), []) == config


def test_the_transformer_is_itself():
    config = loaded(ROOT / "configs/models/transformer.yaml", ROOT / "configs/sizes/340m.yaml").model
    assert parameters(config) == parameters(transformer_of(config))
    assert config.hidden_per_level() == 8 * 1024 // 3 // 16 * 16


def test_a_model_that_is_larger_without_mlps_is_refused_with_the_numbers():
    words = ["model.width=128", "model.heads=4", "model.layers=4", "model.cms.hidden=matched", "train.seq_len=-1"]
    with pytest.raises(ConfigError) as caught:
        loaded(ROOT / "configs/models/titans_mal.yaml", *words)
    found = {problem.path: problem for problem in caught.value.problems}
    assert set(found) == {"model.cms.hidden", "train.seq_len"}
    whole = ModelConfig(["attention"], 8192, 128, 4, 4, cms=CmsConfig(periods=[1]))
    assert found["model.cms.hidden"].what.startswith("matched: with MLPs of 1 it has ")
    assert found["model.cms.hidden"].what.endswith(f"a Transformer++ of its size {parameters(whole):,}")


def test_another_word_is_refused_and_other_problems_come_first():
    with pytest.raises(ConfigError, match="'machted' is not a whole number or one of matched or null"):
        loaded("model.cms.hidden=machted")
    with pytest.raises(ConfigError) as caught:
        loaded("model.cms.hidden=matched", "model.heads=5")
    assert [problem.path for problem in caught.value.problems] == ["model.heads"]


def test_a_model_that_nobody_matched_cannot_be_built():
    config = ModelConfig(["hope"], 512, 64, 2, 2, cms=CmsConfig(hidden="matched"))
    with pytest.raises(ValueError, match="no number yet"):
        parameters(config)
    wanted = parameters(transformer_of(config))
    assert match(config).cms.hidden == matched_hidden(config, wanted)
    assert parameters(match(config)) == pytest.approx(wanted, rel=WITHIN)
