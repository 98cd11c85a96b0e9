"""The accounting of tokens and bytes is exact: every one is counted once, with all the context that is promised."""

import itertools
import math

import numpy as np
import pytest
import torch
from evaluated import TEXT, Counting, Uniform, tiny, tokenizer_in

from data_prep.errors import DataError
from data_prep.texts import text_of_file
from hope.evaluate.measures import mean, ratio
from hope.evaluate.record import Record
from hope.evaluate.rows import Alone
from hope.evaluate.run import Engine, evaluate_text
from hope.evaluate.scorer import ModelScorer
from hope.evaluate.texts import Text, Windows, bucket_of

EOS = 99


def numbered(sizes):
    """Segments whose tokens are numbered through from 100."""
    bounds = np.cumsum([0, *sizes])
    return Text(lambda start, stop: np.arange(100 + start, 100 + stop), bounds, EOS, lambda count: 7 * count)


def result(text, scorer, window, stride=None, block=8, limit=None, batch_tokens=64):
    source = Record(None, {}, {}).open("x", {}, limit)
    engine = Engine(scorer, Alone(), batch_tokens)
    return evaluate_text(engine, text, source, window=window, stride=stride, block=block, limit=limit)


@pytest.mark.parametrize("sizes", [[1], [13], [5, 0, 1, 16, 7], [40, 8]])
def test_every_target_counts_once_with_its_context(sizes):
    text = numbered(sizes)
    for window, stride in [(None, None), *((w, s) for w in (1, 2, 5, 8, 50) for s in range(1, w + 1))]:
        windows = Windows(text, window, stride)
        counted = []
        for index in range(len(windows)):
            ids, first = windows[index]
            assert len(ids) == windows.lengths[index] + 1 <= (window or 10**9) + 1
            segment = np.searchsorted(text.bounds, windows.begins[index], side="right") - 1
            begin, target = text.bounds[segment], ids[1:] - 100
            assert np.array_equal(target, np.arange(target[0], target[0] + len(target)))
            assert ids[0] == (EOS if target[0] == begin else target[0] + 99)
            counted += target[first:].tolist()
            if window and stride and first:  # a later window shows all the context that it has room for
                assert first >= window - stride
            assert windows.counted(index) == len(target) - first
            assert windows.positions(index).tolist() == list(range(first, len(target)))
        assert counted == list(range(text.tokens))


def test_a_stride_that_skips_tokens_is_refused():
    for window, stride in ((4, 5), (4, 0)):
        with pytest.raises(ValueError, match=f"stride {stride} is not between 1 and the window of 4"):
            Windows(numbered([9]), window, stride)


def test_the_counted_tokens_of_all_windows_spell_the_file(tmp_path):
    """Bytes too: the text that they spell is the file's, to the byte, whatever windows cut through."""
    tokenizer = tokenizer_in(tmp_path)
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    text = text_of_file(path, tokenizer)
    for window, stride in ((7, 3), (16, 16), (None, None)):
        windows = Windows(text, window, stride)
        rows = [windows[index] for index in range(len(windows))]
        ids = [token for row in rows for token in row.ids[1 + row.first :].tolist()]
        assert tokenizer.decode(ids).encode() == path.read_bytes()
    assert text.bytes_of(text.tokens) == len(path.read_bytes())
    head = tokenizer.encode(TEXT[:30])
    assert text.bytes_of(len(head)) == len(tokenizer.decode(text.read(0, len(head)).tolist()).encode())


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bits_per_byte_of_a_uniform_model_are_those_of_the_tokens(tmp_path, name):
    """log2 of the vocabulary, times tokens, over the bytes of the file; the same for every window."""
    tokenizer = tokenizer_in(tmp_path)
    path = tmp_path / name
    documents = [TEXT, "Ein kürzerer Text\n", "x"] if name.endswith("jsonl") else [TEXT]
    if name.endswith("jsonl"):
        import json

        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    else:
        path.write_text(TEXT)
    tokens = sum(len(tokenizer.encode(document)) for document in documents)
    size = sum(len(document.encode()) for document in documents)
    words = sum(len(document.split()) for document in documents)
    for window, stride in ((9, 4), (32, None), (None, None)):
        found = result(text_of_file(path, tokenizer), Uniform(300), window, stride)
        assert (found["tokens"], found["bytes"]) == (tokens, size)
        assert found["bits_per_byte"]["value"] == pytest.approx(tokens * math.log2(300) / size, rel=1e-12)
        assert found["nats_per_token"]["value"] == pytest.approx(math.log(300), rel=1e-12)
        assert found["perplexity"]["value"] == pytest.approx(300, rel=1e-12)
        assert words <= found["words"] <= words + 2 * len(documents)  # as the harness splits: with empty ends
        assert math.log(found["perplexity_per_word"]["value"]) == pytest.approx(tokens * math.log(300) / found["words"])


@pytest.mark.parametrize("kind", ["hope", "transformer"])
def test_a_pass_with_carried_state_is_one_call(kind):
    """Exactly one call equals any cutting: float64, against the whole text in one forward pass."""
    model, ids = tiny(kind), np.random.default_rng(2).integers(2, 64, 150)
    text = Text(lambda start, stop: ids[start:stop], np.array([0, 150]), 1, lambda count: None)
    row = torch.from_numpy(np.concatenate([[1], ids]))
    nats = -model(row[:-1, None])[0][:, 0].detach().log_softmax(-1).gather(1, row[1:, None])
    scorer = ModelScorer(model, dtype=torch.float64)
    for cut in (7, 64, 1000):
        assert result(text, scorer, None, batch_tokens=cut)["nats"] == pytest.approx(nats.sum().item(), abs=1e-9)
    assert abs(result(text, scorer, 16)["nats"] - nats.sum().item()) > 1e-3  # windows know less


