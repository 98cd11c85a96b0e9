"""Probes are what their definitions say: every generator against a checker that knows only the definition."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hope.evaluate.errors import EvaluationError
from hope.evaluate.probes.base import IGNORE
from hope.evaluate.probes.haystack import sentences_of
from hope.evaluate.probes.needles import NEEDLES, facts, needle
from hope.evaluate.probes.protocols import PROTOCOLS
from hope.evaluate.probes.recall import Mqar, Palindrome, SelectiveCopy
from hope.evaluate.probes.state import ModularArithmetic, Word, product_table

HAY = sentences_of("It rained. " + " ".join(f"Sentence {n} says {n * n}." for n in range(40)), "hay")
words = lambda text: len(text.split())
places = st.integers(0, 2**40)


def every_probe():
    for name, protocol in PROTOCOLS.items():
        for probe in (*(probe for probe, _ in protocol.train), *protocol.test.values()):
            yield pytest.param(probe, id=f"{name}-{probe.length}-{getattr(probe, 'pairs', '')}")


@pytest.mark.parametrize("probe", every_probe())
def test_examples_depend_on_seed_and_index_alone(probe):
    first, again = probe.example(3, 5), probe.example(3, 5)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (probe.example(3, 6), probe.example(4, 5)):
        assert not np.array_equal(first.tokens, other.tokens)
    assert first.tokens.shape == first.targets.shape == (probe.length,)
    assert first.tokens.min() >= 0
    assert max(first.tokens.max(), first.targets.max()) < probe.vocab_size
    assert (first.targets != IGNORE).any()


@settings(max_examples=60)
@given(places, st.sampled_from([(16, 4), (64, 16), (32, 1), (40, 7)]))
def test_mqar_answers_are_the_values_of_the_keys(index, size):
    """Whoever reads the pairs into a table can answer all that is asked, and each key is asked once."""
    length, pairs = size
    tokens, targets = Mqar(length, pairs, vocab_size=64).example(1, index)
    table = {int(tokens[n]): int(tokens[n + 1]) for n in range(0, 2 * pairs, 2)}
    assert len(table) == len(set(table.values())) == pairs
    assert all(1 <= key < 32 <= value < 64 for key, value in table.items())
    asked = np.flatnonzero(targets != IGNORE)
    assert len(asked) == pairs
    assert min(asked) >= 2 * pairs
    assert {int(tokens[n]): int(targets[n]) for n in asked} == table


def test_mqar_gaps_follow_the_power_law():
    """Short gaps are the likely ones: p(gap g) is proportional to g^-0.99."""
    counts = np.zeros(30)
    for index in range(4000):
        targets = Mqar(64, 2, vocab_size=64).example(0, index).targets
        counts[(np.flatnonzero(targets != IGNORE) - 4) // 2] += 1
    wanted = np.arange(1, 31) ** -0.99
    assert counts[0] / counts[4:8].mean() > 3  # drawn without replacement: flatter than the law itself
    assert np.corrcoef(counts, wanted)[0, 1] > 0.97
    with pytest.raises(ValueError, match="5 pairs in 16 tokens of 64; need an even length of at least 20"):
        Mqar(16, 5, vocab_size=64)


@given(places)
def test_selective_copies_are_what_is_no_noise_in_order(index):
    probe = SelectiveCopy(length=40, copied=6, vocab_size=9)
    tokens, targets = probe.example(2, index)
    assert [t for t in tokens[:34] if t] == targets[34:].tolist()
    assert (tokens[34:] == 1).all()
    assert 1 not in tokens[:34]
    assert (targets[:34] == IGNORE).all()


@given(places, st.integers(1, 20))
def test_palindromes_read_backwards(index, half):
    tokens, targets = Palindrome(length=2 * half, vocab_size=7).example(2, index)
    said = targets[targets != IGNORE]
    assert tokens[:half].tolist() == said[::-1].tolist()
    assert tokens[half] == 0
    assert tokens[half + 1 :].tolist() == said[:-1].tolist()  # what was said is read next


@pytest.mark.parametrize(("group", "size"), [("Z2", 2), ("S3", 6), ("S4", 24), ("S5", 120)])
def test_words_are_products_of_permutations(group, size):
    """The product acts on points as its factors do, the last one first; parity counts ones."""
    table = product_table(group)
    assert table.shape == (size, size)
    assert all(len(set(row)) == size for row in (*table, *table.T))
    tokens, targets = Word(length=30, group=group).example(1, 1)
    if group == "Z2":
        assert targets.tolist() == [int(sum(tokens[: n + 1])) % 2 for n in range(30)]
        return
    elements = list(itertools.permutations(range(int(group[1]))))
    for end in range(30):
        for point in range(int(group[1])):
            moved = point
            for token in reversed(tokens[: end + 1]):
                moved = elements[token][moved]
            assert elements[targets[end]][point] == moved


@given(places, st.integers(1, 20))
def test_modular_expressions_have_the_value_that_python_gives(index, terms):
    tokens, targets = ModularArithmetic(length=2 * terms).example(1, index)
    text = "".join("01234+-*="[token] for token in tokens)
    assert text[-1] == "="
    assert targets[-1] == eval(text[:-1]) % 5
    assert (targets[:-1] == IGNORE).all()


@pytest.mark.parametrize("kind", NEEDLES)
def test_needles_are_in_the_text_and_answer_the_question(kind):
    """Read with a pattern: key -> values; the question names keys; the answer lists their values in order."""
    seen = set()
    for index in range(25):
        item = needle(kind, 400, 7, index, HAY, words)
        assert item == needle(kind, 400, 7, index, HAY, words)
        ((context, answer),) = item.pairs
        assert 370 < words(context + answer) <= 400
        found = re.findall(r"One of the special magic (?:numbers|uuids) for ([a-z-]+) is: ([0-9a-f-]+)\.", context)
        assert len(found) == (1 if kind.startswith("single") else 4)
        assert len({key for key, _ in found}) == (4 if kind in ("multikey", "multiquery") else 1)
        keys = re.findall(r"[a-z]+-[a-z]+", re.search(r"\nWhat .* for (.*) mentioned in .*\?", context)[1])
        assert len(keys) == (4 if kind == "multiquery" else 1)
        values = [value for key, value in found if key in keys]
        assert re.findall(r"[0-9a-f]+(?:-[0-9a-f]+)*", answer.replace(" and ", " ")) == values
        assert all(re.fullmatch(r"[1-9]\d{6}" if kind != "single_3" else r"[0-9a-f-]{36}", value) for value in values)
        assert ("The grass is green." in context) == (kind == "single_1")
        assert context.endswith(" is" if len(values) == 1 else " are")
        seen.add(context.index(found[0][1]) * 10 // len(context))
    assert len(seen) > 4  # all over the text


def test_facts_are_told_in_order_and_the_last_one_counts():
    for index in range(40):
        item = facts(300, 7, index, HAY, words)
        context = item.pairs[0][0]
        assert 275 < words(context) <= 300
        moves = re.findall(r"(\w+) (?:went|moved|journeyed|travelled) to the (\w+)\.", context)
        assert len(moves) == 8
        asked = re.search(r"Where is (\w+)\?", context)[1]
        assert item.pairs[item.gold][1].strip() == dict(moves)[asked]  # later entries replace earlier ones
        assert len({pair[1] for pair in item.pairs}) == 6


def test_a_length_without_room_is_refused():
    with pytest.raises(EvaluationError, match=r"a length of \d+ tokens has no room for what is hidden; \d+ or more"):
        needle("single_2", 20, 1, 1, HAY, words)
    with pytest.raises(EvaluationError, match="f: no sentences"):
        sentences_of(" \n", "f")
