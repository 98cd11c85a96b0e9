import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_documents

from data_prep.errors import DataError
from data_prep.files import sha256_file
from data_prep.indexed import IndexedWriter, memmap_tokens, read_header
from data_prep.inspection.text_bytes import count_text_bytes
from data_prep.inspection.verify import adopt, problems
from data_prep.manifest import length_histogram, load_manifest, open_checked


def test_a_whole_set_has_no_problems(tiny):
    assert list(problems(tiny.train_prefix, f"{tiny.folder}/tokenizer.model", sources=True)) == []


def edit_manifest(prefix, **changes):
    path = Path(f"{prefix}.manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_changed_byte_is_found_and_named(copied):
    path = copied.folder / "train.bin"
    data = bytearray(path.read_bytes())
    data[100:102] = b"\xff\xff"
    path.write_bytes(data)
    found = list(problems(copied.train_prefix))
    assert f"train.bin: sha256 {sha256_file(path)}, the manifest says {copied.train.sha256_bin}" in found[0]
    assert "train.bin: byte offset 100: token 65535 is not in the vocabulary 0..999" in found[1]


def test_document_ends_are_checked_even_if_digests_agree(copied):
    path = copied.folder / "train.bin"
    tokens = np.fromfile(path, dtype="<u2")
    first = int(read_header(copied.train_prefix).document_lengths[0])
    tokens[first - 1], tokens[3] = 5, 1
    tokens.tofile(path)
    edit_manifest(copied.train_prefix, sha256_bin=sha256_file(path))
    missing, inside = problems(copied.train_prefix)
    assert f"1 documents do not end in EOS 1, first at byte offset {2 * (first - 1)}" in missing
    assert "1 EOS tokens 1 stand inside documents" in inside


def test_other_tokenizer_source_and_histogram_are_found(copied):
    other = copied.folder / "other.model"
    other.write_bytes(copied.tokenizer.model_bytes + b"\x00\x00"[:0])
    edit_manifest(copied.train_prefix, sha256_tokenizer="0" * 64, length_histogram={"2^3": 1})
    found = list(problems(copied.train_prefix, str(other)))
    assert any("length_histogram" in message for message in found)
    assert any("other.model: sha256" in message for message in found)
    (copied.folder / "text.jsonl").write_text("changed")
    gone = str(copied.folder / "gone.jsonl")
    sources = [{"name": str(copied.folder / "text.jsonl"), "sha256": "1" * 64}, {"name": gone, "sha256": "2" * 64}]
    edit_manifest(copied.train_prefix, sources=sources)
    found = list(problems(copied.train_prefix, sources=True))
    assert any("text.jsonl: sha256" in message for message in found)
    assert any("gone.jsonl: no such file" in message for message in found)


def test_a_truncated_set_is_one_clear_problem(copied):
    path = copied.folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    (found,) = problems(copied.train_prefix)
    assert "train.bin" in found


def test_histogram_counts_every_document_in_its_class():
    lengths = np.array([0, 1, 2, 3, 4, 7, 8, 2**29 - 1, 2**29, 2**31 - 1])
    assert length_histogram(lengths) == {
        "0": 1,
        "2^0": 1,
        "2^1": 2,
        "2^2": 2,
        "2^3": 1,
        "2^28": 1,
        "2^29": 1,
        "2^30": 1,
    }


def test_a_manifest_of_format_1_is_still_read(copied):
    path = Path(f"{copied.train_prefix}.manifest.json")
    new = {"licence", "sources", "bad", "dropped", "length_histogram", "recipe"}
    old = {key: value for key, value in json.loads(path.read_text()).items() if key not in new}
    path.write_text(json.dumps({**old, "format": 1}))
    _, manifest = open_checked(copied.train_prefix)
    assert manifest.fingerprint == copied.train.fingerprint
    assert manifest.length_histogram == {}
    assert list(problems(copied.train_prefix)) == []


def test_megatron_reads_what_tokenize_wrote(tiny):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs = IndexedDataset(tiny.train_prefix)
    header, tokens = read_header(tiny.train_prefix), memmap_tokens(tiny.train_prefix, read_header(tiny.train_prefix))
    assert len(theirs) == header.documents
    assert theirs.document_indices.tolist() == list(range(header.documents + 1))
    start = 0
    for number, length in enumerate(header.document_lengths.tolist()):
        assert theirs[number].tolist() == tokens[start : start + length].tolist()
        start += length


def test_a_set_of_megatrons_builder_is_read_and_gets_a_manifest(tiny, tmp_path):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    texts = ["First text, grüße.", "Second\ntext"]
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=DType.optimal_dtype(tiny.tokenizer.vocab_size))
    for text in texts:
        ids = [*tiny.tokenizer.encode(text), tiny.tokenizer.eos_id]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "m.idx"))
    manifest = adopt(tmp_path / "m", tiny.tokenizer, "CC0")
    assert load_manifest(tmp_path / "m") == manifest
    assert (manifest.documents, manifest.text_bytes) == (2, sum(len(text.encode()) for text in texts))
    assert list(problems(tmp_path / "m")) == []


