import hashlib
import os
import shutil

import numpy as np
import pytest
import torch.distributed as dist
from multirank import run_ranks
from tiny import write_documents

from data_prep.errors import DataError
from data_prep.indexed import memmap_tokens, read_header
from data_prep.manifest import TokenSetManifest
from data_prep.tokenizing.tokenize import tokenize
from data_prep.training.reading import HeldoutSet, TrainingSet

T = 64


@pytest.fixture(scope="module")
def dataset(tiny, tmp_path_factory):
    return TrainingSet(tiny.train_prefix, T, 1234, str(tmp_path_factory.mktemp("cache")))


def test_an_epoch_covers_every_window_once_and_epochs_differ(dataset, tiny):
    n = len(dataset)
    assert n == (tiny.train.tokens - 1) // T
    every_window = sorted(dataset.window(i).tobytes() for i in range(n))
    epochs = [[dataset.sample(e * n + i).tobytes() for i in range(n)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == every_window
    assert epochs[0] != epochs[1] != epochs[2]


def test_windows_are_the_documents_in_some_order_without_gaps(dataset, tiny):
    """Chaining windows by their shared token gives all tokens but the dropped last partial window."""
    assert dataset.window(0).dtype == np.int64
    assert dataset.window(0).shape == (T + 1,)
    header = read_header(tiny.train_prefix)
    tokens = memmap_tokens(tiny.train_prefix, header)
    inputs = np.concatenate([dataset.window(i)[:-1] for i in range(len(dataset))])
    missing = np.bincount(tokens, minlength=1000) - np.bincount(inputs, minlength=1000)
    assert missing.min() >= 0
    assert missing.sum() == len(tokens) - T * len(dataset) <= T


def test_order_is_a_function_of_seed_and_consumed_samples_only(dataset, tiny, tmp_path):
    """A new object that starts late, as a resumed or extended run does, reads the same."""
    n = len(dataset)
    numbers = [2 * n + 3, 5, n - 1, n, 0, 7 * n]
    again = TrainingSet(tiny.train_prefix, T, 1234, str(tmp_path))
    assert [again.sample(i).tobytes() for i in numbers] == [dataset.sample(i).tobytes() for i in numbers]
    other = TrainingSet(tiny.train_prefix, T, 1235, str(tmp_path))
    assert [other.sample(i).tobytes() for i in range(9)] != [dataset.sample(i).tobytes() for i in range(9)]


def test_fingerprint_follows_the_token_ids(dataset):
    ids = b"".join(dataset.sample(number).tobytes() for number in (8, 9, 10, 11))
    assert dataset.fingerprint(8, 4) == hashlib.sha256(ids).hexdigest()
    assert len({dataset.fingerprint(c, 4) for c in range(20)}) == 20
    assert dataset.fingerprint(8, 4) != dataset.fingerprint(8, 5)


def test_heldout_windows_are_in_file_order(tiny):
    heldout = HeldoutSet(tiny.heldout_prefix, T)
    header = read_header(tiny.heldout_prefix)
    tokens = memmap_tokens(tiny.heldout_prefix, header)
    assert len(heldout) == (len(tokens) - 1) // T > 3
    for k in (0, 3, len(heldout) - 1):
        assert heldout.window(k).tolist() == tokens[k * T : k * T + T + 1].tolist()
        assert len(heldout.window(k)) == T + 1
    for k in (-1, len(heldout)):
        with pytest.raises(IndexError):
            heldout.window(k)


def test_windows_outside_an_epoch_are_refused(dataset):
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError, match="outside an epoch"):
            dataset.window(index)


def test_data_tokenized_anew_is_not_read_through_the_old_cache(copied):
    """megatron-core's own cache key holds the path but not the data, and would load the old index."""
    old = TrainingSet(copied.train_prefix, T, 1234)
    lines = (copied.folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    (copied.folder / "half.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]))
    manifest = tokenize(copied.folder / "half.jsonl", copied.tokenizer, copied.train_prefix)
    new = TrainingSet(copied.train_prefix, T, 1234)
    assert len(new) == (manifest.tokens - 1) // T < len(old)
    assert all(len(new.window(i)) == T + 1 for i in range(len(new)))
    assert new.fingerprint_of_data != old.fingerprint_of_data
    assert len(list((copied.folder / "train.cache").iterdir())) == 2


def test_cache_is_reused_after_the_data_was_moved_and_holds_no_rubbish(copied, monkeypatch):
    first = TrainingSet(copied.train_prefix, T, 1234)
    for suffix in ("bin", "idx", "manifest.json", "cache"):
        os.rename(f"{copied.train_prefix}.{suffix}", copied.folder / f"moved.{suffix}")
    (entry,) = (copied.folder / "moved.cache").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in entry.iterdir()}
    moved = TrainingSet(str(copied.folder / "moved"), T, 1234)
    assert moved.fingerprint(0, 8) == first.fingerprint(0, 8)
    assert {path.name: path.stat().st_mtime_ns for path in entry.iterdir()} == before


def test_a_job_that_publishes_the_same_cache_first_is_no_error(copied, monkeypatch):
    rename = os.rename

    def late_rename(source, target):
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr("data_prep.training.window_index.os.rename", late_rename)
    dataset = TrainingSet(copied.train_prefix, T, 1234)
    assert len(dataset.window(0)) == T + 1
    assert len(list((copied.folder / "train.cache").iterdir())) == 1


def test_a_damaged_cache_is_named(copied):
    TrainingSet(copied.train_prefix, T, 1234)
    (entry,) = (copied.folder / "train.cache").iterdir()
    (shuffle,) = entry.glob("*shuffle_index.npy")
    shuffle.write_bytes(shuffle.read_bytes()[:150])
    with pytest.raises(DataError, match="remove this folder"):
        TrainingSet(copied.train_prefix, T, 1234)


def test_truncated_bin_is_refused_before_training(copied):
    path = copied.folder / "train.bin"
    path.write_bytes(path.read_bytes()[:1000])
    for make in (lambda: TrainingSet(copied.train_prefix, T, 1), lambda: HeldoutSet(copied.train_prefix, T)):
        with pytest.raises(DataError, match=r"train\.bin: 1000 bytes"):
            make()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("documents", [[], [[], []]], ids=["no documents", "no tokens"])
def test_empty_set_is_refused_instead_of_hanging(tmp_path, documents):
    write_documents(tmp_path / "a", 300, documents)
    TokenSetManifest(len(documents), 0, 0, 0.0, 300, 1, "", "", "", "").save(tmp_path / "a")
    with pytest.raises(DataError, match=f"{len(documents)} documents, 0 tokens"):
        TrainingSet(str(tmp_path / "a"), T, 1)


def test_less_than_one_window_names_the_longest_that_works(tiny, tmp_path):
    tokens = tiny.train.tokens
    with pytest.raises(DataError, match=f"seq_len at most {tokens - 1} works"):
        TrainingSet(tiny.train_prefix, tokens, 1, str(tmp_path))
    assert len(TrainingSet(tiny.train_prefix, tokens - 1, 1, str(tmp_path))) == 1


def read_on_rank(prefix, cache):
    dist.init_process_group("gloo")
    dataset = TrainingSet(prefix, T, 1234, cache)
    answer = dataset.fingerprint(0, 16)
    dist.destroy_process_group()
    return answer


def fail_on_rank(good, bad, cache):
    dist.init_process_group("gloo")
    with pytest.raises(DataError) as caught:
        TrainingSet(bad if dist.get_rank() == 1 else good, T, 1234, cache)
    dist.destroy_process_group()
    return str(caught.value)


def test_two_ranks_build_one_cache_and_read_what_one_process_reads(dataset, tiny, tmp_path):
    answers = run_ranks(read_on_rank, 2, tiny.train_prefix, str(tmp_path / "cache"), timeout=120)
    assert answers == [dataset.fingerprint(0, 16)] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 1
    # the second start, and one process, find it
    assert run_ranks(read_on_rank, 2, tiny.train_prefix, str(tmp_path / "cache"), timeout=120) == answers
    assert TrainingSet(tiny.train_prefix, T, 1234, str(tmp_path / "cache")).fingerprint(0, 16) == answers[0]


def test_an_error_on_one_rank_is_raised_on_all(tiny, tmp_path):
    absent = str(tmp_path / "absent")
    answers = run_ranks(fail_on_rank, 2, tiny.train_prefix, absent, str(tmp_path / "cache"), timeout=120)
    assert answers == [f"rank 1: {absent}.idx: no such file"] * 2


def test_an_unwritable_cache_is_an_error_on_all_ranks(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file" / "cache")
    answers = run_ranks(fail_on_rank, 2, tiny.train_prefix, tiny.train_prefix, cache, timeout=120)
    assert answers[0] == answers[1]
    assert "set data.cache to a folder that can be written" in answers[0]
