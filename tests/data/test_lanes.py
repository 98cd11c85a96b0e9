"""`data.documents: stream`: rows follow one another in the text, as a pure function of (seed, sample number)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCAB, config_file, token_set

from configs.errors import ConfigError
from configs.schema import load
from data_prep.config import DataConfig, SourceConfig
from data_prep.errors import DataError
from data_prep.inspection.run import show_sample
from data_prep.training.batches import BatchLoader
from data_prep.training.blend_preview import preview
from data_prep.training.index_store import open_store
from data_prep.training.order import LaneOrder
from data_prep.training.reading import TrainingSet

T, LANES = 16, 6


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("lanes") / "train"
    token_set(path, 60, 0)
    return str(path)


def opened(prefix: str, seed: int = 1234) -> TrainingSet:
    return TrainingSet(prefix, T, seed, documents="stream", lanes=LANES)


@pytest.mark.parametrize(("n", "lanes"), [(1, 1), (6, 6), (7, 6), (24, 6), (131, 8)])
def test_lanes_follow_the_file_and_cover_it(n, lanes):
    order = LaneOrder(n, lanes, 1234)
    windows = np.array([order[k] for k in range(3 * n * lanes)]).reshape(-1, lanes)  # [step, lane]
    assert (windows[1:] == (windows[:-1] + 1) % n).all()
    assert sorted(windows[:n, 0]) == list(range(n))
    assert set(windows[: -(-n // lanes)].flatten()) == set(range(n))
    assert all(len(set(row)) == lanes for row in windows.tolist())
    if n % lanes == 0:
        assert sorted(windows[: n // lanes].flatten()) == list(range(n))


def test_the_order_is_frozen():
    """Runs resume in this order: a change here breaks every checkpoint in use."""
    order = LaneOrder(1000, 3, 1234, "web")
    assert [order[k] for k in (0, 1, 2, 3, 3000, 299_999)] == [907, 240, 573, 908, 907, 572]
    assert len({LaneOrder(1000, 3, seed).first for seed in range(20)}) > 15


def test_any_position_is_reached_at_once(prefix):
    """A loader that is asked for step 40 first reads what one that came there by steps reads."""
    walked = BatchLoader(opened(prefix), LANES, 3, documents="stream")
    for step in range(40):
        walked.batches(step * LANES)
    jumped = BatchLoader(opened(prefix), LANES, 3, documents="stream", prefetch=False)
    for a, b in zip(walked.batches(40 * LANES), jumped.batches(40 * LANES), strict=True):
        assert torch.equal(a.tokens_TB, b.tokens_TB)
    walked.close()


@pytest.mark.parametrize(("micro", "ranks"), [(6, 1), (2, 1), (1, 2), (3, 2)])
def test_rows_of_every_micro_batch_are_one_text(prefix, micro, ranks):
    """Row b of micro-batch m goes on where it ended, on every rank; the text is that of the file, read by itself."""
    text = open_store(prefix).read(0, open_store(prefix).tokens)
    n = (len(text) - 1) // T
    first = LaneOrder(n, LANES, 1234).first
    lanes = []
    for rank in range(ranks):
        loader = BatchLoader(opened(prefix), LANES, micro, rank, ranks, documents="stream", prefetch=False)
        steps = [loader.batches(step * LANES) for step in range(n + 2)]
        assert all(batch.starts_TB is None and batch.weights_TB is None for batches in steps for batch in batches)
        for number in range(len(steps[0])):
            lanes += torch.cat([batches[number].tokens_TB for batches in steps]).T.tolist()
            ends = [batches[number].targets_TB[-1] for batches in steps]
            starts = [batches[number].tokens_TB[0] for batches in steps]
            for step in range(n + 1):
                at = [(first + lane * n // LANES + step) % n for lane in range(len(lanes) - micro, len(lanes))]
                at = [window for window in at if window != n - 1]  # the file's end: its last target comes no more
                assert len(at) < micro or torch.equal(ends[step], starts[step + 1])
    for lane, tokens in enumerate(lanes):
        begin = (first + lane * n // LANES) % n * T
        ring = np.roll(text[: n * T], -begin)
        assert tokens == np.concatenate([ring, ring[: 2 * T]]).tolist()


def test_other_bytes_are_noticed_and_nothing_is_indexed(prefix):
    cache = Path(f"{prefix}.cache")
    opened(prefix)
    [folder] = [path for path in cache.iterdir() if path.name.endswith("-stream")]
    assert [path.name for path in folder.iterdir()] == ["checked.json"]
    assert opened(prefix).fingerprint_of_data != TrainingSet(prefix, T, 1234).fingerprint_of_data


def test_too_few_windows_are_refused(prefix):
    with pytest.raises(DataError, match=r"\d+ windows are fewer than the 9999 lanes .* train.global_batch at most"):
        TrainingSet(prefix, T, 1234, documents="stream", lanes=9999)
    with pytest.raises(IndexError, match="before the first"):
        LaneOrder(10, 2, 0)[-1]


def test_what_looks_at_the_data_says_what_a_stream_is(prefix):
    data = DataConfig(train=prefix, heldout=prefix, documents="stream")
    assert "windows in file order" in "\n".join(preview(data, T, 5000))
    with pytest.raises(DataError, match=r"depends on train\.global_batch"):
        show_sample(data, T, 3)


def test_a_blend_is_no_stream(prefix):
    sources = [SourceConfig(name=name, train=prefix, heldout=prefix) for name in ("a", "b")]
    found = list(DataConfig(sources=sources, documents="stream").problems(VOCAB, T))
    assert ("data.documents", "stream follows one text, and data.sources names 2") in [part[:2] for part in found]
    one = DataConfig(sources=sources[:1], documents="stream")
    assert "data.documents" not in [part.path for part in one.problems(VOCAB, T)]


@pytest.mark.parametrize(
    ("memory", "words", "path", "said"),
    [
        ("matrix", ["train.compile=block"], "train.compile", "dense; or data.documents=carry"),
        ("matrix", ["train.cuda_graphs=true"], "train.cuda_graphs", "false; or data.documents=carry"),
        ("matrix", ["train.seq_len_stages=[{from_step: 1, seq_len: 8}]"], "train.seq_len_stages", "[]; or"),
        ("attention", [], "model.mixers.attention.window", "1024; or data.documents=carry"),
    ],
)
def test_what_begins_anew_or_grows_for_ever_is_refused(tmp_path, memory, words, path, said):
    config = config_file(tmp_path, memory)
    with pytest.raises(ConfigError) as error:
        load(config, ["data.documents=stream", *words])
    fixes = [fix for where, what, fix in error.value.problems if where == path and "stream" in what]
    assert [fix.startswith(said) for fix in fixes] == [True]
    load(config, ["data.documents=stream", *(["model.mixers.attention.window=8"] if memory == "attention" else [])])
