"""benchmarks/steps_to.py: where a curve first crosses a target, Welch's t, and which runs are read."""

import importlib
import json
import math
from pathlib import Path

import pytest
import yaml

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def steps_to(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("steps_to")


def test_the_first_crossing_lies_between_two_evaluations(steps_to):
    curve = [(0, 9.0), (10, 5.0), (20, 3.0), (30, 4.0), (40, 1.0)]
    at = lambda target: steps_to.first_step(curve, target)
    assert [at(9.0), at(7.0), at(5.0), at(4.0), at(3.5), at(3.0)] == [0.0, 5.0, 10.0, 15.0, 17.5, 20.0]
    assert at(2.0) == pytest.approx(30 + 10 * 2 / 3)  # the way up again does not count
    assert at(0.9) is None


def test_two_sided_probabilities_are_those_of_tables(steps_to):
    """Student's distribution: 1 and 2 degrees have closed forms, 4 and 10 are from tables of the 5 % points."""
    for t in (0.3, 1.0, 7.0):
        assert steps_to.two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-9)
        assert steps_to.two_sided(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-9)
    assert steps_to.two_sided(2.776445, 4) == pytest.approx(0.05, abs=1e-6)
    assert steps_to.two_sided(2.228139, 10) == pytest.approx(0.05, abs=1e-6)


def test_welchs_t_of_two_small_samples(steps_to):
    """Variances of the means 1/3 and 4/3: t = -3 / sqrt(5/3), freedom (5/3)^2 / (1/18 + 16/18) = 50/17."""
    found = steps_to.welch([1.0, 2.0, 3.0], [3.0, 5.0, 7.0])
    assert found.t == pytest.approx(-3 / math.sqrt(5 / 3))
    assert found.freedom == pytest.approx(50 / 17)
    assert found.p == steps_to.two_sided(found.t, found.freedom)
    assert steps_to.welch([1.0], [2.0, 3.0]) is None
    assert steps_to.welch([1.0, 1.0], [3.0, 3.0]) is None


PLAN = {
    "models": {"a": [], "b": []},
    "optimizers": {name: {"set": [], "lr": [1.0, 2.0], "lr_elementwise": [3.0]} for name in ("adamw", "muon", "m3")},
    "order": [["adamw", "a"], ["muon", "a"], ["m3", "a"], ["muon", "b"]],
    "seeds": [1, 2],
}


def test_the_seeds_at_the_best_rates_are_read(steps_to, tmp_path, capsys):
    """muon needs half of the steps; its worse rate, which was quicker, and an incomplete grid do not count."""
    rows = []

    def ran(optimizer: str, lr: float, seed: int, losses: list[float]) -> None:
        cell = steps_to.Cell("a", optimizer, lr, 3.0, seed)
        rows.append(cell._asdict() | {"heldout": losses[-1]})
        (tmp_path / cell.name).mkdir()
        records = [{"step": 10 * i, "heldout_loss": loss, "loss": 1.0} for i, loss in enumerate(losses)]
        (tmp_path / cell.name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    ran("adamw", 1.0, 1, [9.0, 8.0, 6.0])
    ran("adamw", 1.0, 2, [9.0, 6.2, 5.8])
    ran("adamw", 2.0, 1, [9.0, 8.0, 7.0])
    ran("muon", 1.0, 1, [9.0, 1.0, 8.0])
    ran("muon", 2.0, 1, [9.0, 6.0, 4.0])
    ran("muon", 2.0, 2, [9.0, 7.0, 6.5])
    ran("m3", 1.0, 1, [9.0, 1.0, 1.0])
    plan, file = tmp_path / "plan.yaml", tmp_path / "rows.json"
    plan.write_text(yaml.safe_dump(PLAN))
    file.write_text(json.dumps(rows))
    flags = ["--plan", str(plan), "--json", str(file), "--out", str(tmp_path), "--model", "a"]
    assert steps_to.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Steps to a held-out loss of 6.000"
    assert lines[4] == "| adamw | 2 of 2 | 18 | 15 - 20 |  |  |  |  |"  # 20, and 10 + 10 x 0.2 / 0.4
    assert lines[5] == "| muon | 1 of 2 | 10 | 10 - 10 | 0.57 |  |  |  |"
    assert len(lines) == 6
    with pytest.raises(SystemExit):
        steps_to.main([*flags, "--of", "m3"])
