"""The verdict on evidence that is made up: what is settled by rounding, and what rounding does not excuse."""

import pytest
import torch

from parallel.referee.evidence import Evidence
from parallel.referee.verdict import ROUNDING_FACTOR, Settled, compare, relative, table


def evidence(error: float = 0.0, state: float = 1.0) -> Evidence:
    """One parameter whose gradient is off by `error`, relative."""
    gradient = torch.tensor([1.0 + error], dtype=torch.float64)
    weights = {"w": [torch.ones(1)]}
    return Evidence([2.0], [1.0], {"w": [gradient]}, weights, {"0": state})


def settle_with(rounding: float, error: float):
    return lambda: lambda quantity: Settled(quantity, error, rounding)


def test_within_its_bound_nothing_is_settled():
    asked = []
    found = compare(evidence(), evidence(9e-6), "fp32", settle=lambda: asked.append(1))
    assert found["equal"]
    assert (found["settled"], asked) == ([], [])
    assert found["worst"] == pytest.approx(0.9)


def test_beyond_its_bound_but_within_rounding_is_equal_and_said():
    found = compare(evidence(), evidence(2e-5), "fp32", settle=settle_with(1e-5, 2.1e-5))
    assert found["equal"]
    assert found["worst"] == pytest.approx(2.1e-5 / (ROUNDING_FACTOR * 1e-5))
    [settled] = found["settled"]
    assert (settled["kind"], settled["name"], settled["rounding"]) == ("gradient", "w", 1e-5)
    assert "one device rounds by 1.0e-05" in table(found, 3)


@pytest.mark.parametrize("rounding", [0.0, 1e-6])
def test_beyond_its_bound_and_beyond_rounding_is_different(rounding):
    found = compare(evidence(), evidence(2e-5), "fp32", settle=settle_with(rounding, 2e-5))
    assert not found["equal"]
    assert found["worst"] == pytest.approx(2.0, rel=1e-3)
    assert "NOT rounding" in table(found, 3)


def test_a_missing_sum_stays_as_large_as_it_was():
    found = compare(evidence(), evidence(0.5), "fp32", settle=settle_with(1e-6, 0.5))
    assert not found["equal"]
    assert found["worst"] == pytest.approx(5e4)


def test_a_tolerance_of_ones_own_is_the_tolerance():
    assert not compare(evidence(), evidence(2e-5), "fp32", 1.5e-5, settle_with(1.0, 2e-5))["equal"]


def test_a_missing_parameter_or_a_state_that_is_off_is_a_difference():
    other = evidence()
    other.weights["x"], other.gradients["x"] = [torch.ones(1)], [torch.ones(1)]
    assert compare(evidence(), other, "fp32")["missing"] == ["x"]
    assert not compare(evidence(), other, "fp32")["equal"]
    assert not compare(evidence(), evidence(state=1.1), "fp32")["equal"]


def test_nan_is_a_difference():
    assert relative(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert not compare(evidence(), evidence(float("nan")), "fp32", settle=settle_with(1.0, 0.0))["equal"]
