"""Sessions of their own on small examples: a skip that is listed passes, any other fails the session and is named."""

import subprocess
import sys
from pathlib import Path

import pytest
from skip_list import read

TESTS = Path(__file__).parents[1]
CONFTEST = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from skip_list import SkipList

def pytest_configure(config):
    config.pluginmanager.register(SkipList(Path(__file__).with_name("skips.txt")))
"""
EXAMPLE = """
import pytest

def test_runs():
    pass

@pytest.mark.skipif(True, reason="no CUDA device")
def test_marked():
    pass

@pytest.fixture
def cluster():
    pytest.skip("SLURM is not installed: no sbatch")

def test_in_a_fixture(cluster):
    pass

@pytest.mark.xfail(reason="known")
def test_fails():
    assert False
"""
LISTED = [
    "# a comment",
    "test_it.py::test_marked | no CUDA device",
    "test_it.py::* | SLURM is not installed: *",
    "test_it.py::test_fails | xfail: known",
]


def session(folder: Path, lines: list[str], example: str = EXAMPLE, *more: str) -> subprocess.CompletedProcess:
    (folder / "conftest.py").write_text(CONFTEST.format(tests=str(TESTS)))
    (folder / "skips.txt").write_text("\n".join(lines))
    (folder / "test_it.py").write_text(example)
    words = ["-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder), *more]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_listed_skips_pass(tmp_path):
    done = session(tmp_path, LISTED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 2 skipped, 1 xfailed" in done.stdout
    assert "UNLISTED" not in done.stdout


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        (1, "test_it.py::test_marked: no CUDA device"),
        (2, "test_it.py::test_in_a_fixture: SLURM is not installed: no sbatch"),
        (3, "test_it.py::test_fails: xfail: known"),
    ],
)
def test_an_unlisted_skip_fails_the_session(missing, named, tmp_path):
    done = session(tmp_path, LISTED[:missing] + LISTED[missing + 1 :])
    assert done.returncode == 1, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("UNLISTED")]
    assert found == [f"UNLISTED SKIP {named}"]


def test_another_reason_is_not_listed(tmp_path):
    done = session(tmp_path, LISTED, EXAMPLE.replace("no CUDA device", "too slow"))
    assert done.returncode == 1
    assert "UNLISTED SKIP test_it.py::test_marked: too slow" in done.stdout


def test_a_module_that_skips_itself_is_seen(tmp_path):
    done = session(tmp_path, LISTED, 'import pytest\npytest.importorskip("no_such_package")\n')
    assert done.returncode == 1
    assert "UNLISTED SKIP test_it.py: could not import 'no_such_package'" in done.stdout


def test_skips_of_workers_are_seen(tmp_path):
    """One of a test, and a module that skips itself, of which workers tell nobody by themselves."""
    (tmp_path / "test_more.py").write_text('import pytest\npytest.importorskip("no_such_package")\n')
    done = session(tmp_path, LISTED[:1] + LISTED[2:], EXAMPLE, "-n", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("UNLISTED") == 2
    assert "UNLISTED SKIP test_it.py::test_marked: no CUDA device" in done.stdout
    assert "UNLISTED SKIP test_more.py: could not import 'no_such_package'" in done.stdout
    (tmp_path / "test_more.py").unlink()
    assert session(tmp_path, LISTED, EXAMPLE, "-n", "2").returncode == 0


@pytest.mark.parametrize("line", ["tests/*", "tests/* |", "| no CUDA device"])
def test_a_line_without_test_or_reason_is_refused(line, tmp_path):
    path = tmp_path / "skips.txt"
    path.write_text(line)
    with pytest.raises(ValueError, match="expected"):
        read(path)


def test_this_suite_has_the_list():
    """Of all that may skip, nothing is allowed whatever its test and its reason."""
    entries = read(TESTS / "skips.txt")
    assert entries
    assert not any(entry.covers("tests/unit/test_new.py::test_new", "because") for entry in entries)
    assert all(entry.test.startswith("tests/") and entry.reason.strip("*") for entry in entries)
