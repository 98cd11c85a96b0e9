"""JSON and YAML that are nested deeper than can be read are refused by name, wherever a program reads them."""

import ast
import json

import pytest
import yaml
from house import ROOT, own_files
from tiny import config_file

from configs.errors import ConfigError
from configs.schema import load
from data_prep import yaml_text
from data_prep.__main__ import main as data_prep
from data_prep.errors import DataError
from data_prep.jsonl import read_texts
from data_prep.training.index_build import read_config
from hope.evaluate.classes.data import read as read_examples
from hope.evaluate.errors import EvaluationError
from hope.evaluate.tasks import read_task
from hope.generate.errors import GenerationError
from hope.generate.prompts import read_prompts
from hope.nesting import DEEPEST, is_number, json_of
from hope.train.plot.curves import NoCurve, records_of
from launch.runs import records
from launch.scaling import read as read_rows


def nested(levels: int) -> str:
    """Lists and objects in turn: valid JSON, and valid YAML."""
    opening = ["[", '{"a": '] * (levels // 2) + ["["] * (levels % 2)
    closing = ["]" if word == "[" else "}" for word in reversed(opening)]
    return "".join([*opening, "1", *closing])


@pytest.mark.parametrize("levels", [DEEPEST, 100_000])
def test_json_up_to_the_deepest(levels):
    if levels == DEEPEST:
        assert json.dumps(json_of(nested(levels))) == nested(levels)
        levels += 1
    with pytest.raises(ValueError, match=f"nested more than {DEEPEST} levels deep"):
        json_of(nested(levels))
    with pytest.raises(ValueError, match="nested more than"):
        json_of(nested(levels).encode())


def test_many_values_beside_each_other_are_not_deep():
    assert len(json_of(json.dumps([[]] * 10 * DEEPEST))) == 10 * DEEPEST
    assert json_of(json.dumps("[" * 10 * DEEPEST)) == "[" * 10 * DEEPEST


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("levels", [yaml_text.DEEPEST, 100_000])
def test_yaml_up_to_the_deepest(levels, flow):
    make = nested if flow else lambda levels: "- " * levels + "1"
    if levels == yaml_text.DEEPEST:
        assert yaml_text.shallow(make(levels)) == make(levels)
        levels += 1
    with pytest.raises(yaml.YAMLError, match=f"nested more than {yaml_text.DEEPEST} levels deep"):
        yaml_text.shallow(make(levels))


READERS = {
    "the file of a run": ("yaml", lambda path: load(str(path), []), ConfigError),
    "a file over it": ("yaml", lambda path: load(config_file(path.parent), [str(path)]), ConfigError),
    "data_prep's look at it": ("yaml", lambda path: read_config(str(path), []), DataError),
    "texts": ("jsonl", lambda path: list(read_texts(path)), DataError),
    "a task": ("jsonl", lambda path: read_task(path.open("rb"), str(path)), EvaluationError),
    "classes": ("json", read_examples, EvaluationError),
    "curves": ("jsonl", records_of, NoCurve),
    "rows of a sweep": ("json", read_rows, ConfigError),
}


@pytest.mark.parametrize("what", READERS)
def test_every_reader_names_the_file(tmp_path, what):
    suffix, reader, error = READERS[what]
    path = tmp_path / f"deep.{suffix}"
    path.write_text(nested(100_000) + "\n" + "{}\n" * (suffix == "jsonl"))
    with pytest.raises(error) as caught:
        reader(path)
    assert str(path) in str(caught.value)
    assert "nested more than" in str(caught.value)


@pytest.mark.parametrize("text", ["3", "a", "[1, 2]", "null", "", "a: ["])
def test_what_is_no_configuration_of_data(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(DataError, match=r"run\.yaml"):
        read_config(str(tmp_path / "run.yaml"), [])


def test_a_prompt_that_is_no_object(tmp_path):
    (tmp_path / "prompts").write_text('{"prompt": "a"}\n' + nested(100_000))
    with pytest.raises(GenerationError, match="line 2 is not a JSON object"):
        read_prompts(tmp_path / "prompts")


def test_a_value_of_the_command_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(config_file(tmp_path), [f"train.profile={nested(100)}"])
    assert "nested more than 32 levels deep" in str(caught.value)


def test_lines_of_a_log_are_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(nested(100_000) + '\n{"step": 1}\n')
    assert records(tmp_path) == [{"step": 1}]


def test_a_document_is_counted_as_bad(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(f'{{"text": "a b c", "more": {nested(DEEPEST)}}}\n' * 2)
    assert data_prep(["split", "--input", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "nested more than" in capsys.readouterr().err


def test_nothing_reads_json_past_it():
    """rng.py reads what this very run has written."""
    allowed = {"hope/nesting.py", "parallel/checkpoint/rng.py"}
    reads = {"json.load", "json.loads"}
    own = [path for path in own_files() if str(path.relative_to(ROOT)) not in allowed]
    calls = lambda path: {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
    assert [str(path) for path in own if reads & calls(path)] == []


def test_numbers_that_a_float_holds():
    assert all(map(is_number, (0, -3, 1.5, 10**300)))
    assert not any(map(is_number, (10**400, -(10**400), float("nan"), float("inf"), "1", None, [])))
