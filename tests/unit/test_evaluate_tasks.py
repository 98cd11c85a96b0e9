"""Tasks of JSON lines: what a line may be, what is scored of it, and what is measured."""

import json
import math

import numpy as np
import pytest
from evaluated import tokenizer_in

from hope.evaluate.errors import EvaluationError
from hope.evaluate.rows import Alone, ListedRows, score_rows
from hope.evaluate.scorer import Scores
from hope.evaluate.tasks import pair_row, read_item, read_task, reduce_pair, result_of, rows_of

LAMBADA = {"context": "the cat sat on the", "continuation": "mat"}
CHOICE = {"query": "Question: what sat?\n", "choices": ["a cat", "dogs"], "gold": 1}
SCHEMA = {"context_options": ["the cat", "the mat"], "continuation": "sat.", "gold": 0, "id": 7}


def lines(*values):
    return [json.dumps(value).encode() + b"\n" for value in values]


def letters(text):
    return [ord(letter) for letter in text]


class Spelled:
    """A token costs its number, and no token is the most likely but those of `best`."""

    def __init__(self, best=""):
        self.best = [ord(letter) for letter in best]

    def __call__(self, tokens_TB, targets_TB, state, keep_state):
        best = sum((targets_TB == token) for token in self.best) > 0 if self.best else targets_TB < 0
        return Scores(targets_TB.double(), best, None)


def measured(task, scorer=None):
    rows = rows_of(task, letters, 1, None)
    values = {}
    for part in score_rows(ListedRows(rows), scorer or Spelled(), reduce_pair, batch_tokens=50, share=Alone()):
        values |= part
    return result_of(task, values)


def test_formats_are_known_by_their_keys():
    for value, kind, pairs in (
        (LAMBADA, "completion", (("the cat sat on the", " mat"),)),
        (CHOICE, "choice", ((CHOICE["query"], "a cat"), (CHOICE["query"], "dogs"))),
        (SCHEMA, "schema", (("the cat", " sat."), ("the mat", " sat."))),
    ):
        found, item = read_item(json.dumps(value).encode())
        assert (found, item.pairs, item.gold) == (kind, pairs, value.get("gold", 0))
    assert item.text_bytes == (4, 4)


def test_one_space_joins_what_no_white_space_does():
    for context, continuation, joined in (("a", "b", " b"), ("a ", "b", "b"), ("a", "\nb", "\nb"), ("", "b", "b")):
        item = read_item(json.dumps({"context": context, "continuation": continuation}).encode())[1]
        assert item.pairs == ((context, joined),)
    given = {"context": "a", "continuation": "b", "delimiter": "\nAnswer: "}
    for whole_task in (None, "!"):
        assert read_item(json.dumps(given).encode(), whole_task)[1].pairs == (("a", "\nAnswer: b"),)
    task = read_task(lines({"context": "a", "continuation": "\nb"}, LAMBADA), "f", delimiter=" ")
    assert [item.pairs[0][1] for item in task.items] == [" \nb", " mat"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not JSON"),
        (b'"\xff"', "not JSON"),
        (b"[]", "expected an object, found list"),
        (b"{}", "keys none are of 0 kinds; need context, continuation; or query"),
        (json.dumps(CHOICE | LAMBADA).encode(), "are of 2 kinds"),
        (json.dumps(CHOICE | {"gold": 2}).encode(), "gold is 2; it is the number of the right one, 0 to 1"),
        (json.dumps(CHOICE | {"gold": True}).encode(), "gold is True"),
        (json.dumps(CHOICE | {"choices": ["one"]}).encode(), "choices needs at least two non-empty strings"),
        (json.dumps(CHOICE | {"choices": ["one", ""]}).encode(), "choices needs at least two non-empty strings"),
        (json.dumps(LAMBADA | {"continuation": ""}).encode(), "continuation is ''; need a non-empty string"),
        (json.dumps(LAMBADA | {"context": 3}).encode(), "context is 3; need a string"),
        (json.dumps(LAMBADA | {"delimiter": 3}).encode(), "delimiter is 3, not a string"),
        (json.dumps(SCHEMA).encode(), "a schema item after completion items"),
    ],
)
def test_a_bad_line_is_named(line, said):
    with pytest.raises(EvaluationError) as caught:
        read_task([*lines(LAMBADA), b"\n", line], "some/file.jsonl")
    assert str(caught.value).startswith("some/file.jsonl:3: ")
    assert said in str(caught.value)


