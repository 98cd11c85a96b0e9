"""benchmarks/family.py on made-up rows: what is joined, what is blank, and where dots lie."""

import importlib
import json
from pathlib import Path

import pytest
import yaml

from hope.config import ModelConfig
from hope.train.plot.picture import Dot, Words

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["model.width=16", "model.heads=2", "model.layers=2", "model.vocab_size=64"]
PLAN = {
    "config": "configs/quickstart.yaml",
    "common": SMALL,
    "models": {name: [f"configs/models/{name}.yaml"] for name in ("transformer", "retnet", "kda")},
    "optimizers": {"muon": {"set": [], "lr": [1.0, 2.0], "lr_elementwise": [3.0]}},
    "order": [["muon", "transformer"], ["muon", "retnet"], ["muon", "kda"], ["adamw", "kda"]],
    "seeds": [1, 2],
}


@pytest.fixture
def family(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("family")


def loss(model: str, lr: float, seed: int, heldout: float | None) -> dict:
    return {"model": model, "optimizer": "muon", "lr": lr, "lr_elementwise": 3.0, "seed": seed, "heldout": heldout,
            "parameters": 1_500_000}  # fmt: skip


def speed(family, model: str, tokens_per_s: float | None, **others) -> dict:
    row = dict.fromkeys(family.SETTING) | {"model": model, "heads": 2, "hope": {}, "size": "17m", "seq": 8} | others
    return row | ({"not_compared": "no"} if tokens_per_s is None else {"tokens_per_s": tokens_per_s})


def probe(name: str, model: str, rate: float, *accuracies: float) -> dict:
    tests = {f"T{number}": {"accuracy": {"value": value}} for number, value in enumerate(accuracies)}
    return {"probe": name, "model": model, "rate": rate, "seed": 1, "tests": tests}


LOSSES = [
    *(loss("transformer", lr, 1, heldout) for lr, heldout in ((1.0, 4.0), (2.0, None))),
    loss("transformer", 1.0, 2, 4.5),
    *(loss("retnet", lr, 1, heldout) for lr, heldout in ((1.0, 3.9), (2.0, 3.5))),
    loss("kda", 1.0, 1, 1.0),  # half of a grid
]  # fmt: skip


def files(family, folder: Path) -> list[str]:
    written = {
        "plan.yaml": yaml.safe_dump(PLAN),
        "losses.json": json.dumps(LOSSES),
        "speeds.json": json.dumps([
            speed(family, "transformer", 2000.0), speed(family, "kda", 500.0), speed(family, "retnet", None),
            speed(family, "kda", 9.0, seq=16), speed(family, "a model that is in no plan", 9.0, gpu="another"),
        ]),
        "probes.json": json.dumps([
            probe("mqar", "kda", 0.1, 0.5, 0.7), probe("mqar", "kda", 0.2, 0.1, 0.1),
            probe("s5", "transformer", 0.1, 0.25),
        ]),
    }  # fmt: skip
    for name, text in written.items():
        (folder / name).write_text(text)
    plan, losses, speeds, probes = (str(folder / name) for name in written)
    return ["--recipe", plan, losses, "--throughput", speeds, "--probes", probes]


def test_one_row_per_model_with_blanks_where_nothing_was_measured(family, tmp_path, capsys):
    flags = [*files(family, tmp_path), "--where", "seq=8", "--json", str(tmp_path / "family.json")]
    assert family.main([*flags, "--picture", str(tmp_path / "family.svg")]) == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    keys, retnet = 2 * 2 * 8 * 2 * 8 * 2, 2 * 2 * 8 * 8 * 4  # 256 tokens in bf16; 2 layers and heads of 8 x 8 in fp32
    kda = retnet + 2 * 3 * 3 * 16 * 4
    assert lines == [
        f"| retnet | 1.5M | 3.500 | 1 | 3.500 - 3.500 |  | {retnet:,} |  |  |  |",
        f"| transformer | 1.5M | 4.250 | 2 | 4.000 - 4.500 | 2,000 | {keys * 256 // 8:,} |  |  | 25.0 |",
        f"| kda |  |  |  |  | 500 | {kda:,} | 60.0 |  |  |",
    ]
    rows = json.loads((tmp_path / "family.json").read_text())
    assert [row["model"] for row in rows] == ["retnet", "transformer", "kda"]
    assert (rows[2]["heldout"], rows[2]["mqar"], rows[2]["parity"]) == (None, 0.6, None)
    assert (tmp_path / "family.svg").read_text().count("<circle") == 3  # two states and one speed


@pytest.mark.slow
def test_files_that_are_not_there_yet_are_said_and_blank(family, tmp_path, capsys):
    plan = files(family, tmp_path)[1]
    assert family.main(["--recipe", plan, str(tmp_path / "later.json")]) == 0
    out, err = capsys.readouterr()
    assert err == f"no rows yet: {tmp_path}/later.json\n"
    assert [line.split("|")[2:7] for line in out.splitlines()[2:]] == [["  "] * 5] * 3
    picture = str(tmp_path / "family.svg")
    assert family.main(["--recipe", plan, str(tmp_path / "later.json"), "--picture", picture]) == 2
    assert "there is nothing to draw" in capsys.readouterr().err


def test_words_of_a_plan_that_no_configuration_takes_are_told(family, tmp_path, capsys):
    plan, rows = tmp_path / "plan.yaml", tmp_path / "rows.json"
    plan.write_text(yaml.safe_dump({**PLAN, "common": ["model.tpyo=3"]}))
    rows.write_text("[]")
    assert family.main(["--recipe", str(plan), str(rows)]) == 2
    assert "model.tpyo" in capsys.readouterr().err


def test_a_model_in_two_plans_counts_where_it_has_a_loss(family):
    row = lambda model, heldout: {"model": model, "heldout": heldout}
    rows = family.joined([row("a", None), row("b", 3.0), row("a", 2.0)], {}, [])
    assert [(row["model"], row["heldout"]) for row in rows] == [("a", 2.0), ("b", 3.0)]


def test_speeds_of_several_settings_are_not_one_column(family, tmp_path, capsys):
    assert family.main(files(family, tmp_path)) == 2
    assert "speeds are of several settings, seq 16, 8: --where seq=16" in capsys.readouterr().err
    rows = [speed(family, "hope", 1.0, heads=2), speed(family, "hope", 2.0, heads=4)]
    with pytest.raises(ValueError, match=r"hope has 2 speeds.*--where heads=2"):
        family.speeds(rows, {"hope"}, {})
    assert family.speeds(rows, {"hope"}, {"heads": 4}) == {"hope": 2.0}
    with pytest.raises(SystemExit):
        family.arguments(["--recipe", "a", "b", "--where", "colour=red"])


def test_bytes_of_state_are_those_of_every_layer(family):
    config = ModelConfig(["linear", "attention"], 64, 16, 3, 2, mixers={"linear": {"rule": "retnet"}})
    assert family.state_bytes(config, 10) == 2 * (2 * 8 * 8 * 4) + 2 * 10 * 16 * 2


def test_dots_and_names_of_the_picture(family):
    drawing = importlib.import_module("family_picture")
    row = lambda model, heldout, state, tokens: {
        "model": model, "heldout": heldout, "state_bytes": state, "tokens_per_s": tokens,
    }  # fmt: skip
    rows = [
        row("kda", 3.0, 1000, 900.0),
        row("hope", 3.001, 4000, None),
        row("retnet", 4.0, 2000, 100.0),
        row("x", None, 1, 1.0),
    ]
    parts = drawing.draw(rows).parts
    dots = [part for part in parts if isinstance(part, Dot)]
    kda, hope, retnet, fast, slow = dots
    assert kda.x < retnet.x < hope.x < slow.x < fast.x
    assert kda.y == fast.y < hope.y < retnet.y == slow.y  # the best is above
    names = {part.text: part.y for part in parts if isinstance(part, Words)}
    assert names["KDA"] + 12 <= names["HOPE"] < names["RetNet"]
    assert "x" not in names


def test_names_that_are_close_are_spread_and_stay_inside(family):
    spread = importlib.import_module("family_picture").spread
    assert spread([10.0, 50.0], 10, 0, 100) == [10.0, 50.0]
    assert spread([10.0, 11.0, 12.0], 10, 0, 100) == [10.0, 20.0, 30.0]
    assert spread([98.0, 99.0, 100.0], 10, 0, 100) == [80.0, 90.0, 100.0]
