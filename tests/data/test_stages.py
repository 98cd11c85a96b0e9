"""Stages of shorter sequences: the same tokens in the same order, cut differently."""

import numpy as np
import pytest
import torch
from tiny import token_set

from data_prep.training.batches import BatchLoader
from data_prep.training.reading import TrainingSet
from data_prep.training.stages import split_windows
from hope.train.config import SeqLenStage, TrainConfig

T = 32


@pytest.fixture(scope="module")
def dataset(tiny, tmp_path_factory):
    return TrainingSet(tiny.train_prefix, T, 1234, str(tmp_path_factory.mktemp("cache")))


def inputs_and_targets(batches):
    """Both as one sequence in row order."""
    rows = lambda name: torch.cat([getattr(batch, name).T.reshape(-1) for batch in batches]).tolist()
    return rows("tokens_TB"), rows("targets_TB")


@pytest.mark.parametrize("documents", ["carry", "reset"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_the_tokens_of_every_step_do_not_depend_on_the_stage(dataset, documents, prefetch):
    plain = BatchLoader(dataset, 6, 3, documents=documents, prefetch=False)
    staged = BatchLoader(dataset, 6, 3, documents=documents, prefetch=prefetch)
    for step, row_tokens in enumerate([8, 8, 16, 16, 32, 0]):
        expected, found = plain.batches(6 * step), staged.batches(6 * step, row_tokens)
        assert inputs_and_targets(found) == inputs_and_targets(expected)
        length = row_tokens or T
        for batch in found:
            assert batch.tokens_TB.shape == (length, 3 * T // length)
            if documents == "reset":
                assert batch.starts_TB[0].all()
                assert torch.equal(batch.starts_TB[1:], batch.tokens_TB[:-1] == dataset.eos_id)
    staged.close()


def test_padding_keeps_its_weights(tmp_path):
    """Rows of one document, cut: the same real targets, each with the same weight."""
    token_set(tmp_path / "short", 30, 0)
    dataset = TrainingSet(str(tmp_path / "short"), T, 1, documents="doc")
    loader = BatchLoader(dataset, 12, 4, documents="doc", prefetch=False)
    flat = lambda batches, name: torch.cat([getattr(b, name).T.reshape(-1) for b in batches])
    whole, cut = loader.batches(0), loader.batches(0, 8)
    for name in ("tokens_TB", "targets_TB", "weights_TB"):
        assert torch.equal(flat(whole, name), flat(cut, name))
    assert flat(cut, "weights_TB").mean().item() == pytest.approx(1)
    assert (flat(cut, "weights_TB") == 0).any()


@pytest.mark.parametrize("row_tokens", [5, 64, -8])
def test_lengths_that_do_not_divide_are_refused(row_tokens):
    with pytest.raises(ValueError, match=f"32 tokens do not divide into rows of {row_tokens}"):
        split_windows([np.arange(T + 1)], row_tokens)


def train(*stages: tuple[int, int]) -> TrainConfig:
    listed = [SeqLenStage(from_step=step, seq_len=length) for step, length in stages]
    return TrainConfig(steps=100, seq_len=48, global_batch=8, micro_batch=2, seq_len_stages=listed)


def test_the_stage_of_a_step():
    staged = train((1, 12), (10, 24), (50, 48))
    assert [staged.seq_len_at(step) for step in (1, 9, 10, 49, 50, 100)] == [12, 12, 24, 24, 48, 48]
    assert list(staged.problems()) == []
    assert staged.tokens_per_step == 8 * 48
    assert train().seq_len_at(1) == 48


@pytest.mark.parametrize(
    ("stages", "path", "fix"),
    [
        ([(2, 24)], "train.seq_len_stages[0].from_step", "1"),
        ([(1, 24), (1, 48)], "train.seq_len_stages[1].from_step", "2 or more"),
        ([(1, 20)], "train.seq_len_stages[0].seq_len", "nearest: 16, 24"),
        ([(1, 24), (9, 96)], "train.seq_len_stages[1].seq_len", "nearest: 48"),
        ([(1, 0)], "train.seq_len_stages[0].seq_len", "nearest: 1"),
    ],
)
def test_stages_that_cannot_be_are_config_problems(stages, path, fix):
    assert [(where, works) for where, _, works in train(*stages).problems()] == [(path, fix)]
