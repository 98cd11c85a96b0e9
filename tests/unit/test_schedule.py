import math
from itertools import pairwise

import pytest

from hope.train.schedule import learning_rate

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
