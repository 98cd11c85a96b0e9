"""Which steps are thrown away, and when a run gives up."""

import json
import math

import pytest

from hope.train.config import TrainConfig
from hope.train.skips import SkipPolicy


def policy(**changes) -> SkipPolicy:
    return SkipPolicy(**{"max_skips": 3, "spike_sigma": 4.0, "spike_window": 4} | changes)


def test_a_nonfinite_norm_is_skipped_and_a_finite_one_ends_the_row():
    found = policy(spike_sigma=0.0)
    for norm in (math.nan, math.inf):
        assert found.judge(norm) == {"reason": "nonfinite_gradient"}
    assert found.stop is None
    assert found.judge(1.0) is None
    assert found.in_a_row == 0
    verdicts = [found.judge(math.nan) for _ in range(3)]
    assert all(verdicts)
    assert found.stop == "nonfinite_gradients"


def test_a_loss_far_above_a_full_window_is_skipped():
    found = policy()
    for loss in (2.0, 9.0, 2.2, 1.8, 2.0, 2.2, 1.8, 2.0):  # 9.0 passes: the window is not full
        assert found.judge(1.0, loss) is None
    bound = 2.0 + 4 * math.sqrt(0.02)  # of 2.0 2.2 1.8 2.0
    assert found.bound == pytest.approx(bound)
    assert found.judge(1.0, bound - 0.01) is None
    spike = found.judge(1.0, 5.0)
    assert spike["reason"] == "loss_spike"
    assert spike["loss"] == 5.0
    assert spike["bound"] == pytest.approx(found.bound)  # a skipped loss does not widen the window
    assert found.judge(1.0, math.nan)["reason"] == "loss_spike"
    assert found.judge(1.0, 5.0) is not None
    assert found.stop == "loss_spikes"


def test_without_a_bound_no_loss_is_a_spike():
    found = policy(spike_sigma=0.0)
    assert not found.needs_loss
    assert all(found.judge(1.0, loss) is None for loss in (1, 1, 1, 1, 1, 1e9))


def test_the_window_survives_a_checkpoint():
    found = policy()
    for loss in (2.0, 2.2, 1.8, 2.0, 7.0):
        found.judge(1.0, loss)
    again = policy()
    again.restore(json.loads(json.dumps(found.state())))
    assert (again.bound, again.in_a_row) == (found.bound, 1)
    assert again.judge(1.0, 7.0) is not None


def test_impossible_settings_are_refused():
    config = TrainConfig(steps=10, seq_len=8, global_batch=1, micro_batch=1, spike_sigma=-1.0, spike_window=1)
    assert {p[0] for p in config.problems()} == {"train.spike_sigma", "train.spike_window"}
