"""How commands end: nobody reads on, Ctrl-C, a path that the system refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import no_file_beyond
from house import own_files

from hope.devices import device_of
from hope.pipe import in_words, piped
from hope.train.written import replace_text
from launch.__main__ import main as launch

ROOT = Path(__file__).parents[2]
PROGRAMS = [
    ["-m", "hope.mixers"],
    ["-m", "parallel.plan", "configs/hope_340m.yaml"],
    ["-m", "configs.schema"],
    ["benchmarks/recipe.py", "--table", "docs/measurements/recipe.json"],
]
NOT_PIPED = {
    "pretrain_hope.py",
    "launch/agent.py",
    "launch/job.py",
    "launch/preflight.py",
    "parallel/start/interconnect.py",
}
"""What a launcher starts: its codes are read by programs, and its logs must not end it."""


def starts(path: Path) -> str:
    """The part of a file that runs only as a program."""
    return path.read_text().partition('if __name__ == "__main__":\n')[2]


def test_every_program_is_ended_by_piped():
    paths = [*(ROOT / "benchmarks").glob("*.py"), *own_files()]
    programs = {str(path.relative_to(ROOT)): starts(path) for path in paths if starts(path)}
    assert {name for name, code in programs.items() if "sys.exit(piped(main))" not in code} == NOT_PIPED


def unread(words: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a python command whose standard output nobody reads."""
    ours, theirs = os.pipe()
    os.close(ours)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        ended = subprocess.run(
            [sys.executable, *words], stdout=theirs, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=300,
            env=buffered,
        )  # fmt: skip
    finally:
        os.close(theirs)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("words", PROGRAMS, ids=lambda words: " ".join(words[:2]))
def test_a_reader_that_has_gone_gets_no_traceback(words):
    assert unread(words) == (141, "")


def test_help_that_nobody_reads():
    code = "import argparse, sys; from hope.pipe import piped; sys.exit(piped(argparse.ArgumentParser().parse_args))"
    assert unread(["-c", code, "--help"]) == (141, "")


def test_no_standard_output_at_all():
    code = "import sys; from hope.pipe import piped; sys.stdout = None; sys.exit(piped(lambda: print('x') or 7))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=300).returncode == 7


def raising(error: BaseException):
    def main() -> int:
        raise error

    return main


def test_ctrl_c_and_refused_paths_are_said_in_a_line(capsys):
    assert piped(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
    assert piped(raising(NotADirectoryError(20, "Not a directory", "some/path"))) == 2
    assert capsys.readouterr().err == "error: some/path: Not a directory\n"


@pytest.mark.parametrize("name", ["meta", "nothing_like_it"])
def test_a_device_without_numbers_is_not_there(name):
    with pytest.raises(ValueError, match=f"--device {name} is not there: .*; cpu works anywhere"):
        device_of(name, ValueError)


def test_a_state_on_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path):
    replace_text(tmp_path / "state", "old")
    with no_file_beyond(5), pytest.raises(OSError, match="File too large") as caught:
        replace_text(tmp_path / "state", "newer content")
    assert in_words(caught.value) == f"{tmp_path}/state: File too large"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("state", "old")]


WRONG = {
    **{"step": -2, "loss": "a", "tokens_per_s": [], "tokens_per_s_per_device": "", "mfu": {}, "memory_gb": "b"},
    **{"step_time_s": "c", "data_time_s": "d", "eta_s": "e", "grad_norm": [1], "lr": "f", "heldout_loss": 10**400},
}


@pytest.mark.parametrize("key", WRONG)
def test_a_line_with_a_number_that_is_none_is_passed_over(tmp_path, capsys, key):
    lines = [{"step": 2, "loss": 3.5, "eta_s": None}, {"step": 3, "loss": 3.25, key: WRONG[key]}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert launch(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[3:6] == ["2/?", "-", "3.5000"]
    assert launch(["logs", str(tmp_path)]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [["step", "2/2"]]


@pytest.mark.parametrize("text", ["{}", '{"verdict": 3}', '{"cause": []}', "\udcff", "[" * 100_000])
def test_files_of_a_run_that_say_nothing(tmp_path, capsys, text):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 3.5}\n')
    for name in ("verdict.json", "budget.json", "verdicts.jsonl", "local.json"):
        (tmp_path / "control").mkdir(exist_ok=True)
        (tmp_path / "control" / name).write_text(text, errors="surrogateescape")
    (tmp_path / "launch").mkdir()
    for name in ("job.json", "jobs.txt", "config.yaml"):
        (tmp_path / "launch" / name).write_text(text, errors="surrogateescape")
    for word in ("status", "logs", "cancel"):
        assert launch([word, str(tmp_path)]) == 0
    assert "3.5000" in capsys.readouterr().out


def test_lines_of_a_log_that_are_no_records_are_passed_over(tmp_path, capsys):
    lines = ["3", "null", "[]", '{"step": "x"}', '{"step": 2, "loss": 3.5}', '{"step": 3, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "control").mkdir()
    (tmp_path / "control/verdict.json").write_text("[]")
    (tmp_path / "control/budget.json").write_text("null")
    assert launch(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[3:6] == ["2/?", "-", "3.5000"]
    assert launch(["logs", str(tmp_path)]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [["step", "2/2"]]
