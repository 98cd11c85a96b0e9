"""Folders of raw uint16 files as a source."""

import itertools
import json
import os

import numpy as np
import pytest

from data_prep.config import DataConfig, SourceConfig
from data_prep.errors import DataError
from data_prep.training.blend import open_blend, open_heldout
from data_prep.training.raw import RawFolder
from data_prep.training.reading import HeldoutSet, TrainingSet

EOS, VOCAB, T = 2, 500, 16


def write(folder, seed=0, sizes=(700, 0, 333), described=True):
    """Files a.bin (no header), b.npy and so on in turn; returns all their tokens."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    parts = []
    for number, size in enumerate(sizes):
        part = generator.integers(3, VOCAB, size).astype("<u2")
        part[generator.random(size) < 0.05] = EOS
        name = folder / "abcdef"[number]
        if number % 2:
            np.save(name.with_suffix(".npy"), part)
        else:
            part.tofile(name.with_suffix(".bin"))
        parts.append(part)
    if described:
        (folder / "raw.json").write_text(json.dumps({"eos_id": EOS, "vocab_size": VOCAB, "tokens": sum(sizes)}))
    return np.concatenate(parts).astype(np.int64)


@pytest.fixture
def raw(tmp_path):
    return tmp_path / "raw", write(tmp_path / "raw", sizes=(700, 100, 0, 333))


def test_tokens_are_the_files_one_after_the_other(raw):
    folder, tokens = raw
    store = RawFolder(folder)
    assert store.tokens == len(tokens) == 1133
    for start, stop in [(0, 1133), (690, 710), (790, 801), (1132, 1133), (5, 6), (650, 900)]:
        assert store.read(start, stop).tolist() == tokens[start:stop].tolist()
    ends = [0, *(np.flatnonzero(tokens == EOS) + 1).tolist()]
    assert store.bounds().tolist() == [*ends, *([1133] if ends[-1] != 1133 else [])]


def test_an_epoch_reads_every_window_once(raw, tmp_path):
    folder, tokens = raw
    training = TrainingSet(str(folder), T, 7, str(tmp_path / "cache"))
    n = len(training)
    assert n == 1132 // T
    assert not (tmp_path / "cache").exists(), "windows in file order need no index"
    found = sorted(training.sample(k).tobytes() for k in range(n))
    assert found == sorted(tokens[k * T : k * T + T + 1].tobytes() for k in range(n))
    assert [training.window_of(k) for k in range(n)] != [training.window_of(n + k) for k in range(n)]


def test_rows_of_one_document(raw, tmp_path):
    folder, tokens = raw
    training = TrainingSet(str(folder), T, 7, str(tmp_path / "cache"), documents="doc")
    starts = [0, *(np.flatnonzero(tokens == EOS) + 1).tolist(), len(tokens)]
    expected = sum(-(-(b - a - 1) // T) for a, b in itertools.pairwise(starts) if b > a)
    assert len(training) == expected
    for k in range(len(training)):
        row = training.window(k)
        real = row[row >= 0]
        assert EOS not in real[:-1]


def test_a_raw_folder_in_a_blend_with_megatron_files(raw, tmp_path, tiny):
    folder, _ = raw
    write(tmp_path / "held", 1)
    eos = tiny.tokenizer.eos_id
    both = [
        SourceConfig(name="tiny", train=tiny.train_prefix, heldout=tiny.heldout_prefix),
        SourceConfig(
            name="raw", train=str(folder), heldout=str(tmp_path / "held"), weight=3, eos_id=eos, vocab_size=600
        ),
    ]
    data = DataConfig(sources=both, documents="reset", cache=str(tmp_path / "cache"))
    assert list(data.problems(1000, T)) == []
    blend = open_blend(data, T)
    assert blend.consumed_by_source(400) == {"tiny": 100, "raw": 300}
    assert open_heldout(data, T, 0).windows["raw"] == 1032 // T
    both[1].eos_id = -1
    assert eos != EOS
    assert [p[0] for p in data.problems(1000, T)] == ["data.sources[1].train", "data.sources[1].heldout"]


def test_the_configuration_may_name_eos_and_vocabulary(tmp_path):
    write(tmp_path / "raw", described=False)
    with pytest.raises(DataError, match=r"eos_id -1 and vocab_size 0 cannot be.*raw\.json"):
        RawFolder(tmp_path / "raw")
    assert RawFolder(tmp_path / "raw", EOS, VOCAB).vocab_size == VOCAB


def test_truncated_or_foreign_files_are_named(raw):
    folder, _ = raw
    path = folder / "a.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"a\.bin: 1399 bytes are no whole number"):
        RawFolder(folder)
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"1132 tokens in 4 .* 1133 expected"):
        RawFolder(folder)
    path.write_bytes(whole)
    npy = folder / "b.npy"
    npy.write_bytes(npy.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"b\.npy: \d+ bytes, truncated"):
        RawFolder(folder)
    np.save(npy, np.zeros(100, np.int64))
    with pytest.raises(DataError, match=r"b\.npy: int64 of shape \(100,\); need uint16"):
        RawFolder(folder)
    npy.unlink()
    (folder / "raw.json").write_text('{"eos_id": "2"}')
    with pytest.raises(DataError, match=r"raw\.json: need whole numbers"):
        RawFolder(folder)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"0 tokens in 0 .* at least one expected"):
        RawFolder(tmp_path / "empty", EOS, VOCAB)


def test_a_token_outside_the_vocabulary_is_named(raw):
    folder, tokens = raw
    at = int(tokens.argmax())
    with pytest.raises(DataError, match=f"token {at} is {tokens[at]}, the vocabulary is 0..{tokens[at] - 1}"):
        RawFolder(folder, EOS, int(tokens[at])).read(0, len(tokens))


def test_changed_tokens_give_another_fingerprint(raw):
    folder, _ = raw
    before = RawFolder(folder).fingerprint
    os.rename(folder, folder.with_name("moved"))
    folder = folder.with_name("moved")
    assert RawFolder(folder).fingerprint == before
    tokens = np.fromfile(folder / "a.bin", "<u2")
    tokens[3] ^= 1
    tokens.tofile(folder / "a.bin")
    assert RawFolder(folder).fingerprint != before


def test_heldout_windows_of_a_raw_folder_are_in_order(raw):
    folder, tokens = raw
    heldout = HeldoutSet(str(folder), T)
    assert heldout.window(3).tolist() == tokens[3 * T : 4 * T + 1].tolist()
