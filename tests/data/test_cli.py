"""The command line: from corpus to tokens, and what it says when something is wrong."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.__main__ import build_parser, main
from data_prep.corpora.corpus import topic_documents
from data_prep.corpora.library_corpus import LIBRARY, LibrarySource

ROOT = Path(__file__).parents[2]


def test_help_lists_the_commands():
    shown = build_parser(training=False).format_help()
    for command in ("quickstart", "corpus", "tokenizer", "tokenize", "verify", "stats", "inspect", "manifest"):
        assert f"\n    {command} " in shown


def test_the_tokenizing_program_needs_no_torch(tiny):
    """Every worker process imports it anew: torch costs seconds."""
    code = (
        "import sys; from data_prep.__main__ import main;"
        f" main(['tokenizer', 'info', '{tiny.folder}/tokenizer.model']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False).returncode == 0


def test_tokenize_says_what_it_did_and_keeps_what_is_done(tiny, tmp_path, capsys):
    command = ["tokenize", "--input", f"{tiny.folder}/train.jsonl", f"{tiny.folder}/heldout.jsonl", "--workers", "1"]
    command += ["--tokenizer", f"{tiny.folder}/tokenizer.model", "--out", f"{tmp_path}/all"]
    assert main(command) == 0
    assert "1 workers" in capsys.readouterr().out
    before = (tmp_path / "all.bin").stat().st_mtime_ns
    assert main(command) == 0
    assert capsys.readouterr().out.rstrip().endswith("bytes/token (kept)")
    assert (tmp_path / "all.bin").stat().st_mtime_ns == before
    assert main([*command, "--dedup", "exact"]) == 0
    assert "(kept)" not in capsys.readouterr().out
    assert main([*command, "--dedup", "exact", "--unit-mb", "0"]) == 2


def test_bad_records_are_counted_on_the_console(tiny, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n{"text": \n[1]\n')
    command = ["tokenize", "--input", f"{tmp_path}/in.jsonl", "--tokenizer", f"{tiny.folder}/tokenizer.model"]
    command += ["--out", f"{tmp_path}/x"]
    assert main(command) == 2
    assert "line 2, byte offset 17: bad_json" in capsys.readouterr().err
    assert main([*command, "--on-bad", "skip"]) == 0
    assert "bad        bad_json 1, missing_field 1; listed in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["corpus"], "--out is not set"),
        (["corpus", "--tier", "main", "--heldout", "1", "--out", "OUT"], "--heldout 1.0 is not a share"),
        (["corpus", "--sources", "nothing", "--out", "OUT"], "unknown source nothing; known: gcide"),
        (["corpus", "--add", "anarchism", "--out", "OUT"], "--add goes with --tier"),
        (["tokenizer", "info"], "no model"),
        (["tokenizer", "train", "--input", "gone.jsonl", "--out", "OUT/t"], "gone.jsonl: no such file"),
        (["tokenizer", "train", "--input", "OUT", "--out", "OUT/t"], "a folder without files that end in .jsonl"),
        (["verify", "OUT/absent"], "absent.idx: no such file"),
    ],
)
def test_what_cannot_work_exits_2(tmp_path, capsys, arguments, message):
    assert main([argument.replace("OUT", str(tmp_path)) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_apt_is_said_by_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["corpus", "--tier", "quick", "--out", str(tmp_path)]) == 2
    assert "--tier stdlib --out DIR" in capsys.readouterr().err


def test_corpus_list_and_default_tier(tmp_path, capsys, monkeypatch):
    assert main(["corpus", "--list"]) == 0
    assert "public domain" in capsys.readouterr().out
    for name, part in (("stdlib", slice(0, 20)), ("topics", slice(20, 40))):
        documents = list(topic_documents())[part]
        monkeypatch.setitem(LIBRARY, name, LibrarySource(0.1, lambda documents=documents: documents, "a few"))
    assert main(["corpus", "--out", str(tmp_path), "--heldout", "0.5"]) == 0
    for name in ("stdlib", "topics"):  # one folder per source, as in every other tier
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "heldout.jsonl", "manifest.json", "train.jsonl"
        ]  # fmt: skip
        assert len((tmp_path / name / "heldout.jsonl").read_text().splitlines()) > 3
    assert main(["corpus", "--out", str(tmp_path / "one"), "--sources", "topics"]) == 0
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["manifest.json", "topics"]


def test_a_reader_that_has_seen_enough_is_no_error(tiny):
    command = [sys.executable, "-m", "data_prep", "inspect", tiny.train_prefix, "--document", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 141


def test_tokenizer_types_and_selection(tiny, tmp_path, capsys):
    command = ["tokenizer", "train", "--input", f"{tiny.folder}/train.jsonl", f"{tiny.folder}/heldout.jsonl"]
    assert main([*command, "--type", "unigram", "--vocab", "500", "--out", f"{tmp_path}/u.model"]) == 0
    assert "500 pieces" in capsys.readouterr().out
    assert main([*command, "--sample-mb", "0.05", "--vocab", "500", "--out", f"{tmp_path}/s.model"]) == 0
    assert (tmp_path / "s.model").read_bytes() != (tmp_path / "u.model").read_bytes()
    capsys.readouterr()
    assert main(["tokenizer", "info", "--model", f"{tmp_path}/u.model"]) == 0
    assert "probe texts do not" not in capsys.readouterr().out


def test_a_tokenizer_learns_from_whatever_tokenize_reads(tiny, tmp_path, capsys):
    lines = (tiny.folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    (tmp_path / "bad.jsonl").write_bytes(b"".join([*lines[:9], b'{"text": \n', *lines[9:], b'{"id": 1}\n']))
    models = []
    for name, more in (("in.jsonl.gz", []), ("bad.jsonl", ["--on-bad", "skip"])):
        command = [
            "tokenizer",
            "train",
            "--input",
            f"{tmp_path}/{name}",
            "--vocab",
            "500",
            "--out",
            f"{tmp_path}/{name}.m",
        ]
        assert main([*command, *more]) == 0
        models.append((tmp_path / f"{name}.m").read_bytes())
    assert models[0] == models[1]
    assert "; 1 bad_json; 1 missing_field" in capsys.readouterr().out
    offset = sum(map(len, lines[:9]))
    assert main(command) == 2
    assert f"bad.jsonl: line 10, byte offset {offset}: bad_json" in capsys.readouterr().err