def test_loss_by_position_and_its_buckets():
    assert bucket_of(np.arange(15)).tolist() == [0, 1, 1, 2, 2, 2, 2, *[3] * 8]
    found = result(numbered([20]), Counting(), 8)
    assert [(part["from"], part["to"], part["tokens"]) for part in found["by_position"]] == [
        (0, 0, 3),
        (1, 2, 6),
        (3, 6, 9),
        (7, 14, 2),
    ]
    first = [100, 108, 116]  # targets at position 0 of each window
    assert found["by_position"][0]["nats_per_token"] == pytest.approx(np.mean(first))
    assert sum(part["tokens"] * part["nats_per_token"] for part in found["by_position"]) == pytest.approx(found["nats"])


@pytest.mark.parametrize(("window", "stride"), [(6, None), (8, 3), (None, None)])
def test_tokens_that_repeat_a_bigram_of_their_window_are_apart(window, stride):
    """By hand: for every target that counts, all pairs that its row shows before it; three tokens make many repeats."""
    ids = np.random.default_rng(0).integers(100, 103, 40)
    text = Text(lambda start, stop: ids[start:stop], np.array([0, 25, 40]), EOS, lambda count: None)
    found = result(text, Counting(), window, stride)
    windows, kinds, places = Windows(text, window, stride), {True: [], False: []}, {}
    for index in range(len(windows)):
        row, first = windows[index]
        for place in range(first, len(row) - 1):
            before = {(row[i], row[i + 1]) for i in range(place)}
            again = (row[place], row[place + 1]) in before
            nats = row[place + 1] + place / 1000
            kinds[again].append(nats)
            if again:
                places.setdefault(bucket_of(np.array(place)).item(), []).append(nats)
    assert min(map(len, kinds.values())) > 3
    assert found["repeated_bigrams"] == len(kinds[True])
    for name, again in (("nats_per_repeated_bigram", True), ("nats_per_new_bigram", False)):
        assert found[name]["value"] == pytest.approx(np.mean(kinds[again]))
    split = {int(np.log2(part["from"] + 1)): part["repeated"] for part in found["by_position"]}
    assert {k: part["tokens"] for k, part in split.items() if part["tokens"]} == {k: len(v) for k, v in places.items()}
    for k, part in split.items():
        expected = pytest.approx(np.mean(places[k])) if k in places else None
        assert part["nats_per_token"] == expected


def test_a_text_without_a_repeat_has_none():
    found = result(numbered([20]), Counting(), 8)
    assert found["repeated_bigrams"] == 0
    assert "nats_per_repeated_bigram" not in found
    sums = [sum(100 + i + (i - begin) / 1000 for i in range(begin, min(begin + 8, 20))) for begin in (0, 8, 16)]
    expected = ratio(sums, [8, 8, 4])
    assert found["nats_per_new_bigram"] == {
        "value": pytest.approx(expected.value),
        "error": pytest.approx(expected.error),
    }


def test_a_limit_takes_the_first_windows_and_their_bytes():
    found = result(numbered([20, 5]), Counting(), 8, limit=2)
    assert (found["tokens"], found["bytes"], found["words"], found["rows"]) == (16, 112, None, 2)


def test_errors_are_those_of_independent_windows():
    """Of equal clusters the standard error of the mean; of unequal ones, the spread of repeated draws."""
    values = [1.0, 4.0, 2.0, 2.5]
    assert mean(values).error == pytest.approx(np.std(values, ddof=1) / 2)
    assert ratio([3.0], [2]).error is None
    generator = np.random.default_rng(0)

    def draw():
        counts = generator.integers(1, 9, 60)
        return counts * (2 + generator.normal(0, 0.5, 60)) + generator.normal(0, 1, 60), counts

    drawn = [ratio(sums.tolist(), counts.tolist()) for sums, counts in (draw() for _ in range(400))]
    assert np.mean([one.error for one in drawn]) == pytest.approx(np.std([one.value for one in drawn]), rel=0.1)
    with pytest.raises(ValueError, match="no observations"):
        mean([])


def test_blocks_of_one_long_row_are_clusters():
    """A pass over the whole text has a standard error too, that of its blocks."""
    whole, cut = result(numbered([64]), Counting(), None, block=8), result(numbered([64]), Counting(), 8, block=8)
    assert whole["nats_per_token"]["error"] == pytest.approx(cut["nats_per_token"]["error"], rel=0.05)


def test_bad_files_are_named(tmp_path):
    tokenizer = tokenizer_in(tmp_path)
    for name, content, said in (
        ("a.txt", b"", "a.txt: holds no text"),
        ("b.txt", b"abc\xff", "b.txt: byte offset 3 is not UTF-8"),
        ("c.jsonl", b'{"text": "x"}\n{"txt": 1}\n', "c.jsonl: line 2, byte offset 14: no text under the key 'text'"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=said):
            text_of_file(tmp_path / name, tokenizer)
    with pytest.raises(DataError, match=r"none.txt: no such file"):
        text_of_file(tmp_path / "none.txt", tokenizer)


def test_windows_are_the_same_whoever_asks():
    """A pure function: two objects of one text agree row by row."""
    one, other = Windows(numbered([30, 4]), 8, 5), Windows(numbered([30, 4]), 8, 5)
    pairs = itertools.product(range(len(one)), (one, other))
    assert len({(index, w[index].ids.tobytes()) for index, w in pairs}) == len(one)
