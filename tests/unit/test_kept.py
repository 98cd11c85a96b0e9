"""benchmarks/kept.py and the programs that read plans and rows with it."""

import importlib
import json
from pathlib import Path

import pytest
from full_disk import no_file_beyond

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = {
    "recipe": ["--table", "ROWS", "--plan", "PLAN"],
    "steps_to": ["--json", "ROWS", "--plan", "PLAN", "--out", "runs", "--model", "a"],
    "probes": ["--table", "ROWS", "--plan", "PLAN"],
    "continual": ["--table", "ROWS", "--plan", "PLAN"],
    "recipe_picture": ["ROWS", "OUT", "--plan", "PLAN"],
    "probes_picture": ["ROWS", "OUT"],
}


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "cannot be read: No such file or directory"),
        ('[{"a": 1', "cannot be read: "),
        ("\udcff", "cannot be read: "),
        ("3", "is no list of rows"),
        ("[null]", "is no list of rows"),
    ],
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_rows_that_cannot_be_read_end_it_with_2(program, tmp_path, capsys, name, text, what):
    rows = tmp_path / "rows.json"
    if text is not None:
        rows.write_bytes(text.encode("utf-8", "surrogateescape"))
    plan = BENCHMARKS / f"{name if name in ('continual', 'probes') else 'recipe'}.yaml"
    places = {"ROWS": str(rows), "PLAN": str(plan), "OUT": str(tmp_path / "out.svg")}
    with pytest.raises(SystemExit) as caught:
        program(name).main([places.get(word, word) for word in PROGRAMS[name]])
    assert caught.value.code == 2
    assert f"{rows} {what}" in capsys.readouterr().err
    assert not (tmp_path / "out.svg").exists()