def test_no_items_are_refused_and_a_limit_reads_no_further():
    with pytest.raises(EvaluationError, match=r"f: no items; a line is such as \{"):
        read_task([b"\n"], "f")
    assert len(read_task([*lines(LAMBADA, LAMBADA), b"{"], "f", limit=2).items) == 2


def test_what_counts_is_the_continuation(tmp_path):
    """Its tokens, all of them, after the end-of-document token and the whole context."""
    tokenizer = tokenizer_in(tmp_path)
    for context, continuation in (("the cat", " sat on the mat."), ("", "the"), ("A café", "\nnaïve 猫")):
        ids, first = pair_row(tokenizer.encode, context, continuation, 1)
        assert (ids[0], tokenizer.decode(ids[1:].tolist())) == (1, context + continuation)
        assert tokenizer.decode(ids[1 + first :].tolist()) == continuation
    ids, first = pair_row(tokenizer.encode, "the c", "at sat", 1)  # its pieces cross the border
    assert tokenizer.decode(ids[1 + first :].tolist()).endswith("at sat")
    assert tokenizer.decode(ids[1 : 1 + first].tolist()) in "the c"


def test_a_window_cuts_contexts_from_the_left_and_no_continuation():
    ids, first = pair_row(letters, "abcdefgh", "xyz", 1, 5)
    assert ("".join(map(chr, ids)), first) == ("fghxyz", 2)
    ids, first = pair_row(letters, "abcdefgh", "uvwxyz", 1, 5)
    assert ("".join(map(chr, ids)), first) == ("huvwxyz", 0)
    ids, first = pair_row(letters, "ab", "xyz", 1, 5)
    assert (ids[0], first) == (1, 2)


def test_completions():
    task = read_task(lines(LAMBADA, {"context": "a", "continuation": "\nb"}), "f")
    found = measured(task, Spelled(" mat"))
    nats = [sum(letters(" mat")), sum(letters("\nb"))]
    assert found["accuracy"] == {"value": 0.5, "error": 0.5}
    assert math.log(found["perplexity"]["value"]) == pytest.approx(np.mean(nats))
    assert found["nats_per_token"]["value"] == pytest.approx(sum(nats) / 6)
    assert found["bits_per_byte"]["value"] == pytest.approx(sum(nats) / 5 / math.log(2))  # without the space, with \n
    assert measured(task, Spelled("mat"))["accuracy"]["value"] == 0  # greedy decoding must give all of it


def test_choices_plain_and_per_byte():
    """The shorter choice is the more probable one, the longer one the more probable one per byte."""
    short, long = "zz", "aaaaaaaa"
    for gold, plain, per_byte in ((0, 1.0, 0.0), (1, 0.0, 1.0)):
        task = read_task(lines({"query": "q ", "choices": [short, long], "gold": gold}), "f")
        found = measured(task)
        assert (found["accuracy"]["value"], found["accuracy_per_byte"]["value"]) == (plain, per_byte)
        assert found["chance"] == {"value": 0.5, "error": None}


def test_schemas_compare_contexts_and_not_what_these_cost():
    """The contexts' own tokens do not count: with equal scores of the continuation the first option is chosen."""
    task = read_task(lines(SCHEMA | {"context_options": ["zzz", "a"]}), "f")
    rows = rows_of(task, letters, 1, None)
    assert ["".join(map(chr, row.ids[1 + row.first :])) for row in rows] == [" sat.", " sat."]
    found = measured(task)
    assert (found["kind"], found["accuracy"]["value"]) == ("schema", 1.0)
    assert "accuracy_per_byte" not in found
