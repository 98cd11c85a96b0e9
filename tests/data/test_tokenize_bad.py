"""Every kind of bad input: right counts, right offsets, nothing lost."""

import json

import pytest

from data_prep.errors import DataError
from data_prep.indexed import memmap_tokens, read_header
from data_prep.tokenizing.records import Rules
from data_prep.tokenizing.tokenize import Settings, parse_limit, tokenize_files

LONGEST = 60
GOOD = [f'{{"text": "document number {i} with grüße"}}'.encode() for i in range(12)]
TOO_LONG = "ä word " * 20
BAD = [  # (line, kind, texts under "replace")
    (b'{"text": "unfinished', "bad_json", []),
    (b"[" * 100_000, "bad_json", []),
    (b'{"text": "a\xffb"}', "bad_utf8", ["a\ufffdb"]),
    (b'{"text": "a\xff', "bad_utf8", []),  # bad JSON once its UTF-8 is mended
    (b'["text"]', "missing_field", []),
    (b'{"id": 1}', "missing_field", []),
    (b'{"text": null}', "missing_field", []),
    (rb'{"text": "a\ud800b"}', "surrogate", ["a\ufffdb"]),
    (b'{"text": ""}', "empty", []),
    (rb'{"text": " \n\t "}', "empty", []),
    (json.dumps({"text": TOO_LONG}).encode(), "too_long", None),
]


def corpus(path):
    """Good and bad lines in turn, blank lines between; returns [(offset, kind)] of the bad ones."""
    data, places = b"", []
    for i, good in enumerate(GOOD):
        data += good + b"\n"
        if i < len(BAD):
            data += b"\n" if i % 3 == 0 else b""
            places.append((len(data), BAD[i][1]))
            data += BAD[i][0] + b"\n"
    path.write_bytes(data)
    return places


def texts_of(prefix, tokenizer):
    header, tokens, start, found = read_header(prefix), memmap_tokens(prefix, read_header(prefix)), 0, []
    for length in header.document_lengths.tolist():
        found.append(tokenizer.decode(tokens[start : start + length].tolist()))
        start += length
    return found


def run(tiny, tmp_path, on_bad, **settings):
    rules = Rules(on_bad=on_bad, max_bytes=LONGEST)
    return tokenize_files(
        [str(tmp_path / "in.jsonl")], tiny.tokenizer, tmp_path / "out", Settings(rules, unit_bytes=300, **settings)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_skip_counts_places_and_loses_nothing(tiny, tmp_path, workers):
    places = corpus(tmp_path / "in.jsonl")
    manifest = run(tiny, tmp_path, "skip", workers=workers)
    assert texts_of(tmp_path / "out", tiny.tokenizer) == [json.loads(line)["text"] for line in GOOD]
    assert manifest.bad == {
        "bad_json": 2, "bad_utf8": 2, "missing_field": 3, "surrogate": 1, "empty": 2, "too_long": 1
    }  # fmt: skip
    report = [json.loads(line) for line in (tmp_path / "out.bad.jsonl").read_text().splitlines()]
    assert [(entry["offset"], entry["kind"]) for entry in report] == places
    assert {entry["action"] for entry in report} == {"skipped"}
    data = (tmp_path / "in.jsonl").read_bytes()
    for entry, (line, *_) in zip(report, BAD, strict=True):
        assert data[entry["offset"] :].startswith(line + b"\n")


def test_replace_mends_what_can_be_mended(tiny, tmp_path):
    places = corpus(tmp_path / "in.jsonl")
    manifest = run(tiny, tmp_path, "replace")
    expected = []
    for i, good in enumerate(GOOD):
        expected.append(json.loads(good)["text"])
        if i < len(BAD) and BAD[i][2]:
            expected += BAD[i][2]
    found = texts_of(tmp_path / "out", tiny.tokenizer)
    pieces = [text for text in found if text not in expected]
    assert "".join(pieces) == TOO_LONG
    assert all(len(piece.encode()) <= LONGEST for piece in pieces)
    assert len(pieces) == -(-len(TOO_LONG.encode()) // LONGEST)
    assert [text for text in found if text in expected] == expected
    assert manifest.bad["bad_utf8"] == 2
    assert manifest.bad["bad_json"] == 3  # the record with both faults is counted under both
    report = [json.loads(line) for line in (tmp_path / "out.bad.jsonl").read_text().splitlines()]
    assert [offset for offset, _ in places] == sorted({entry["offset"] for entry in report})
    replaced = [entry["kind"] for entry in report if entry["action"] == "replaced"]
    assert replaced == ["bad_utf8", "bad_utf8", "surrogate", "too_long"]


def test_stop_names_the_first_in_file_order_for_any_number_of_workers(tiny, tmp_path):
    offset, kind = corpus(tmp_path / "in.jsonl")[0]
    for workers in (1, 2):
        with pytest.raises(DataError, match=rf"line 3, byte offset {offset}: {kind}: .*--on-bad skip"):
            run(tiny, tmp_path, "stop", workers=workers)
        assert not (tmp_path / "out.bin").exists()


@pytest.mark.parametrize(("limit", "passes"), [("11", True), ("10", False), ("48%", True), ("47%", False), ("", True)])
def test_above_max_bad_there_is_a_report_and_no_set(tiny, tmp_path, limit, passes):
    corpus(tmp_path / "in.jsonl")  # 11 bad of 23
    if passes:
        assert run(tiny, tmp_path, "skip", max_bad=limit).documents == len(GOOD)
        return
    with pytest.raises(DataError, match=r"11 bad records .*bad_json 2.*--max-bad"):
        run(tiny, tmp_path, "skip", max_bad=limit)
    assert not (tmp_path / "out.bin").exists()
    assert not (tmp_path / "out.manifest.json").exists()
    assert len((tmp_path / "out.bad.jsonl").read_text().splitlines()) == 11


@pytest.mark.parametrize("limit", ["x", "-1", "nan", "1.5", "-2%"])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(DataError, match=r"20, or a share such as 0\.5%"):
        parse_limit(limit)


def test_an_old_report_goes_when_all_is_well(tiny, tmp_path):
    corpus(tmp_path / "in.jsonl")
    run(tiny, tmp_path, "skip")
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(GOOD))
    assert run(tiny, tmp_path, "skip").bad == {}
    assert not (tmp_path / "out.bad.jsonl").exists()


def test_a_byte_order_mark_and_crlf_are_not_bad(tiny, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(GOOD))
    assert run(tiny, tmp_path, "stop").documents == len(GOOD)
