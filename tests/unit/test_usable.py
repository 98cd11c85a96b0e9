"""Values of the right type that no key can mean are refused where they are read, before anything counts with them."""

import pytest
from tiny import config_file

from configs.errors import ConfigError
from configs.schema import load


def refused(tmp_path, *words: str) -> dict[str, tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        load(config_file(tmp_path), list(words))
    return {path: (what, fix) for path, what, fix in caught.value.problems}


@pytest.mark.parametrize(
    ("word", "where"),
    [
        ("launch.limits.first_step=.nan", "launch.limits.first_step"),
        ("launch.slow=nan", "launch.slow"),
        ("model.norm_eps=1e400", "model.norm_eps"),
        ("optim.lr=.inf", "optim.lr"),
        ("data.sources=[{name: a, train: t, weight: .nan}]", "data.sources[0].weight"),
    ],
)
def test_a_number_that_is_not_finite(tmp_path, word, where):
    what, fix = refused(tmp_path, word)[where]
    assert "is not a finite number" in what
    assert f"(command line: {word})" in what or "[0]" in where
    assert fix == "0.1 or 3e-4"


@pytest.mark.parametrize(
    ("word", "most"),
    [
        ("model.mixers.hope.conv_width=4611686018427387904", 2**24),
        ("model.layers=1000000000000", 2**24),
        ("model.width=1000000000000001", 2**24),  # whose divisors would be sought one by one
        ("train.micro_batch=4611686018427387904", 2**24),
        ("optim.dmgd.mlp.width=99999999999999999999999", 2**24),
        ("train.eval_every=99999999999999999999999", 2**63 - 1),
    ],
)
def test_a_number_that_no_shape_has(tmp_path, word, most):
    path, _, number = word.partition("=")
    assert refused(tmp_path, word)[path] == (
        f"{int(number):,} is more than any machine holds (command line: {word})",
        f"at most {most:,}",
    )


def test_large_numbers_that_mean_something(tmp_path):
    config = load(
        config_file(tmp_path),
        ["run.seed=9223372036854775807", "train.steps=null", "train.tokens=12_800_000_000_000", "model.width=4096",
         "model.cms.periods=[1, 1_000_000_000]"],
    )  # fmt: skip
    assert config.run.seed == 2**63 - 1
    assert config.model.periods[1] == 10**9


def test_text_that_no_path_can_hold(tmp_path):
    what, _ = refused(tmp_path, 'data.heldout="x\\0y"')["data.heldout"]
    assert "'\\x00', which no path and no UTF-8 text can hold" in what
    assert "train.tasks" in refused(tmp_path, 'train.tasks={arc: "x\\0y"}')
