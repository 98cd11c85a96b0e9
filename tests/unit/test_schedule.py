import math
from itertools import pairwise

import pytest

from hope.optim.config import OptimConfig
from hope.train.schedule import in_steps, learning_rate, same_until

RUN = {"peak": 2e-3, "warmup": 10, "steps": 110, "final": 0.1}


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_warmup_is_linear_and_reaches_the_peak_at_its_last_step(decay):
    assert learning_rate(1, decay=decay, **RUN) == pytest.approx(2e-4, rel=1e-15)
    assert learning_rate(5, decay=decay, **RUN) == pytest.approx(1e-3, rel=1e-15)
    assert learning_rate(10, decay=decay, **RUN) == 2e-3


@pytest.mark.parametrize(
    ("decay", "quarter", "middle", "end"),
    [
        ("cosine", 2e-3 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2), 1.1e-3, 2e-4),
        ("linear", 2e-3 * 0.775, 1.1e-3, 2e-4),
        ("constant", 2e-3, 2e-3, 2e-3),
    ],
)
def test_decay_has_its_exact_values(decay, quarter, middle, end):
    rates = [learning_rate(step, decay=decay, **RUN) for step in (35, 60, 110, 111, 10_000)]
    assert rates == pytest.approx([quarter, middle, end, end, end], rel=1e-14)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_rises_then_falls_at_every_step(decay):
    rates = [learning_rate(step, decay=decay, **RUN) for step in range(1, 111)]
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a > b for a, b in pairwise(rates[9:]))
    assert min(rates) > 0


def test_a_run_resumed_at_any_step_gets_the_same_rates():
    whole = [learning_rate(step, decay="cosine", **RUN) for step in range(1, 121)]
    for resumed in (1, 7, 10, 11, 60, 110, 115):
        again = [learning_rate(step, decay="cosine", **RUN) for step in range(resumed, 121)]
        assert again == whole[resumed - 1 :]


def test_without_warmup_the_first_step_is_already_decaying():
    rate = learning_rate(1, peak=1.0, warmup=0, steps=4, decay="linear", final=0.0)
    assert rate == 0.75


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"step": 0}, "step 0"),
        ({"peak": 0.0}, "peak"),
        ({"peak": math.nan}, "peak"),
        ({"warmup": 110}, "warmup 110"),
        ({"warmup": -1}, "warmup -1"),
        ({"final": 1.5}, "final 1.5"),
        ({"decay": "cosin"}, "'cosin'"),
    ],
)
def test_nonsense_is_refused_with_the_value(change, word):
    given = {"step": 1, "decay": "cosine", **RUN, **change}
    step = given.pop("step")
    with pytest.raises(ValueError, match=word):
        learning_rate(step, **given)


STABLE = {**RUN, "decay": "wsd", "length": 20}


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [
        ("linear", 2e-3 * 0.775, 1.1e-3),
        ("cosine", 2e-3 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2), 1.1e-3),
        ("sqrt", 1.1e-3, 2e-3 * (0.1 + 0.9 * (1 - math.sqrt(0.5)))),
    ],
)
def test_warm_up_stable_decay_has_its_exact_values(shape, quarter, half):
    rates = [learning_rate(step, shape=shape, **STABLE) for step in (5, 10, 11, 90, 95, 100, 110, 500)]
    assert rates == pytest.approx([1e-3, 2e-3, 2e-3, 2e-3, quarter, half, 2e-4, 2e-4], rel=1e-14)
    falling = [learning_rate(step, shape=shape, **STABLE) for step in range(90, 111)]
    assert all(a > b for a, b in pairwise(falling))


def test_a_decay_behind_nothing_but_the_warm_up_and_one_that_does_not_fit():
    whole = {**STABLE, "length": 100}
    linear = [learning_rate(step, decay="linear", **RUN) for step in range(1, 111)]
    assert [learning_rate(step, **whole) for step in range(1, 111)] == linear
    for wrong in ({"length": 101}, {"length": 0}, {"shape": "root"}):
        with pytest.raises(ValueError, match=r"does not fit behind 10|'root'"):
            learning_rate(1, **{**STABLE, **wrong})


def test_lengths_are_steps_or_fractions():
    assert [in_steps(length, 250) for length in (0, 1, 60, 60.0, 0.1, 0.001)] == [0, 1, 60, 60, 25, 1]
    by_fraction = OptimConfig(warmup=0.1, decay="wsd", decay_length=0.2)
    by_steps = OptimConfig(warmup=20, decay="wsd", decay_length=40)
    assert same_until(200, by_fraction, 200, by_steps, 200)
    assert not same_until(30, by_fraction, 200, by_fraction, 300)  # the warm-up became longer


def test_runs_are_the_same_as_long_as_both_are_stable():
    run = OptimConfig(warmup=10, decay="wsd", decay_length=20)
    branch = OptimConfig(warmup=10, decay="wsd", decay_length=5, decay_shape="sqrt")
    for step, same in ((1, True), (80, True), (81, False), (100, False)):
        assert same_until(step, run, 100, run, 1000) is same
        assert same_until(step, run, 100, branch, 1000) is same
    assert same_until(80, run, 1000, branch, 85)
    assert not same_until(86, run, 1000, branch, 85)  # beyond the end of one of them
    cosine = OptimConfig(warmup=10)
    assert same_until(10, cosine, 100, cosine, 1000)
    assert not same_until(11, cosine, 100, cosine, 1000)
    assert not same_until(5, run, 100, OptimConfig(lr=1e-3, warmup=10, decay="wsd", decay_length=20), 100)
