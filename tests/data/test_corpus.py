import json

import pytest

from data_prep.corpora.corpus import (
    Document,
    deduplicate,
    finished_corpus,
    split,
    stdlib_documents,
    topic_documents,
    write_corpus,
)
from data_prep.errors import DataError

PROSE = "A sentence that explains something at length, so that the module is not too short to be kept. " * 3


def module(doc: str, comment: str = "") -> str:
    return f'"""{doc}"""\n\n{comment}\ndef f():\n    """Inner\n        indented\n    words."""\n    return 1\n'


def test_modules_give_docstrings_and_comments_in_source_order(tmp_path):
    comment = "# First line of a comment that\n# explains the next line and\n#   goes on for three lines\n"
    (tmp_path / "a.py").write_text(module(PROSE, comment))
    (document,) = stdlib_documents(tmp_path)
    assert document.id == "stdlib/a.py"
    comment_text = "First line of a comment that\nexplains the next line and\n  goes on for three lines"
    assert document.text == f"{PROSE.strip()}\n\n{comment_text}\n\nInner\n    indented\nwords."


def test_code_tables_and_hashes_in_strings_are_not_comments(tmp_path):
    table = "# 0x00 | 0x01 | 0x02\n# 0x03 | 0x04 | 0x05\n# 0x06 | 0x07 | 0x08\n"
    string = 'x = """\n# not a comment but\n# three lines of text in\n# a string of the module\n"""\n'
    short = "# only two lines of\n# comment in this place\n"
    (tmp_path / "a.py").write_text(f'"""{PROSE}"""\n{table}\ny = 0\n{string}\nz = 0\n{short}')
    (document,) = stdlib_documents(tmp_path)
    assert document.text == PROSE.strip()


def test_short_unparsable_and_third_party_modules_are_left_out(tmp_path):
    (tmp_path / "short.py").write_text('"""Tiny."""\n')
    (tmp_path / "broken.py").write_text(f'"""{PROSE}"""\ndef (:\n')
    (tmp_path / "binary.py").write_bytes(b'"""\xff\xfe' + PROSE.encode() + b'"""\n')
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text(module(PROSE))
    assert list(stdlib_documents(tmp_path)) == []


def test_a_block_repeated_in_another_module_is_kept_once(tmp_path):
    (tmp_path / "a.py").write_text(module(PROSE))
    (tmp_path / "b.py").write_text(module(PROSE.upper()))
    first, second = (document.text for document in stdlib_documents(tmp_path))
    assert "Inner" in first
    assert second == PROSE.upper().strip()


def test_split_is_disjoint_deduplicated_and_independent_of_other_documents():
    documents = [Document(f"d{i}", "s", f"text {i % 150}") for i in range(200)]
    unique = list(deduplicate(documents))
    assert len(unique) == 150
    train, heldout = split(unique, share=0.1)
    assert 1 <= len(heldout) < 40
    assert not {d.text for d in train} & {d.text for d in heldout}
    assert sorted(d.id for d in train + heldout) == sorted(d.id for d in unique)
    _, fewer = split(unique[:100], share=0.1)
    assert {d.id for d in fewer} == {d.id for d in heldout} & {d.id for d in unique[:100]}


def test_at_least_one_document_is_held_out_and_one_is_trained_on():
    documents = [Document(f"d{i}", "s", f"text {i}") for i in range(2)]
    for share in (0.0, 1.0):
        train, heldout = split(documents, share)
        assert (len(train), len(heldout)) == (1, 1)
    with pytest.raises(DataError, match="need at least 2"):
        split(documents[:1])


def test_written_corpus_has_no_text_in_both_files_and_is_deterministic(tmp_path):
    documents = list(topic_documents())
    first = write_corpus(tmp_path / "a", [*documents, *documents])
    second = write_corpus(tmp_path / "b", documents)
    assert first == second
    train, heldout = (
        [json.loads(line) for line in (tmp_path / "a" / name).read_text().splitlines()]
        for name in ("train.jsonl", "heldout.jsonl")
    )
    assert heldout
    assert not {d["text"] for d in train} & {d["text"] for d in heldout}
    assert set(train[0]) == {"id", "source", "text"}
    assert first["files"]["train.jsonl"]["documents"] == len(train)


def test_a_damaged_corpus_is_not_taken_for_finished(tmp_path):
    write_corpus(tmp_path, topic_documents())
    assert finished_corpus(tmp_path) is not None
    with open(tmp_path / "train.jsonl", "ab") as stream:
        stream.write(b"\n")
    assert finished_corpus(tmp_path) is None
