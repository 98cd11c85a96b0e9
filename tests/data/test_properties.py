"""Properties of the index arithmetic and of the files, for any sizes, weights, positions and texts."""

import tempfile
from fractions import Fraction

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import write_documents

from data_prep.indexed import memmap_tokens, read_header
from data_prep.tokenizing.units import cut
from data_prep.training.batches import global_batch_slice
from data_prep.training.blend_order import BlendOrder
from data_prep.training.index_rows import DocumentRows, StreamWindows, rows_before
from data_prep.training.order import EpochOrder
from data_prep.training.stages import split_windows

quick = settings(max_examples=150, deadline=None)
weights = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=7)


class Tokens:
    """A store whose token at place k is k."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.tokens = lengths, sum(lengths)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.tokens
        return np.arange(start, stop)

    def bounds(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)])


@quick
@given(n=st.integers(1, 600), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**9), source=st.text(max_size=8))
def test_an_epoch_is_a_permutation(n, seed, epoch, source):
    order = EpochOrder(n, seed, epoch, source)
    assert len({order[i] for i in range(n)}) == n
    assert {order[0], order[n - 1]} <= set(range(n))


@quick
@given(weights=weights, start=st.integers(0, 10**12), steps=st.integers(1, 40))
def test_a_blend_can_start_anywhere(weights, start, steps):
    """Jumping to a position and walking there agree, and numbers within a source go up one by one."""
    walking = BlendOrder(weights)
    counts = walking.counts(start)
    assert sum(counts) == start
    for position in range(start, start + steps):
        source, own = walking.locate(position)
        assert (source, own) == BlendOrder(weights).locate(position)
        assert own == counts[source]
        counts[source] += 1
    assert BlendOrder(weights).counts(start + steps) == counts


@quick
@given(weights=weights, position=st.integers(0, 10**15))
def test_a_blend_is_true_to_its_weights_at_every_position(weights, position):
    order = BlendOrder(weights)
    exact = [Fraction(repr(weight)) for weight in weights]
    for count, weight in zip(order.counts(position), exact, strict=True):
        share = weight / sum(exact)
        assert abs(count - position * share) <= Fraction(1, 2) + share * len(weights) / 2


@quick
@given(whole=st.lists(st.integers(1, 20), min_size=1, max_size=5), scale=st.sampled_from([1, 0.5, 4, 1024]))
def test_a_blend_is_exact_after_a_period_and_knows_no_scale(whole, scale):
    order, scaled = BlendOrder(whole), BlendOrder([weight * scale for weight in whole])
    n = sum(whole)
    sequence = [order.locate(k) for k in range(2 * n)]
    assert [scaled.locate(k) for k in range(2 * n)] == sequence
    for source, weight in enumerate(whole):
        assert [own for found, own in sequence[:n] if found == source] == list(range(weight))
    assert [found for found, _ in sequence[:n]] == [found for found, _ in sequence[n:]]


@quick
@given(consumed=st.integers(0, 10**12), dp_size=st.integers(1, 16), share=st.integers(1, 16))
def test_slices_of_ranks_are_the_global_batch(consumed, dp_size, share):
    parts = [global_batch_slice(consumed, share * dp_size, rank, dp_size) for rank in range(dp_size)]
    assert [number for part in parts for number in part] == list(range(consumed, consumed + share * dp_size))


@quick
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30), seq_len=st.integers(1, 20))
def test_document_rows_predict_every_token_of_a_document_but_the_first_once(lengths, seq_len):
    rows = DocumentRows.of(Tokens(lengths), seq_len)
    targets = []
    for index in range(len(rows)):
        window = rows.window(index)
        real = rows.real_targets(index)
        assert window.shape == (seq_len + 1,)
        assert 1 <= real <= seq_len
        assert (window[: real + 1] == window[0] + np.arange(real + 1)).all()
        assert (window[real + 1 :] == -1).all()
        targets += window[1 : real + 1].tolist()
    starts = np.cumsum([0, *lengths])
    expected = [k for begin, n in zip(starts, lengths, strict=False) for k in range(begin + 1, begin + n)]
    assert targets == expected
    assert rows_before(np.array(lengths), seq_len)[-1] == len(rows)


@quick
@given(tokens=st.integers(1, 500), seq_len=st.integers(1, 40))
def test_stream_windows_predict_every_token_but_the_first_and_the_dropped_tail(tokens, seq_len):
    windows = StreamWindows(Tokens([tokens]), seq_len)
    targets = [token for index in range(len(windows)) for token in windows.window(index)[1:].tolist()]
    assert targets == list(range(1, len(windows) * seq_len + 1))
    assert 0 <= tokens - 1 - len(targets) < seq_len


@quick
@given(rows=st.integers(1, 12), row_tokens=st.integers(1, 12), samples=st.integers(1, 5))
def test_cutting_windows_into_rows_keeps_every_target_in_order(rows, row_tokens, samples):
    length = rows * row_tokens
    windows = [np.arange(length + 1) + 1000 * sample for sample in range(samples)]
    cut = split_windows(windows, row_tokens)
    assert [len(row) for row in cut] == [row_tokens + 1] * (rows * samples)
    for part in (slice(None, -1), slice(1, None)):
        assert np.array_equal(np.concatenate([row[part] for row in cut]), np.concatenate([w[part] for w in windows]))


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.binary(max_size=12), max_size=30), unit_bytes=st.integers(1, 60))
def test_units_are_the_file_cut_behind_newlines(lines, unit_bytes):
    data = b"\n".join(lines)
    assume(not data.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")))  # compressed: one unit
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.write(data)
        file.flush()
        units = cut([file.name], "auto", unit_bytes)
    pieces = [data[unit.start : unit.stop] for unit in units]
    assert b"".join(pieces) == data
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])
    # no unit could end earlier: its last line begins before unit_bytes
    assert all(piece.find(b"\n", unit_bytes - 1) in (-1, len(piece) - 1) for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 70_000), max_size=9), max_size=12), large=st.booleans())
def test_documents_written_are_documents_read(documents, large):
    vocab_size = 70_001 if large else 65_499
    documents = [[min(token, vocab_size - 1) for token in document] for document in documents]
    with tempfile.TemporaryDirectory() as folder:
        write_documents(f"{folder}/a", vocab_size, documents)
        header = read_header(f"{folder}/a")
        tokens = memmap_tokens(f"{folder}/a", header).tolist()
    ends = np.cumsum(header.document_lengths).tolist()
    assert [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)] == documents


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_from_its_tokens(tiny, text):
    ids = tiny.tokenizer.encode(text)
    assert tiny.tokenizer.decode(ids) == text
    assert tiny.tokenizer.eos_id not in ids
