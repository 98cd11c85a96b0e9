"""benchmarks/kill_resume.py: one of four ranks killed, the run resumed on two in another layout."""

import importlib
import json
from pathlib import Path

import pytest
from tiny import config_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def kill_resume(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("kill_resume")


@pytest.mark.slow
def test_losses_go_on_as_if_nothing_had_happened(kill_resume, tmp_path):
    file = tmp_path / "found.json"
    flags = ["--precision", "fp32", "--steps", "30", "--folder", str(tmp_path / "runs"), "--json", str(file)]
    assert kill_resume.main([config_file(tmp_path, documents=(200, 20)), *flags]) == 0
    found = json.loads(file.read_text())
    assert found["equal"]
    assert found["killed_after_step"] < 30
    assert 0 < found["resumed_at"] == found["durable"] < found["losses"][0]["step"] <= found["losses"][-1]["step"] == 30
    assert 0 < found["error"] < 2e-6  # another layout sums in another order: 0 would be another run's losses
    assert found["error_before_the_kill"] == 0
    assert all(save["blocked_s"] > 0 for save in found["saves"])


def test_a_missing_loss_is_no_small_error(kill_resume):
    losses = {1: 2.0, 2: 3.0}
    assert kill_resume.largest_error(losses, {1: 2.0, 2: 3.3}, range(1, 3)) == pytest.approx(0.1)
    assert kill_resume.largest_error(losses, {1: 2.0, 2: float("nan")}, range(1, 3)) == float("inf")
    for steps in (range(1, 4), range(3, 3)):
        with pytest.raises(kill_resume.Failed):
            kill_resume.largest_error(losses, losses, steps)
