"""Files and records that are not what their format says: each is named, with offset, numbers and what works."""

import json

import pytest

from data_prep.__main__ import main
from data_prep.errors import DataError
from data_prep.indexed import memmap_tokens, read_header
from data_prep.tokenizing.records import Rules, has_visible
from data_prep.tokenizing.tokenize import Settings, tokenize_files

RECORDS = [{"text": f"Document {i} with words."} for i in range(9)]
JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS)


@pytest.fixture
def run(tiny, tmp_path):
    def tokenize(data, name="in.jsonl", **rules):
        (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return tokenize_files([str(tmp_path / name)], tiny.tokenizer, tmp_path / "out", Settings(Rules(**rules)))

    return tokenize


def texts_of(prefix, tokenizer):
    header, start, found = read_header(prefix), 0, []
    for length in header.document_lengths.tolist():
        found.append(tokenizer.decode(memmap_tokens(prefix, header)[start : start + length].tolist()))
        start += length
    return found


@pytest.mark.parametrize("on_bad", ["stop", "skip", "replace"])
@pytest.mark.parametrize("name", ["in.jsonl", "in.txt"])
@pytest.mark.parametrize(
    ("encoding", "mark", "message"),
    [
        ("utf-16-le", b"", r"byte offset 1: \d+ of \d+ bytes are NUL: UTF-16LE.*`iconv -f UTF-16LE"),
        ("utf-16-be", b"", r"byte offset 0: \d+ of \d+ bytes are NUL: UTF-16BE.*`iconv -f UTF-16BE"),
        ("utf-16-le", b"\xff\xfe", "byte offset 0: the byte-order mark of UTF-16LE; `iconv -f UTF-16LE"),
        ("utf-32-le", b"", r"byte offset 1: \d+ of \d+ bytes are NUL: not text in UTF-8"),
    ],
)
def test_text_that_is_not_utf8_is_told_by_its_nuls(run, tmp_path, on_bad, name, encoding, mark, message):
    with pytest.raises(DataError, match=rf"{name}: {message}"):
        run(mark + JSONL.encode(encoding), name, on_bad=on_bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_cyrillic_in_utf16_has_nuls_enough(run):
    with pytest.raises(DataError, match="UTF-16LE"):
        run("Это просто русский текст, в нём есть пробелы.\n".encode("utf-16-le") * 9, "in.txt")


def test_nuls_deep_in_a_file_are_a_bad_record(run, tiny, tmp_path):
    data = JSONL.encode() * 2000 + JSONL.encode("utf-16-le")[: JSONL.index("\n") * 2] + b"\n"
    offset = len(JSONL) * 2000
    with pytest.raises(DataError, match=rf"byte offset {offset}: nul_bytes: \d+ of \d+ bytes are NUL"):
        run(data)
    manifest = run(data, on_bad="replace")
    assert (manifest.bad, manifest.documents) == ({"nul_bytes": 1}, 18000)


def test_a_few_nuls_are_text(run, tiny, tmp_path):
    text = "a\x00b and more than thirty other characters behind it"
    run(text, "in.txt")
    assert texts_of(tmp_path / "out", tiny.tokenizer) == [text]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (json.dumps(RECORDS), r"a JSON array, not JSON lines .*`jq -c '\.\[\]' .*in\.jsonl > NEW\.jsonl`"),
        (json.dumps(RECORDS * 3000), "a JSON array"),
        (json.dumps(RECORDS, indent=1), "a JSON array"),
        ("[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n", "a JSON array"),
        (json.dumps(RECORDS[0], indent=1), r"JSON objects over several lines, not JSON lines .*`jq -c \. "),
        ("".join(json.dumps(record, indent=2) + "\n" for record in RECORDS * 1000), "JSON objects over several"),
        (json.dumps({"text": "long " * 30_000}, indent=2), "JSON objects over several lines"),
        (b"PAR1" + bytes(99) + b"PAR1", "a parquet file; --format parquet reads it"),
    ],
)
def test_json_that_is_not_lines_is_told_apart(run, tmp_path, data, message):
    for on_bad in ("stop", "skip"):
        with pytest.raises(DataError, match=rf"in\.jsonl: byte offset 0: {message}") as caught:
            run(data, on_bad=on_bad)
        assert "--on-bad" not in str(caught.value)


@pytest.mark.parametrize("line", ['["a"]', '{"text": ', "[[[[[", '{"text": "a', "[1, 2", "{", "["])
def test_one_bad_line_before_good_ones_can_still_be_skipped(run, line):
    assert run(f"{line}\n{JSONL}", on_bad="skip").documents == len(RECORDS)


NESTED = "".join(json.dumps({"id": str(i), "data": {"text": f"words {i}", "n": 1}}) + "\n" for i in range(9))