def test_a_manifest_of_one_endless_document_takes_little_memory(tiny, tmp_path):
    """All tokens at once as Python's numbers are 36 bytes each: 140 MB here, and 36 GB of 10^9 tokens."""
    sentence = "Some words, grüße and 漢字.\n"
    part = tiny.tokenizer.encode(sentence)
    ids = np.array(part * (4_000_000 // len(part)) + [tiny.tokenizer.eos_id], dtype="<u2")
    with IndexedWriter(tmp_path / "long", tiny.tokenizer.vocab_size) as writer:
        writer.add_encoded(ids.tobytes(), np.array([len(ids)]))
    tracemalloc.start()
    manifest = adopt(tmp_path / "long", tiny.tokenizer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    assert manifest.text_bytes == len(sentence.encode()) * (len(ids) // len(part))


@pytest.mark.parametrize("settings", [{}, {"add_dummy_prefix": True, "remove_extra_whitespaces": False}])
def test_text_is_counted_in_pieces_as_it_is_at_once(tiny, monkeypatch, existing_model, settings):
    """Pieces end inside no character, and no space is lost where one begins; in our models and in Llama's."""
    model = existing_model(byte_fallback=True, normalization_rule_name="identity", **settings)
    tokenizers = [tiny.tokenizer, model]
    text = "Some words   with spaces, grüße, 漢字漢字 and \U0001f600\U0001f600.\n" * 5
    for tokenizer in tokenizers:
        documents = [[*tokenizer.encode(part), tokenizer.eos_id] for part in (text, "", " a", "漢" * 9)]
        tokens = np.array([number for document in documents for number in document])
        lengths = np.array([len(document) for document in documents])
        expected = sum(len(tokenizer.decode(document).encode()) for document in documents)
        for size in (1, 4, 5, 7, 64):
            monkeypatch.setattr("data_prep.inspection.text_bytes.PIECE_TOKENS", size + 3)
            assert count_text_bytes(tokens, lengths, tokenizer) == expected


def test_foreign_sets_that_would_train_wrongly_are_refused(tiny, tmp_path):
    write_documents(tmp_path / "open", 1000, [[5, 6, 7]])
    with pytest.raises(DataError, match="do not end in EOS 1, first at byte offset 4"):
        adopt(tmp_path / "open", tiny.tokenizer)
    write_documents(tmp_path / "large", 5000, [[4999, 1]])
    with pytest.raises(DataError, match="token 4999 is not in the vocabulary"):
        adopt(tmp_path / "large", tiny.tokenizer)


def test_the_command_exits_2_and_names_every_problem(copied):
    for name in ("train", "heldout"):
        path = copied.folder / f"{name}.bin"
        path.write_bytes(path.read_bytes()[:-2])
    command = [sys.executable, "-m", "data_prep", "verify", copied.train_prefix, copied.heldout_prefix]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "train.bin" in run.stderr
    assert "heldout.bin" in run.stderr
