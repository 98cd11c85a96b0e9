"""Numbers and files of a command line that cannot be used are refused by argparse, with the option and what works."""

import ast
import os
from pathlib import Path

import pytest
from house import ROOT, own_files

import pretrain_hope
from data_prep.__main__ import main as data_prep
from data_prep.files import atomic_write
from hope.evaluate.__main__ import main as evaluate
from hope.evaluate.classes.__main__ import main as classes
from hope.evaluate.harness.__main__ import main as harness
from hope.evaluate.probes.__main__ import main as probe
from hope.generate.__main__ import main as generate
from hope.mixers.__main__ import main as mixers
from hope.pipe import in_words
from hope.train.plot.__main__ import main as plot
from hope.train.written import replace_text
from launch.__main__ import main as launch
from parallel.checkpoint.__main__ import main as checkpoint
from parallel.referee.parity import main as parity

WORDS = {"1e20": "'1e20'", "9" * 20: f"'{'9' * 20}'", "0.5": "'0.5'", "": "''", "9" * 5000: f"'{'9' * 40}...'"}
DEVICES, COUNTED, ANY = (f"{number:,}" for number in (2**24, 2**31 - 1, 2**63 - 1))
CONFIG = "configs/hope_340m.yaml"
OPTIONS = [
    (pretrain_hope.main, [CONFIG, "--dry-run", "--devices"], 1, DEVICES),
    (launch, ["estimate", CONFIG, "--profile", "h100", "--nodes"], 1, DEVICES),
    (launch, ["local", CONFIG, "--dry-run", "--processes"], 1, DEVICES),
    (launch, ["logs", "runs/some", "--lines"], 0, COUNTED),
    (parity, [CONFIG, "--data"], 1, DEVICES),
    (checkpoint, ["reshard-plan", "runs/some", "--tensor"], 1, DEVICES),
    (evaluate, ["runs/some", "--text", "a.txt", "--window"], 1, COUNTED),
    (evaluate, ["runs/some", "--text", "a.txt", "--adapt", "levels", "--adapt-every"], 1, COUNTED),
    (classes, ["runs/some", "--data", "a.json", "--epochs"], 0, COUNTED),
    (classes, ["runs/some", "--data", "a.json", "--window"], 2, COUNTED),
    (probe, ["mqar", CONFIG, "--steps"], 1, COUNTED),
    (probe, ["mqar", CONFIG, "--seeds"], 0, COUNTED),
    (harness, ["runs/some", "--tasks", "arc", "--limit"], 1, COUNTED),
    (generate, ["runs/some", "--prompt", "a", "--tokens"], 1, COUNTED),
    (generate, ["runs/some", "--prompt", "a", "--seed"], 0, ANY),
    (mixers, ["--width"], 1, DEVICES),
    (plot, ["runs/some", "--smooth"], 1, COUNTED),
    (data_prep, ["quickstart", "--out", "data/some", "--vocab"], 1, COUNTED),
    (data_prep, ["inspect", "data/some", "--document"], 0, ANY),
]


@pytest.mark.parametrize(("main", "words", "least", "most"), OPTIONS, ids=lambda v: v[-1] if type(v) is list else "")
def test_what_cannot_be_counted_names_the_option_and_the_range(capsys, main, words, least, most):
    option = words[-1]
    for word, shown in {**WORDS, str(least - 1): f"'{least - 1}'"}.items():
        with pytest.raises(SystemExit) as caught:
            main([*words[:-1], f"{option}={word}"])
        assert caught.value.code == 2
        assert f"argument {option}: {shown} is no whole number from {least} to {most}" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["nan", "inf", "1e400", "a", ""])
def test_what_is_no_finite_number(capsys, word):
    for main, words in (
        (launch, ["compare", "rows.json", f"--bus-gb-s={word}"]),
        (data_prep, ["tokenize", "--input", "a", "--tokenizer", "b", "--out", "c", f"--unit-mb={word}"]),
        (plot, ["runs/some", f"--from={word}"]),
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        assert f"{word!r} is no finite number, such as 0.5" in capsys.readouterr().err


WRITERS = [
    (evaluate, ["runs/some", "--text", "a.txt", "--json"]),
    (classes, ["runs/some", "--data", "a.json", "--json"]),
    (probe, ["mqar", CONFIG, "--json"]),
    (harness, ["runs/some", "--tasks", "arc", "--json"]),
    (generate, ["runs/some", "--prompt", "a", "--state-out"]),
    (launch, ["collect", "launch/sweeps/laptop.yaml", "--json"]),
]


@pytest.mark.parametrize(("main", "words"), WRITERS, ids=lambda v: "")
def test_what_cannot_be_a_file_of_results_is_refused_at_the_start(tmp_path, capsys, main, words):
    (tmp_path / "full").symlink_to("/dev/full")  # never the device itself: root may replace it
    os.mkfifo(tmp_path / "pipe")
    for name, what in (
        ("full", "is no file but a device or a pipe, which a file would replace; give the name of a file"),
        ("pipe", "is no file but a device or a pipe"),
        ("", "Is a directory; give the name of a file"),
        ("no/out", "there is no folder"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*words, str(tmp_path / name)])
        assert caught.value.code == 2
        assert f"argument {words[-1]}: {tmp_path / name}: {what}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "pipe"]
    assert (tmp_path / "full").is_symlink()


def write(path: Path) -> None:
    with atomic_write(path) as stream:
        stream.write(b"text")


@pytest.mark.parametrize("write", [lambda path: replace_text(path, "text"), write])
def test_a_device_is_never_replaced(tmp_path, write):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="is no file but a device") as caught:
        write(tmp_path / "full")
    assert str(tmp_path / "full") in in_words(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full").is_symlink()


def plain_types(path: Path) -> set[str]:
    """Options whose type is Python's own int or float."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and node.args]
    kind = lambda call: next((ast.unparse(word.value) for word in call.keywords if word.arg == "type"), "")
    return {ast.literal_eval(call.args[0]) for call in calls if kind(call) in ("int", "float")}


def test_every_number_has_one_of_the_types():
    """The others say by themselves what works of infinite ones; no person writes launch.job's --code."""
    told = {"--adapt-rate", "--rate", "--rates", "--temperature", "--top-p", "--mfu", "--tokens", "--seconds", "--code"}
    paths = [*own_files(), *(ROOT / "benchmarks").glob("*.py")]
    assert set().union(*map(plain_types, paths)) == told


@pytest.mark.parametrize(
    "words",
    [
        ["cancel", ""],
        ["logs", ""],
        ["resume", ""],
        ["status", "runs", ""],
        ["submit", "", "--profile", "h100"],
        ["submit", CONFIG, "--profile="],
        ["local", CONFIG, ""],
        ["preflight", "--profile", "h100", "--parity", ""],
        ["sweep", ""],
        ["collect", "grid.yaml", "--out", ""],
    ],
    ids=" ".join,
)
def test_a_launch_of_nothing_is_not_of_the_current_folder(tmp_path, monkeypatch, capsys, words):
    (tmp_path / "launch").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        launch(words)
    assert caught.value.code == 2
    assert ": '' names nothing; give a name, or . for the current folder" in capsys.readouterr().err
    assert not (tmp_path / "control").exists()
