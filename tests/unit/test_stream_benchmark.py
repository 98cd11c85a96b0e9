"""benchmarks/stream.py: its plan, its table, and a whole run at tiny size whose figures hope.evaluate gives again."""

import argparse
import importlib
import json
from pathlib import Path

import pytest
import yaml
from tiny import config_file, token_set

from hope.evaluate.__main__ import main as evaluate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("stream")


def test_the_table_has_a_column_per_reach_over_the_seeds_at_the_best_rates(stream):
    plan = {
        "optimizers": {"muon": {"set": [], "lr": [1.0, 2.0], "lr_elementwise": [3.0]}},
        "order": [["muon", "a"], ["muon", "b"]], "seeds": [1, 2],
    }  # fmt: skip

    def row(lr: float, seed: int, heldout: float, far: float):
        reach = {"0": {"value": heldout, "error": 0.1}, "all": {"value": far, "error": 0.1}}
        rates = {"optimizer": "muon", "lr": lr, "lr_elementwise": 3.0, "parameters": 1_500_000}
        return {"model": "a", "seed": seed, "heldout": heldout, "reach": reach, **rates}

    lines = stream.table(plan, [row(1.0, 1, 4.0, 3.0), row(2.0, 1, 5.0, 1.0), row(1.0, 2, 4.2, 3.4)]).splitlines()
    assert lines[0] == "| model | parameters | lr | seeds | 0 | all |"
    assert lines[2] == "| a | 1.5M | 1 | 2 | 4.100 (4.000 - 4.200) | 3.200 (3.000 - 3.400) |"
    assert "0 cells run" in lines[3]


def test_models_of_the_plan_differ_in_how_documents_are_read_and_have_equal_sizes(stream, tmp_path):
    plan = yaml.safe_load((BENCHMARKS / "stream.yaml").read_text())
    args = argparse.Namespace(json=tmp_path / "rows.json", data=("t", "h"), out="runs", seconds=9)
    documents, sizes = {}, []
    for optimizer, model in plan["order"]:
        cell = stream.recipe.grid(plan, optimizer, model)[0]
        config, _ = stream.recipe.config_of(plan, cell, stream.Reaches(plan, args).words(cell))
        assert config.checkpoint.every == config.train.total_steps, "a run without a checkpoint cannot be asked"
        assert all(reach % config.train.seq_len == 0 for reach in plan["reaches"])
        documents[model] = config.data.documents
        sizes.append(stream.recipe.parameters(config.model))
    assert documents == {model: "stream" if model.endswith("stream") else "carry" for model in documents}
    assert max(sizes) < 1.02 * min(sizes)


def test_without_data_nothing_is_begun(stream, capsys):
    with pytest.raises(SystemExit):
        stream.main(["--json", "rows.json"])
    assert "--data and --json are needed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_asked_in_windows_of_every_reach_and_in_one_pass(stream, tmp_path, capfd):
    token_set(tmp_path / "train", 30, 1)
    token_set(tmp_path / "heldout", 20, 2)
    plan = {
        "config": config_file(tmp_path, "matrix"), "common": ["train.steps=4"], "checkpoint_every": 4,
        "models": {"hope": []}, "reaches": [0, 32], "order": [["adamw", "hope"]], "seeds": [1],
        "optimizers": {"adamw": {"set": ["optim.name=adamw"], "lr": [1e-2], "lr_elementwise": [1e-2]}},
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    data, rows = [str(tmp_path / name) for name in ("train", "heldout")], tmp_path / "rows.json"
    flags = ["--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "runs"), "--json", str(rows)]
    flags += ["--data", *data]
    assert stream.main(flags) == 0
    [row] = json.loads(rows.read_text())
    assert "| hope |" in capfd.readouterr().out
    assert list(row["reach"]) == ["0", "32", "all"]

    def again(*how: str) -> float:
        target = tmp_path / "again.json"
        target.unlink(missing_ok=True)
        run = str(tmp_path / "runs" / "hope_adamw_0.01_0.01_1")
        assert evaluate([run, "--tokens", f"heldout={data[1]}", "--json", str(target), *how]) == 0
        return json.loads(target.read_text())["sources"]["heldout"]["result"]["nats_per_token"]["value"]

    seq_len = stream.load(plan["config"], [], check=False).train.seq_len
    found = {name: told["value"] for name, told in row["reach"].items()}
    assert found["0"] == pytest.approx(again())
    assert found["32"] == pytest.approx(again("--window", str(seq_len + 32), "--stride", str(seq_len)))
    assert found["all"] == pytest.approx(again("--carry"))
    assert len({round(value, 6) for value in found.values()}) == 3, "a state that reaches further changes the loss"
