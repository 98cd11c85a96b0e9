"""Which packages launch/ may import, and what must run without any of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
# numbers and shapes only: tests/unit/test_house.py checks that nothing in parallel.layout makes a process group
ALLOWED = ("launch", "configs", "hope", "parallel.layout", "parallel.start.launcher", "parallel.start.holders")
# what a dry run says of the data: it opens files as one process does, and asks no other rank
FORESEEN = [("data_prep.training.feed", "Foreseen"), ("data_prep.texts", "OpenTask", "open_tasks")]
OWN = ("launch", "configs", "hope", "parallel", "data_prep", "pretrain_hope")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module, *(a.name for a in node.names)) in FORESEEN:
            continue
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_launch_imports_nothing_that_knows_process_groups():
    for path in sorted((REPOSITORY / "launch").glob("*.py")):
        for name in imports(path):
            if name.partition(".")[0] in OWN:
                assert any(name == ok or name.startswith(f"{ok}.") for ok in ALLOWED), f"{path.name} imports {name}"


def test_nobody_below_imports_launch():
    for package in ("hope", "parallel", "data_prep", "configs"):
        for path in (REPOSITORY / package).rglob("*.py"):
            assert not any(name.partition(".")[0] == "launch" for name in imports(path)), path


def test_what_runs_beside_the_trainers_needs_the_standard_library_only():
    """The batch script's host may have no more, and one agent per rank must cost little."""
    program = """
import sys
import launch.agent, launch.job, launch.preflight
extra = {m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)
print(sorted(name for name in extra if not name.startswith('_')))
"""
    words = [sys.executable, "-S", "-c", program]  # -S: no site-packages at all
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['hope', 'launch', 'parallel']"
