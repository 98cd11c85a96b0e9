"""The commands of README's section on one's own data, in a shell and in a folder of their own, as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ["corpus", "tokenizer", "tokenize", "tokenize", "verify"]


def commands(corpus, vocabulary):
    """The lines of the section's first block that prepare data, with another corpus and vocabulary."""
    section = (ROOT / "README.md").read_text().split("\n## Your own data\n")[1].split("\n## ")[0]
    block = re.search(r"```\w*\n(.*?)```", section, re.S)[1].replace("\\\n", " ")
    lines = [line.split("#")[0] for line in block.splitlines() if line.startswith("python -m data_prep ")]
    assert [line.split()[3] for line in lines] == COMMANDS
    lines[0], changed = re.subn(r"corpus .*(--out \S+)", rf"corpus {corpus} \1", lines[0])
    assert changed == 1
    return [re.sub(r"--vocab \d+", f"--vocab {vocabulary}", line) for line in lines]


@pytest.mark.parametrize(
    ("corpus", "vocabulary"),
    [
        ("--tier stdlib --sources topics", 1000),
        pytest.param("--tier stdlib", 8192, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_the_commands_work_one_after_the_other(tmp_path, corpus, vocabulary):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for line in commands(corpus, vocabulary):
        run = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, f"{line}\n{run.stdout}{run.stderr}"
    prefixes = re.findall(r"verified +(\S+): (\d+) documents", run.stdout)
    assert len(prefixes) == 2
    assert int(prefixes[0][1]) > int(prefixes[1][1]) > 0
