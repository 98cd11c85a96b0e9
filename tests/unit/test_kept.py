"""benchmarks/kept.py and the programs that read plans and rows with it."""

import importlib
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
