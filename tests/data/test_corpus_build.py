import json

import pytest

from data_prep.corpora.build import CorpusSource, build
from data_prep.corpora.corpus import FILES, Document
from data_prep.errors import DataError


def part(name, texts, recipe=None):
    documents = [Document(f"{name}/{i}", name, text) for i, text in enumerate(texts)]
    return CorpusSource(name, "CC0", recipe or {"version": 1}, lambda: documents)


def texts(prefix, numbers):
    return [f"{prefix}: a text that is long enough, number {i}" for i in numbers]


def read(folder, name):
    return [json.loads(line)["text"] for line in (folder / name).read_text().splitlines()]


def test_repeated_texts_stand_once_and_on_one_side(tmp_path):
    shared = texts("shared", range(100))
    parts = [part("a", shared + shared[:10] + ["short"]), part("b", shared[:50] + texts("b", range(50)))]
    manifest = build(tmp_path, parts, share=0.2, report=lambda line: None)
    assert manifest["sources"]["a"]["repeated"] == 10
    assert manifest["sources"]["a"]["short"] == 1
    assert manifest["sources"]["b"]["repeated"] == 50
    sides = {name: [*read(tmp_path / "a", name), *read(tmp_path / "b", name)] for name in FILES}
    assert not set(sides["train.jsonl"]) & set(sides["heldout.jsonl"])
    everything = sides["train.jsonl"] + sides["heldout.jsonl"]
    assert sorted(everything) == sorted(shared + texts("b", range(50)))
    assert manifest["documents"] == len(everything) == 150


def test_a_text_is_on_the_same_side_in_every_corpus(tmp_path):
    common = texts("common", range(200))
    build(tmp_path / "one", [part("a", common)], share=0.1, report=lambda line: None)
    build(tmp_path / "two", [part("other", texts("x", range(50)) + common)], share=0.1, report=lambda line: None)
    one, two = set(read(tmp_path / "one/a", "heldout.jsonl")), set(read(tmp_path / "two/other", "heldout.jsonl"))
    assert one
    assert one == two & set(common)


def test_every_source_has_a_document_on_each_side(tmp_path):
    for share in (0.0, 0.02, 0.99):
        build(tmp_path, [part("tiny", texts("t", range(2)))], share=share, report=lambda line: None)
        assert [len(read(tmp_path / "tiny", name)) for name in FILES] == [1, 1]
    with pytest.raises(DataError, match="source one: 1 different documents cannot be split"):
        build(tmp_path, [part("one", texts("t", [0, 0]))], report=lambda line: None)


def test_what_is_whole_is_kept_and_what_changed_is_made_again(tmp_path):
    lines = []
    first = [part("a", texts("a", range(9))), part("b", texts("b", range(9)))]
    made = build(tmp_path, first, report=lines.append)
    assert made["bytes"] == sum(len(text) for name in "ab" for file in FILES for text in read(tmp_path / name, file))
    assert build(tmp_path, first, report=lines.append) == made
    assert [" kept " in line for line in lines] == [False, False, False, True, True, False]
    (tmp_path / "a" / "heldout.jsonl").write_text("")
    lines.clear()
    build(tmp_path, [first[0], part("b", texts("b", range(8)), {"version": 2})], report=lines.append)
    assert [" kept " in line for line in lines] == [False, False, False]


def test_a_kept_source_still_counts_for_what_is_repeated(tmp_path):
    build(tmp_path, [part("a", texts("a", range(9)))], report=lambda line: None)
    both = [part("a", texts("a", range(9))), part("b", texts("a", range(9)) + texts("b", range(9)))]
    assert build(tmp_path, both, report=lambda line: None)["sources"]["b"]["repeated"] == 9
