"""Every input format, worker count and unit size gives the same tokens; hooks and repeated documents."""

import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_prep.errors import DataError
from data_prep.hooks import load_hook, near
from data_prep.indexed import memmap_tokens, read_header
from data_prep.tokenizing.progress import line
from data_prep.tokenizing.records import Rules
from data_prep.tokenizing.tokenize import Settings, tokenize_files
from data_prep.tokenizing.units import format_of, plan

TEXTS = [f"Document {i}: grüße and {'many ' * (i % 9)}words." for i in range(200)]
HOOKS = """
def keep_even(doc):
    return {"text": doc["body"].upper()} if doc["number"] % 2 == 0 else None

def fails(doc):
    raise KeyError("no such thing")

def wrong(doc):
    return "text"

def keys(doc):
    return {**doc, "dedup_keys": [doc["text"][:10]]}

def bad_keys(doc):
    return {**doc, "dedup_keys": 5}

answer = 42
"""


@pytest.fixture
def run(tiny, tmp_path):
    def tokenize(names, out="out", workers=1, unit_bytes=1000, **rules):
        sources = [str(tmp_path / name) for name in ([names] if isinstance(names, str) else names)]
        settings = Settings(Rules(**rules), workers, unit_bytes)
        return tokenize_files(sources, tiny.tokenizer, tmp_path / out, settings)

    return tokenize


@pytest.fixture
def jsonl(tmp_path):
    data = "".join(json.dumps({"text": text, "body": text, "number": i}) + "\n" for i, text in enumerate(TEXTS))
    (tmp_path / "in.jsonl").write_text(data)
    return data.encode()


@pytest.fixture
def hooks(tmp_path, monkeypatch):
    (tmp_path / "my_hooks.py").write_text(HOOKS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_hooks", None)


def texts_of(prefix, tokenizer):
    header, tokens, start, found = read_header(prefix), memmap_tokens(prefix, read_header(prefix)), 0, []
    for length in header.document_lengths.tolist():
        found.append(tokenizer.decode(tokens[start : start + length].tolist()))
        start += length
    return found


def test_units_cover_the_file_and_end_at_newlines(tmp_path, jsonl):
    for size in (1, 57, 1000, 10**9):
        units = plan([str(tmp_path / "in.jsonl")], "auto", size)
        pieces = [jsonl[unit.start : unit.stop] for unit in units]
        assert b"".join(pieces) == jsonl
        assert all(piece.endswith(b"\n") for piece in pieces)
        assert all(piece.count(b"\n") == 1 for piece in pieces) or size > 1
    (tmp_path / "no_end.jsonl").write_bytes(jsonl[:-1])
    units = plan([str(tmp_path / "no_end.jsonl")], "auto", 500)
    assert b"".join(jsonl[:-1][unit.start : unit.stop] for unit in units) == jsonl[:-1]


@pytest.mark.parametrize(("workers", "unit_bytes"), [(1, 10**9), (1, 57), (2, 1000), (3, 5000)])
def test_workers_and_units_do_not_change_a_byte(run, tiny, tmp_path, jsonl, workers, unit_bytes):
    expected = run("in.jsonl", "expected", 1, 2000)
    assert run("in.jsonl", "out", workers, unit_bytes) == expected
    for suffix in ("bin", "idx", "manifest.json"):
        assert (tmp_path / f"out.{suffix}").read_bytes() == (tmp_path / f"expected.{suffix}").read_bytes()
    assert texts_of(tmp_path / "out", tiny.tokenizer) == TEXTS


def test_gzip_text_and_lines(run, tiny, tmp_path, jsonl):
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(jsonl[:5000]) + gzip.compress(jsonl[5000:]))
    assert run("in.jsonl.gz").sha256_bin == run("in.jsonl", "plain").sha256_bin
    (tmp_path / "a.txt").write_text("One text\nof two lines.\n")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"# Another"))
    run(["a.txt", "b.md.gz"])
    assert texts_of(tmp_path / "out", tiny.tokenizer) == ["One text\nof two lines.\n", "# Another"]
    run(["a.txt"], format="lines", unit_bytes=3)
    assert texts_of(tmp_path / "out", tiny.tokenizer) == ["One text", "of two lines."]
    assert [format_of(name) for name in ("x.parquet", "x.jsonl.zst", "x.txt.zst", "x")] == [
        "parquet", "jsonl", "text", "jsonl"
    ]  # fmt: skip


@pytest.mark.parametrize("cut", [-1, -9, 1000])
def test_truncated_gzip_is_an_error_not_an_end(run, tmp_path, jsonl, cut):
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(jsonl)[:cut])
    with pytest.raises(DataError, match=r"in\.jsonl\.gz: damaged or truncated"):
        run("in.jsonl.gz")


