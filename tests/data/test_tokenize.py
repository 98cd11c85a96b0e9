import json

import pytest

from data_prep.errors import DataError
from data_prep.files import sha256_file
from data_prep.indexed import memmap_tokens
from data_prep.manifest import is_verified, load_manifest, open_checked
from data_prep.tokenizing.tokenize import tokenize


def write_lines(path, lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def test_every_document_ends_in_eos_and_decodes_to_its_text(tiny):
    header, manifest = open_checked(tiny.train_prefix)
    tokens = memmap_tokens(tiny.train_prefix, header)
    texts = [json.loads(line)["text"] for line in (tiny.folder / "train.jsonl").read_bytes().splitlines()]
    assert manifest.documents == header.documents == len(texts)
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.bytes_per_token == pytest.approx(manifest.text_bytes / manifest.tokens, abs=1e-4)
    end = 0
    for length, text in zip(header.document_lengths, texts, strict=True):
        ids = tokens[end : end + length].tolist()
        end += length
        assert ids[-1] == tiny.tokenizer.eos_id
        assert tiny.tokenizer.eos_id not in ids[:-1]
        assert tiny.tokenizer.decode(ids) == text
    assert end == manifest.tokens


def test_manifest_digests_are_those_of_the_files(tiny):
    manifest = load_manifest(tiny.train_prefix)
    assert manifest.sha256_bin == sha256_file(f"{tiny.train_prefix}.bin")
    assert manifest.sha256_idx == sha256_file(f"{tiny.train_prefix}.idx")
    assert manifest.sha256_source == sha256_file(tiny.folder / "train.jsonl")
    assert manifest.sha256_tokenizer == tiny.tokenizer.sha256
    assert manifest.vocab_size == tiny.tokenizer.vocab_size


BAD_LINES = {
    b'{"text": "unfinished': "Unterminated string",
    b'{"text": "\xff"}': "bad_utf8: invalid start byte at byte 10 of the record",
    b'["text"]': "expected an object, found list",
    b'{"id": 1}': r"missing_field: no text under the key 'text' \(found none\); keys are \['id'\]",
    b'{"text": 5}': "no text under the key",
    b'{"text": ""}': "empty: the text has no visible character",
    rb'{"text": "a\ud800b"}': "surrogate: the text holds half of a surrogate pair",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_with_number_and_offset_and_leaves_nothing(tiny, tmp_path, line):
    good = '{"text": "grüße"}'.encode()
    source = write_lines(tmp_path / "in.jsonl", [good, b"", good, line, good])
    offset = 2 * len(good) + 3
    expected = rf"in\.jsonl: line 4, byte offset {offset}: .*{BAD_LINES[line]}"
    with pytest.raises(DataError, match=expected):
        tokenize(source, tiny.tokenizer, tmp_path / "out")
    assert source.read_bytes()[offset:].startswith(line)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_no_documents_is_an_error(tiny, tmp_path):
    with pytest.raises(DataError, match="no documents"):
        tokenize(write_lines(tmp_path / "in.jsonl", [b"", b" "]), tiny.tokenizer, tmp_path / "out")
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        tokenize(tmp_path / "absent.jsonl", tiny.tokenizer, tmp_path / "out")


def test_documents_larger_than_one_batch_keep_their_order(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.tokenizing.shard.BATCH_CHARACTERS", 100)
    again = tokenize(tiny.folder / "train.jsonl", tiny.tokenizer, tmp_path / "out")
    assert again == tiny.train


def test_verification_sees_a_changed_byte_text_or_tokenizer(copied):
    prefix, manifest = copied.train_prefix, copied.train
    keys = (manifest.sha256_source, manifest.sha256_tokenizer)
    assert is_verified(prefix, *keys)
    assert not is_verified(prefix, "0" * 64, keys[1])
    assert not is_verified(prefix, keys[0], "0" * 64)
    data = bytearray((copied.folder / "train.bin").read_bytes())
    data[100] ^= 1
    (copied.folder / "train.bin").write_bytes(data)
    assert not is_verified(prefix, *keys)


def test_an_interrupted_replacement_is_refused(copied, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("data_prep.tokenizing.tokenize.TokenSetManifest.save", stop)
    with pytest.raises(KeyboardInterrupt):
        tokenize(copied.folder / "heldout.jsonl", copied.tokenizer, copied.train_prefix)
    with pytest.raises(DataError, match=r"train\.manifest\.json: no such file"):
        open_checked(copied.train_prefix)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format": 99}', b'{"format": 1, "tokens": 3}'])
def test_a_broken_manifest_is_named(copied, content):
    (copied.folder / "train.manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.manifest\.json"):
        open_checked(copied.train_prefix)


def test_a_manifest_of_other_files_is_refused(copied):
    for suffix in ("bin", "idx"):
        other = (copied.folder / f"heldout.{suffix}").read_bytes()
        (copied.folder / f"train.{suffix}").write_bytes(other)
    with pytest.raises(DataError, match="tokenize again"):
        open_checked(copied.train_prefix)
