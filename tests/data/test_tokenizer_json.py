"""tokenizer.json wherever a sentencepiece model is taken: exact, over 65,535 ids too, and refused where it is not."""

import json
import sys

import numpy as np
import pytest
from json_tokenizer import byte_level
from test_tokenizer import HOSTILE

from data_prep.__main__ import main
from data_prep.errors import DataError
from data_prep.indexed import memmap_tokens, read_header
from data_prep.inspection.tokens import show_document
from data_prep.manifest import load_manifest
from data_prep.tokenizing.tokenizer import Tokenizer
from data_prep.training.reading import TrainingSet

TEXTS = ["the cat sat on the mat. " * 4, "漢字 and é, \U0001f600 <|endoftext|> is text\n", "x\ty  z"]


def test_round_trip_is_exact_and_special_tokens_never_come_from_text(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path / "t.json", TEXTS))
    for text in [*HOSTILE, *TEXTS]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids).encode() == text.encode()
        assert tokenizer.eos_id not in ids
    assert tokenizer.encode_batch(HOSTILE, 2) == tokenizer.encode_batch(HOSTILE)
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    starts, pieces = tokenizer.character_starts(), tokenizer.pieces()
    assert [bool(starts[i]) for i in tokenizer.encode("漢")] == [True, False, False]
    assert all(starts[i] for i in tokenizer.encode("the cat"))
    assert len(set(pieces)) == len(pieces) == tokenizer.vocab_size


def test_ids_above_65535_make_a_set_that_reads_back_to_the_same_bytes(tmp_path, capsys):
    """A token that only an int32 set can hold, from the text to a training window."""
    path = byte_level(tmp_path / "tokenizer.json", TEXTS, spare=70_000)
    tokenizer = Tokenizer.load(path)
    texts = [*TEXTS, *filter(str.strip, HOSTILE)]
    assert max(tokenizer.encode(texts[0])) > 65_535
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prefix = str(tmp_path / "set")
    source = str(tmp_path / "a.jsonl")
    assert main(["tokenize", "--input", source, "--tokenizer", str(path), "--out", prefix, "--workers", "1"]) == 0
    header, manifest = read_header(prefix), load_manifest(prefix)
    assert header.dtype == np.dtype("<i4")
    assert (manifest.vocab_size, manifest.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert manifest.sha256_tokenizer == tokenizer.sha256
    tokens, ends = memmap_tokens(prefix, header), np.cumsum(header.document_lengths)
    found = [tokenizer.decode(part.tolist()) for part in np.split(tokens, ends[:-1])]
    assert [text.encode() for text in found] == [text.encode() for text in texts]
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert "the cat sat" in show_document(prefix, 0)  # finds tokenizer.json beside the set
    assert main(["verify", prefix, "--tokenizer", str(path)]) == 0
    (tmp_path / "set.manifest.json").unlink()  # a set that Megatron's own tool made
    assert main(["manifest", prefix, "--tokenizer", str(path)]) == 0
    adopted = load_manifest(prefix)
    assert (adopted.text_bytes, adopted.vocab_size) == (manifest.text_bytes, manifest.vocab_size)
    windows = TrainingSet(prefix, 16, 1)
    assert max(int(windows.sample(number).max()) for number in range(len(windows))) > 65_535
    capsys.readouterr()


def test_a_small_vocabulary_stays_at_two_bytes(tmp_path):
    path = byte_level(tmp_path / "tokenizer.json", TEXTS)
    (tmp_path / "a.txt").write_text("the cat")
    arguments = ["--input", str(tmp_path / "a.txt"), "--tokenizer", str(path), "--out", str(tmp_path / "set")]
    assert main(["tokenize", *arguments, "--workers", "1"]) == 0
    assert read_header(tmp_path / "set").dtype == np.dtype("<u2")


def test_what_changes_a_text_is_refused_with_the_text(tmp_path, capsys):
    path = byte_level(tmp_path / "lower.json", TEXTS)
    described = json.loads(path.read_text())
    described["normalizer"] = {"type": "NFC"}
    path.write_text(json.dumps(described))
    (tmp_path / "a.txt").write_text("the cat")
    arguments = ["--input", str(tmp_path / "a.txt"), "--tokenizer", str(path), "--out", str(tmp_path / "set")]
    assert main(["tokenize", *arguments]) == 2
    said = capsys.readouterr().err
    assert "1 of 5 probe texts do not come back exactly: '漢字" in said
    assert "--lossy" in said
    assert not list(tmp_path.glob("set*"))
    assert main(["tokenize", *arguments, "--lossy", "--workers", "1"]) == 0
    assert main(["tokenizer", "info", str(path)]) == 0
    assert "1 of 5 probe texts" in capsys.readouterr().out


def test_what_is_no_tokenizer_or_ends_no_text_is_refused(tmp_path, monkeypatch):
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"other\.json: not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "other.json")
    path = byte_level(tmp_path / "t.json", TEXTS, special=["<mine>"])
    with pytest.raises(DataError, match=r"no special token of it is known to end a text; it has <mine>, known are <\|"):
        Tokenizer.load(path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match="needs `pip install tokenizers`"):
        Tokenizer.load(path)