@pytest.mark.parametrize(("name", "package"), [("in.jsonl.zst", "zstandard"), ("in.parquet", "pyarrow")])
def test_a_missing_package_is_named(run, tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(DataError, match=rf"{name}: .*pip install {package}"):
        run(name)


def test_zstandard_with_several_frames_and_truncated(run, tmp_path, jsonl):
    pack = zstandard.ZstdCompressor().compress
    data = pack(jsonl[:5000]) + pack(jsonl[5000:])
    (tmp_path / "in.jsonl.zst").write_bytes(data)
    assert run("in.jsonl.zst").sha256_bin == run("in.jsonl", "plain").sha256_bin
    for broken in (data[:-3], data[:-3] + b"xyz", b"no zstandard"):
        (tmp_path / "in.jsonl.zst").write_bytes(broken)
        with pytest.raises(DataError, match="damaged or truncated"):
            run("in.jsonl.zst")


def test_parquet_rows(run, tmp_path, jsonl):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "in.parquet", row_group_size=64)
    assert run("in.parquet", workers=2).sha256_bin == run("in.jsonl", "plain").sha256_bin
    table = pyarrow.table({"text": [*TEXTS[:70], None, *TEXTS[70:]]})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=64)
    with pytest.raises(DataError, match=r"in\.parquet: row 70: missing_field"):
        run("in.parquet")
    assert run("in.parquet", on_bad="skip").documents == len(TEXTS)
    (tmp_path / "in.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match="not a readable parquet file"):
        run("in.parquet")


def test_a_hook_changes_and_leaves_out_documents(run, tiny, tmp_path, jsonl, hooks):
    manifest = run("in.jsonl", workers=2, hook="my_hooks:keep_even")
    assert texts_of(tmp_path / "out", tiny.tokenizer) == [text.upper() for text in TEXTS[::2]]
    assert manifest.dropped == {"hook": 100, "repeated": 0}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_hooks", "need module:function"),
        ("my_hooks:absent", "has no attribute 'absent'"),
        ("no_such_module:f", "No module named"),
        ("my_hooks:answer", "int is not a function"),
        ("my_hooks:fails", r"in\.jsonl: line 1, byte offset 0: hook my_hooks:fails raised KeyError"),
        ("my_hooks:wrong", "byte offset 0: hook my_hooks:wrong returned str; dict or None works"),
        ("my_hooks:bad_keys", "dedup_keys must be a string or a list of strings"),
    ],
)
def test_a_hook_that_cannot_work_is_named(run, jsonl, hooks, spec, message):
    with pytest.raises(DataError, match=message):
        run("in.jsonl", hook=spec, on_bad="skip")


@pytest.mark.parametrize("workers", [1, 2])
def test_repeated_documents_are_kept_once_in_input_order(run, tiny, tmp_path, jsonl, hooks, workers):
    (tmp_path / "again.jsonl").write_bytes(jsonl + b'{"text": "new"}\n')
    manifest = run(["in.jsonl", "again.jsonl"], workers=workers, dedup="exact")
    assert texts_of(tmp_path / "out", tiny.tokenizer) == [*TEXTS, "new"]
    assert manifest.dropped["repeated"] == len(TEXTS)
    assert manifest.text_bytes == sum(len(text.encode()) for text in [*TEXTS, "new"])
    by_prefix = run("in.jsonl", workers=workers, hook="my_hooks:keys")
    assert by_prefix.documents == len({text[:10] for text in TEXTS})


def test_pieces_of_a_long_document_do_not_repeat_each_other(run, tmp_path):
    lines = [json.dumps({"text": "abcd" * 30})] * 2
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    manifest = run("in.jsonl", max_bytes=40, on_bad="replace", dedup="exact")
    assert (manifest.documents, manifest.dropped["repeated"]) == (3, 3)


def test_near_duplicates_share_a_key():
    words = [f"word{i * i % 977}" for i in range(300)]
    text, changed = " ".join(words), " ".join([*words[:150], "other", *words[151:]])
    different = " ".join(reversed(words))
    keys = [set(near({"text": value})["dedup_keys"]) for value in (text, changed, different)]
    assert keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert load_hook("data_prep.hooks:near") is near
    assert near({"other": 1}) == {"other": 1}


def test_an_input_named_twice_or_an_impossible_limit_is_refused(run, jsonl):
    with pytest.raises(DataError, match="named twice"):
        run(["in.jsonl", "in.jsonl"])
    with pytest.raises(DataError, match="4 to 1073741824 works"):
        run("in.jsonl", max_bytes=1 << 31)


def test_licences_and_sources_are_recorded(run, tmp_path, jsonl):
    (tmp_path / "manifest.json").write_text(json.dumps({"licence": "CC0", "files": {"in.jsonl": {}}}))
    (tmp_path / "b.txt").write_text("text")
    manifest = run(["in.jsonl", "b.txt"])
    assert manifest.licence == "CC0"
    assert [source["licence"] for source in manifest.sources] == ["CC0", ""]
    assert manifest.sources[0]["bytes"] == len(jsonl)


def test_progress_line():
    shown = line(done=25_000_000, documents=1000, seconds=10.0, total=100_000_000)
    assert " ".join(shown.split()) == "tokenize 25.0% 1,000 documents 100 documents/s 2.50 MB/s eta 0m30"