def test_a_plan_that_cannot_be_read_is_named(program, tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    for text, what in (("a: [", "line 1, column 5"), ("- 3", "is no mapping")):
        plan.write_text(text)
        with pytest.raises(SystemExit):
            program("recipe").main(["--table", "rows.json", "--plan", str(plan)])
        said = capsys.readouterr().err
        assert str(plan) in said
        assert what in said


@pytest.mark.parametrize("name", PROGRAMS)
def test_rows_and_plans_that_lack_something_are_named(program, tmp_path, capsys, name):
    (tmp_path / "rows.json").write_text('[{"a": 1}]')
    (tmp_path / "plan.yaml").write_text("a: 1\n")
    plan = BENCHMARKS / f"{name if name in ('continual', 'probes') else 'recipe'}.yaml"
    for places in ({"PLAN": plan}, {"PLAN": tmp_path / "plan.yaml"}):
        places |= {"ROWS": tmp_path / "rows.json", "OUT": tmp_path / "out.svg"}
        with pytest.raises(SystemExit) as caught:
            program(name).main([str(places.get(word, word)) for word in PROGRAMS[name]])
        assert caught.value.code == 2
        assert " lacks '" in capsys.readouterr().err or name == "steps_to"


def test_a_device_is_no_file_of_rows(program, tmp_path, capsys):
    (tmp_path / "full").symlink_to("/dev/full")
    words = ["--json", str(tmp_path / "full"), "--data", "a", "b"]
    for name in ("recipe", "probes", "continual", "throughput"):
        with pytest.raises(SystemExit) as caught:
            program(name).main(words)
        assert caught.value.code == 2
        assert f"argument --json: {tmp_path}/full: is no file but a device" in capsys.readouterr().err


def test_rows_on_a_full_disk_leave_the_old_ones(program, tmp_path, capsys):
    kept, rows = program("kept"), tmp_path / "rows.json"
    kept.keep(rows, [{"a": 1}])
    with no_file_beyond(5), pytest.raises(SystemExit):
        kept.keep(rows, [{"a": 1}, {"a": 2}])
    assert f"{rows} cannot be written: File too large" in capsys.readouterr().err
    assert kept.rows_of(rows) == [{"a": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


ROW = {"model": "a", "optimizer": "muon", "lr": 1e-3, "lr_elementwise": 1e-2, "seed": 1, "parameters": 5,
       "heldout": 2.0, "sources": ["x"], "matrix": [[3.0], [2.0]], "measures": {"retained": None},
       "reach": {"0": {"value": 2.0}}, "tests": {"T8": {"accuracy": {"value": 0.5}}}, "tokens_per_s": 9.0}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heldout": "a"}, "heldout is 'a', not a finite number"),
        ({"heldout": float("nan")}, "heldout is nan, not a finite number"),
        ({"lr": None}, "lr is None, not a finite number"),
        ({"seconds": {}}, "seconds is {}, not a finite number"),
        ({"seed": True}, "seed is True, not a whole number from 0 on"),
        ({"model": []}, "model is [], not a text"),
        ({"tokens_per_s": 0}, "tokens_per_s is 0, not a finite number above 0"),
        ({"matrix": [[2.0], ["a"]]}, "matrix.1.0 is 'a', not a finite number"),
        ({"measures": {"retained": "a"}}, "measures.retained is 'a', not a finite number"),
        ({"reach": {"0": 2.0}}, "reach.0 is 2.0, not a mapping"),
        ({"tests": {}}, "tests is {}, not a mapping of 1 or more names"),
        ({"tests": {"T8": {"accuracy": {"value": 1e308}}}}, "tests.T8.accuracy.value is 1e+308, not a number from 0"),
    ],
)
def test_a_field_of_another_kind_is_told_with_its_row(program, tmp_path, capsys, change, said):
    kept, rows = program("kept"), tmp_path / "rows.json"
    kept.keep(rows, [ROW, {**ROW, "heldout": None}])
    assert kept.rows_of(rows) == [ROW, {**ROW, "heldout": None}]
    kept.keep(rows, [ROW, {**ROW, **change}])
    with pytest.raises(SystemExit) as caught:
        kept.rows_of(rows)
    assert caught.value.code == 2
    assert f"{rows} row 2: {said}" in capsys.readouterr().err


def test_what_is_lacking_inside_a_row_or_plan_is_told_with_its_place(program, tmp_path, capsys):
    kept, file = program("kept"), tmp_path / "file"
    kept.keep(file, [{"tests": {"T8": {}}}])
    with pytest.raises(SystemExit):
        kept.rows_of(file)[0]["tests"]["T8"]["accuracy"]
    assert f"{file} row 1: tests.T8 lacks 'accuracy'" in capsys.readouterr().err
    file.write_text("optimizers: {muon: {}}")
    with pytest.raises(SystemExit):
        kept.plan_of(file)["optimizers"]["adamw"]
    assert f"{file} optimizers lacks 'adamw'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds: []", "seeds is [], not a list of 1 or more"),
        ("models: {a: [b, [3]]}", "models.a.1.0 is 3, not a text"),
        ("optimizers: {muon: {lr: [3e-3]}}", "optimizers.muon.lr.0 is '3e-3', not a finite number above 0"),
        ("order: [[muon]]", "order.0 is ['muon'], not [optimizer, model]"),
        ("probes: {mqar: {rates: 3}}", "probes.mqar.rates is 3, not a list"),
    ],
)
def test_a_plan_of_another_kind_is_told_with_its_place(program, tmp_path, capsys, text, said):
    plan = tmp_path / "plan.yaml"
    plan.write_text(text)
    with pytest.raises(SystemExit):
        program("kept").plan_of(plan)
    assert f"{plan} {said}" in capsys.readouterr().err


def test_a_matrix_that_is_not_of_its_sources_is_refused(program, tmp_path, capsys):
    kept, rows = program("kept"), tmp_path / "rows.json"
    for change, said in (({"matrix": [[2.0]]}, "matrix is not 2 lists of 1"), ({"sources": ["y"]}, "sources are y, ")):
        kept.keep(rows, [ROW, {**ROW, **change}])
        with pytest.raises(SystemExit):
            program("continual").main(["--table", str(rows)])
        assert f"{rows} row 2: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "said"), [("recipe_picture", "no cell of"), ("probes_picture", "there are no rows")])
def test_a_picture_of_nothing_is_refused(program, tmp_path, capsys, name, said):
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(SystemExit) as caught:
        program(name).main([str(tmp_path / "rows.json"), str(tmp_path / "out.svg")])
    assert caught.value.code == 2
    assert f"rows.json cannot be drawn: {said}" in capsys.readouterr().err
    assert not (tmp_path / "out.svg").exists()


def test_marks_of_a_picture_are_few_at_any_numbers(program, tmp_path):
    for number, losses in enumerate(((1.0, 1e30), (2.0, 2.0))):
        run = tmp_path / f"run{number}"
        run.mkdir()
        lines = [{"step": 10**20 * step, "loss": loss} for step, loss in enumerate(losses)]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        assert program("curves").main([str(tmp_path / "out.svg"), f"<a>={run}"]) == 0
        assert (tmp_path / "out.svg").read_text().count("<text") < 25