def test_a_nested_key_reads_what_it_spells(run, tiny, tmp_path):
    run(NESTED, text_key="data.text")
    assert texts_of(tmp_path / "out", tiny.tokenizer) == [f"words {i}" for i in range(9)]
    run('{"a.b": "flat", "a": {"b": "deep"}}\n{"a": {"b": "deep"}}\n', text_key="a.b")
    assert texts_of(tmp_path / "out", tiny.tokenizer) == ["flat", "deep"]
    with pytest.raises(DataError, match=r"no text under the key 'data.n'"):
        run(NESTED, text_key="data.n")


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        (NESTED, "none of the first 9 records has a text under 'text'; --text-key data.text works, or another of id"),
        ('{"content": "abc"}\n' * 3, "--text-key content works"),
        ('{"id": 1}\n', "nor under another key; a --hook can make one"),
        ("a,b\n1,2\n", "none of the first 2 lines is a JSON object; --format lines"),
    ],
)
def test_where_nothing_would_be_left_the_advice_is_not_to_skip(run, data, advice):
    for on_bad in ("stop", "skip", "replace"):
        with pytest.raises(DataError) as caught:
            run(data, on_bad=on_bad)
        assert advice in str(caught.value)
        assert "--on-bad" not in str(caught.value)


@pytest.mark.parametrize("command", ["split --heldout 0.5", "tokenizer train"])
def test_other_commands_give_the_same_advice(tmp_path, capsys, command):
    (tmp_path / "in.jsonl").write_text(NESTED)
    for on_bad in ("stop", "skip"):
        more = ["--input", f"{tmp_path}/in.jsonl", "--out", f"{tmp_path}/out", "--on-bad", on_bad]
        assert main([*command.split(), *more]) == 2
        assert "--text-key data.text works" in capsys.readouterr().err


def test_where_something_would_be_left_the_advice_is_to_skip(run):
    with pytest.raises(DataError, match=r"missing_field: .*; --on-bad skip or --on-bad replace goes on"):
        run('{"id": 1}\n' + JSONL)


def test_a_wrong_column_of_a_table_is_named(run, tiny, tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "body": ["one", "two"]}), tmp_path / "in.parquet")
    data = (tmp_path / "in.parquet").read_bytes()
    with pytest.raises(DataError, match=r"row 0: missing_field: .*--text-key body works"):
        run(data, "in.parquet")
    assert run(data, "in.parquet", text_key="body").documents == 2


def test_a_byte_order_mark_in_the_middle_is_left_out(run, tiny, tmp_path):
    part = b"\xef\xbb\xbf" + JSONL.encode()
    assert run(part + part + b"\xef\xbb\xbf\n").documents == 2 * len(RECORDS)
    run(b"one\n\xef\xbb\xbftwo\n", "in.txt", format="lines")
    assert texts_of(tmp_path / "out", tiny.tokenizer) == ["one", "two"]


@pytest.mark.parametrize(
    "text", ["\u200b\u200d", "\ufeff\ufeff", "\u2060 \u00ad\n", "\u3164", "\ufe0f", "\x07", "\u00a0"]
)
def test_what_shows_nothing_is_empty(run, text):
    assert not has_visible(text)
    assert has_visible(text + "a")
    manifest = run(JSONL + json.dumps({"text": text}) + "\n", on_bad="skip")
    assert (manifest.bad, manifest.documents) == ({"empty": 1}, len(RECORDS))


def test_a_key_that_stands_twice_is_a_bad_record(run, tiny, tmp_path):
    line = '{"text": "first", "text": "second"}\n'
    with pytest.raises(DataError, match=r"line 10, byte offset .*: repeated_key: the key 'text' stands twice"):
        run(JSONL + line)
    assert run(JSONL + line, on_bad="skip").documents == len(RECORDS)
    manifest = run(line + JSONL, on_bad="replace")
    assert manifest.bad == {"repeated_key": 1}
    assert texts_of(tmp_path / "out", tiny.tokenizer)[0] == "second"
    assert run('{"text": "same", "text": "same"}\n').documents == 1
    with pytest.raises(DataError, match="repeated_key: the key 'a' stands twice"):
        run('{"text": "t", "meta": {"a": 1, "a": 2}}\n')


def test_bad_records_of_a_new_kind_are_counted_on_the_console(tiny, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(JSONL + '{"text": "a", "text": "b"}\n')
    command = ["tokenize", "--input", f"{tmp_path}/in.jsonl", "--tokenizer", f"{tiny.folder}/tokenizer.model"]
    assert main([*command, "--out", f"{tmp_path}/x", "--on-bad", "skip"]) == 0
    assert "bad        repeated_key 1" in capsys.readouterr().out
