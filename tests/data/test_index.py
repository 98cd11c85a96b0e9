"""Indices built before the job, data that changed under its name, and the commands."""

import argparse
import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from multirank import run_ranks
from tiny import write_documents

from data_prep.__main__ import main
from data_prep.config import DataConfig
from data_prep.errors import DataError
from data_prep.indexed import read_header
from data_prep.manifest import TokenSetManifest
from data_prep.training.cli import add_parsers
from data_prep.training.index_key import IndexKey
from data_prep.training.index_store import MegatronStore
from data_prep.training.reading import HeldoutSet, TrainingSet
from data_prep.training.window_index import open_windows

T = 32


def flip_one_token(prefix: str) -> None:
    """Another token in the middle of .bin, same size, same manifest."""
    dtype = read_header(prefix).dtype
    tokens = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r+")
    tokens[len(tokens) // 2] ^= 1
    tokens.flush()
    os.utime(f"{prefix}.bin", ns=(1, 1))  # a time of its own even where the clock is coarse


def run(*words: str) -> None:
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    args = parser.parse_args(words)
    args.run(args)


@pytest.fixture
def config_file(copied, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"data: {{train: {copied.train_prefix}, heldout: {copied.heldout_prefix}, index: require}}\n"
        f"model: {{vocab_size: 1000}}\ntrain: {{seq_len: {T}}}\n"
    )
    return str(path)


@pytest.mark.parametrize("documents", ["carry", "doc"])
def test_a_required_index_is_asked_for_and_built_by_the_command(copied, config_file, capsys, documents):
    data = DataConfig(train=copied.train_prefix, heldout=copied.heldout_prefix, index="require", documents=documents)
    ((path, what, fix),) = data.problems(1000, T)
    assert path == "data.train"
    assert "has no index" in what
    assert "`python -m data_prep index CONFIG`" in fix
    open_it = lambda: TrainingSet(copied.train_prefix, T, data.seed, documents=documents, build=False)
    with pytest.raises(DataError, match=r"train: no index .*`python -m data_prep index CONFIG`"):
        open_it()
    run("index", config_file, f"data.documents={documents}")
    out = capsys.readouterr().out
    assert out.count("(built)") == 1
    assert f"{len(open_it()):,} windows of {T}" in out
    assert list(data.problems(1000, T)) == []
    run("index", config_file, f"data.documents={documents}")
    assert capsys.readouterr().out.count("(kept)") == 1
    data.seed += documents == "carry"  # the index of another run is none
    assert len(list(data.problems(1000, T + (documents == "doc")))) == 1


def test_document_rows_come_from_the_mapped_index(copied):
    built = TrainingSet(copied.train_prefix, T, 1, documents="doc")
    mapped = TrainingSet(copied.train_prefix, T, 1, documents="doc", build=False)
    heldout = HeldoutSet(copied.train_prefix, T, "doc")
    lengths = read_header(copied.train_prefix).document_lengths
    assert len(built) == len(mapped) == len(heldout) == sum(-(-(int(n) - 1) // T) for n in lengths)
    assert [mapped.window(k).tolist() for k in range(len(mapped))] == [
        heldout.window(k).tolist() for k in range(len(heldout))
    ]
    epoch = [mapped.window_of(k) for k in range(len(mapped))]
    assert sorted(epoch) == list(range(len(mapped)))


@pytest.mark.parametrize("indexed_before", [False, True])
@pytest.mark.parametrize("documents", ["carry", "doc"])
def test_data_changed_under_the_same_name_is_refused_by_name(copied, indexed_before, documents):
    if indexed_before:
        TrainingSet(copied.train_prefix, T, 1, documents=documents)
    flip_one_token(copied.train_prefix)
    for _ in range(2):  # the failed attempt must not leave an index that the next one trusts
        with pytest.raises(DataError, match=r"train\.bin: sha256 .* its manifest says .* changed under the same name"):
            TrainingSet(copied.train_prefix, T, 1, documents=documents)
    flip_one_token(copied.train_prefix)
    TrainingSet(copied.train_prefix, T, 1, documents=documents)


def test_changed_heldout_data_is_refused_by_name(copied):
    flip_one_token(copied.heldout_prefix)
    with pytest.raises(DataError, match=r"heldout\.bin: sha256 .* changed under the same name"):
        HeldoutSet(copied.heldout_prefix, T)


def test_bytes_are_read_once_and_not_at_every_start(copied, monkeypatch):
    TrainingSet(copied.train_prefix, T, 1)
    read = []
    digest = lambda path: read.append(str(path)) or "no digest"
    monkeypatch.setattr("data_prep.training.index_store.sha256_file", digest)
    TrainingSet(copied.train_prefix, T, 1)
    assert read == []
    os.utime(f"{copied.train_prefix}.idx", ns=(5, 5))
    with pytest.raises(DataError, match="changed under the same name"):
        TrainingSet(copied.train_prefix, T, 1)
    assert read == [f"{copied.train_prefix}.bin"]


def fail_on_rank(prefix: str) -> str:
    dist.init_process_group("gloo")
    with pytest.raises(DataError) as caught:
        TrainingSet(prefix, T, 1)
    dist.destroy_process_group()
    return str(caught.value)


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-4],
    "flipped": lambda content: content[:-1] + bytes([content[-1] ^ 64]),
    "gone": None,
}
"""What becomes of a file."""


@pytest.mark.parametrize("documents", ["carry", "doc"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_refused_by_name_and_built_again(copied, documents, damage):
    def opened():
        return TrainingSet(copied.train_prefix, T, 1, documents=documents)

    before = opened()
    [folder] = [path.parent for path in Path(f"{copied.train_prefix}.cache").glob("*/written.json")]
    file = sorted(folder.glob("*.npy"))[-1]
    content = file.read_bytes()
    file.unlink()  # another file: what maps the old one keeps it
    if DAMAGES[damage]:
        file.write_bytes(DAMAGES[damage](content))
    with pytest.raises(DataError, match="is not what was written") as caught:
        opened()
    assert str(folder) in str(caught.value)
    assert file.name in str(caught.value)
    assert "remove this folder" in str(caught.value)
    shutil.rmtree(folder)
    assert np.array_equal(opened().window(0), before.window(0))


def test_an_index_without_a_record_is_read_and_refused_if_it_cannot_be(copied):
    opened = lambda: TrainingSet(copied.train_prefix, T, 1)
    opened()
    [record] = Path(f"{copied.train_prefix}.cache").glob("*/written.json")
    record.unlink()  # as an earlier version left it
    opened()
    file = next(record.parent.glob("*sample_index.npy"))
    file.unlink()
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot be read .*remove this folder"):
        opened()


def test_changed_data_is_an_error_on_every_rank(copied):
    flip_one_token(copied.train_prefix)
    answers = run_ranks(fail_on_rank, 2, copied.train_prefix, timeout=120)
    assert answers[0] == answers[1]
    assert "changed under the same name" in answers[0]


def test_documents_too_short_for_any_row_are_refused(tmp_path):
    writer = write_documents(tmp_path / "a", 300, [[1]] * 5)
    TokenSetManifest(5, 5, 5, 1.0, 300, 1, writer.sha256_bin, writer.sha256_idx, "", "").save(tmp_path / "a")
    with pytest.raises(DataError, match="no document has two tokens"):
        TrainingSet(str(tmp_path / "a"), T, 1, documents="doc")


def test_more_documents_than_megatron_numbers_are_refused(copied):
    store = MegatronStore(copied.train_prefix)
    store.manifest = dataclasses.replace(store.manifest, documents=2**31)
    with pytest.raises(DataError, match=r"train\.idx: 2147483648 documents, .* 2147483647; make several sets"):
        open_windows(store, IndexKey(T, 1))


def test_blend_command_prints_the_budget(copied, config_file, capsys):
    run("blend", config_file, "--tokens", "1e4")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{-(-10_000 // T)} samples of {T} tokens")
    assert not (copied.folder / "train.cache").exists(), "a preview changes nothing"
    shutil.copy(copied.folder / "heldout.bin", copied.folder / "train.bin")
    with pytest.raises(DataError, match=r"train\.bin: \d+ bytes"):
        run("blend", config_file, "--tokens", "1e4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {trian: x}\ntrain: {seq_len: 4}", "trian"),
        ("data: {train: x}", "train.seq_len is None"),
        ("data: {train: ''}\ntrain: {seq_len: 4}", "data.train is not set"),
        ("data: [", "run.yaml"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    for words in (["index"], ["blend", "--tokens", "100"]):
        with pytest.raises(DataError, match=message):
            run(words[0], str(tmp_path / "run.yaml"), *words[1:])


@pytest.mark.parametrize("word", ["0", "-5", "many", "inf"])
def test_a_token_budget_that_is_no_number_is_refused(word, capsys):
    with pytest.raises(SystemExit):
        run("blend", "a.yaml", f"--tokens={word}")
    assert "is not a number of tokens" in capsys.readouterr().err


def test_overrides_may_stand_behind_options(copied, config_file, capsys):
    shown = []
    for words in (["data.seed=3", "--tokens", "1e4"], ["--tokens", "1e4", "data.seed=3"]):
        assert main(["blend", config_file, *words]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "seed 3" in shown[0]
    for words in (["blend", config_file, "--tokens", "1e4", "--sed=3"], ["verify", copied.train_prefix, "--x"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err
