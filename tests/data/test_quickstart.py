import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.config import DataConfig
from data_prep.corpora.corpus import topic_documents
from data_prep.quickstart import quickstart


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch):
    """Topics only: reading the whole library takes 15 s."""
    monkeypatch.setattr("data_prep.quickstart.quickstart_documents", topic_documents)


def state(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_quickstart_makes_data_that_a_run_accepts_and_keeps_it(tmp_path):
    lines = []
    quickstart(tmp_path, 600, lines.append)
    assert [line.split()[0] for line in lines] == ["corpus", "tokenizer", "tokens", "tokens"]
    config = DataConfig(train=str(tmp_path / "train"), heldout=str(tmp_path / "heldout"))
    assert list(config.problems(600, 128)) == []
    before = state(tmp_path)
    lines.clear()
    quickstart(tmp_path, 600, lines.append)
    assert all(line.endswith("(kept)") for line in lines)
    assert state(tmp_path) == before


def test_only_what_is_damaged_or_depends_on_a_change_is_made_again(tmp_path):
    quickstart(tmp_path, 600, lambda line: None)
    original = state(tmp_path)
    (tmp_path / "heldout.bin").write_bytes(b"")
    lines = []
    quickstart(tmp_path, 600, lines.append)
    assert [line.endswith("(kept)") for line in lines] == [True, True, True, False]
    assert (tmp_path / "heldout.bin").read_bytes() == original["heldout.bin"][1]
    quickstart(tmp_path, 700, lines.append)
    assert [line.endswith("(kept)") for line in lines[4:]] == [True, False, False, False]


def test_command_line(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["corpus", "--out", out, "--sources", "topics"]) == 0
    train = ["--input", f"{out}/topics/train.jsonl", "--out", f"{out}/t.model", "--vocab", "600"]
    assert main(["tokenizer", "train", *train]) == 0
    assert main(["tokenizer", "info", f"{out}/t.model"]) == 0
    trained, described = capsys.readouterr().out.splitlines()[-2:]
    assert trained == described
    assert "600 pieces, eos 1, pad 2" in described
    arguments = ["--input", f"{out}/topics/heldout.jsonl", "--tokenizer", f"{out}/t.model", "--out", f"{out}/x"]
    assert main(["tokenize", *arguments]) == 0
    assert Path(f"{out}/x.manifest.json").exists()


def test_data_errors_exit_2_and_say_what_works(tmp_path, capsys):
    assert main(["quickstart", "--out", str(tmp_path), "--vocab", "999999"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("data error: vocabulary 999999 is too large")
    assert "Traceback" not in message
    assert main(["tokenizer", "info", str(tmp_path / "absent")]) == 2
    assert main(["tokenize", "--input", "absent.jsonl", "--tokenizer", "absent", "--out", "x"]) == 2


def test_preparing_data_needs_no_torch():
    """Importing torch and megatron-core costs seconds in every tokenizing process."""
    code = "import sys, data_prep.__main__, data_prep.config; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env=dict(os.environ), timeout=120, check=False)
    assert run.returncode == 0
