"""Every row is scored once and as if it were alone, however rows are batched, cut and shared."""

import numpy as np
import pytest
import torch
from evaluated import Counting, random_rows, tiny
from hypothesis import given
from hypothesis import strategies as st

from hope.evaluate.rows import Alone, ListedRows, Row, batches_of, score_rows
from hope.evaluate.scorer import ModelScorer, fingerprint

LENGTHS = [5, 23, 1, 17, 23, 40, 9, 2]


def kept(index, nats, best):
    return [*nats.tolist(), *best.astype(float).tolist()]


def scored(rows, scorer, batch_tokens, share=None):
    found = {}
    for part in score_rows(ListedRows(rows), scorer, kept, batch_tokens=batch_tokens, share=share or Alone()):
        assert not found.keys() & part.keys()
        found |= part
    return found


@pytest.mark.parametrize("kind", ["hope", "transformer"])
def test_padding_batching_and_cutting_change_no_score(kind):
    """Against each row alone, by a plain forward pass and log-softmax, in float64."""
    model, rows = tiny(kind), random_rows(LENGTHS)
    scorer = ModelScorer(model, dtype=torch.float64)
    together, cut = scored(rows, scorer, 96), scored(rows, scorer, 11)
    assert max(map(len, batches_of(np.array(LENGTHS), 96))) > 2
    for index, row in enumerate(rows):
        ids = torch.from_numpy(row.ids)
        logits = model(ids[:-1, None])[0][:, 0].detach()
        nats = -logits.log_softmax(-1).gather(1, ids[1:, None])[row.first :, 0]
        best = (logits.argmax(-1) == ids[1:])[row.first :].double()
        wanted = torch.cat([nats, best])
        assert (torch.tensor(together[index], dtype=torch.float64) - wanted).abs().max() < 1e-11
        assert (torch.tensor(cut[index], dtype=torch.float64) - wanted).abs().max() < 1e-11


def test_a_new_document_forgets_what_was_before_also_in_another_call():
    """With `starts_after`, what follows an end of document is scored as if it stood alone."""
    model, (row,) = tiny(), random_rows([30])
    ids = row.ids % 62 + 2
    ids[0] = ids[13] = 1
    whole, alone = Row(ids, 0), Row(ids[13:], 0)
    after = lambda scorer, size: np.array(scored([whole], scorer, size)[0][14:30])  # what the new document predicts
    wanted = scored([alone], ModelScorer(model, dtype=torch.float64, starts_after=1), 64)[0][1:17]
    for size in (64, 14, 13, 5):
        resets = ModelScorer(model, dtype=torch.float64, starts_after=1)
        assert np.abs(after(resets, size) - wanted).max() < 1e-11
    assert np.abs(after(ModelScorer(model, dtype=torch.float64), 64) - wanted).max() > 1e-4


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_batches_hold_every_row_once_and_no_more_than_their_places(lengths, places):
    batches = batches_of(np.array(lengths), places)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= places


class Second:
    """The other of two processes, whose results never come: what it has itself."""

    rank, size = 1, 2
    exchange = agree = staticmethod(lambda value: value)


class First(Second):
    rank = 0


def test_processes_share_the_rows_and_what_is_done_is_passed_over():
    rows = ListedRows(random_rows(LENGTHS))
    alone = scored(random_rows(LENGTHS), Counting(), 40)
    first, second = (scored(random_rows(LENGTHS), Counting(), 40, share()) for share in (First, Second))
    assert not first.keys() & second.keys()
    assert first | second == alone
    done = set(next(iter(score_rows(rows, Counting(), kept, batch_tokens=40, share=Alone()))))
    rest = list(score_rows(rows, Counting(), kept, batch_tokens=40, share=Alone(), done=done))
    assert {index for part in rest for index in part} == set(range(len(LENGTHS))) - done


def test_an_id_without_a_row_is_refused():
    with pytest.raises(ValueError, match="token 64 is outside the model's vocabulary of 64"):
        scored([Row(np.array([3, 64]), 0)], ModelScorer(tiny()), 40)


def test_fingerprints_tell_weights_apart():
    one, other = tiny(), tiny()
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-9
    assert fingerprint(one) != fingerprint(other)
