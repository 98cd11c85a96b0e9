"""README's commands that use a trained model, on a tiny one in the place of `make train`'s."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from evaluated import stored_model

from configs.schema import load
from hope.evaluate import __main__ as evaluate
from hope.generate import __main__ as generate
from parallel.checkpoint import __main__ as checkpoint

ROOT = Path(__file__).parents[2]
PROGRAMS = {"hope.generate": generate, "hope.evaluate": evaluate, "parallel.checkpoint": checkpoint}


def lines() -> list[str]:
    section = (ROOT / "README.md").read_text().split("\n## Use the model\n")[1].split("\n## ")[0]
    return [line.partition("  # ")[0].strip() for line in re.search(r"```\n(.*?)```", section, re.S)[1].splitlines()]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A folder with README.md and runs/quickstart."""
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "runs").mkdir()
    stored_model(tmp_path).rename(tmp_path / "runs/quickstart")
    monkeypatch.chdir(tmp_path)


def test_they_print_text_bits_per_byte_and_accuracy(trained, tmp_path, capsys):
    printed = {}
    for line in lines()[:-1]:
        if line.startswith("echo"):
            subprocess.run(line, shell=True, check=True)
            continue
        python, flag, module, *words = shlex.split(line)
        assert (python, flag) == ("python", "-m")
        assert PROGRAMS[module].main(words) == 0, line
        printed[line] = capsys.readouterr().out
    text, perplexity, choice, export = printed.values()
    assert len(text) > 10
    assert "bits_per_byte" in perplexity
    assert re.search(r"mine .*accuracy", choice, re.S)
    assert "model.safetensors" in export
    assert (tmp_path / "weights" / "config.json").is_file()


def test_the_last_one_starts_a_run_from_weights():
    """Its keys are known and mean that; tests/resume/test_init.py makes such starts."""
    python, program, config, *words = shlex.split(lines()[-1])
    assert (python, program) == ("python", "pretrain_hope.py")
    found = load(str(ROOT / config), words, check=False)
    assert (found.model.init, found.run.name) == ("runs/quickstart", "new")
