"""One's own text in two: what is held out depends on the text alone, and nothing is lost or on both sides."""

import json

import pytest

from data_prep.__main__ import main
from data_prep.errors import DataError
from data_prep.files import sha256_file
from data_prep.tokenizing.records import Rules
from data_prep.tokenizing.split import SIDES, split_files

RECORDS = [{"id": i, "text": f"Document {i} with grüße.", "meta": {"a": [1.5, None]}} for i in range(500)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_every_record_is_on_one_side_with_all_its_fields_in_order(tmp_path):
    manifest = split_files([write(tmp_path / "in.jsonl", RECORDS)], tmp_path / "out", 0.1)
    train, heldout = (read(tmp_path / "out", name) for name in SIDES)
    assert sorted(train + heldout, key=lambda record: record["id"]) == RECORDS
    for side in (train, heldout):
        assert side == sorted(side, key=lambda record: record["id"])
    assert 25 < len(heldout) < 80
    for name, side in zip(SIDES, (train, heldout), strict=True):
        assert manifest["files"][name] == {
            "documents": len(side),
            "bytes": sum(len(record["text"].encode()) for record in side),
            "sha256": sha256_file(tmp_path / "out" / name),
        }


def test_a_text_is_on_the_same_side_in_any_order_beside_any_other_and_however_often(tmp_path):
    first = write(tmp_path / "a.jsonl", RECORDS[:300])
    other = [{"text": record["text"], "id": 1000 + record["id"]} for record in RECORDS[:99:-1] + RECORDS[:50]]
    second = write(tmp_path / "b.jsonl", other)
    split_files([first], tmp_path / "one", 0.1)
    split_files([second, first], tmp_path / "two", 0.1)
    sides = {}
    for out in ("one", "two"):
        for name in SIDES:
            for record in read(tmp_path / out, name):
                assert sides.setdefault(record["text"], name) == name
    assert len(sides) == 500


def test_a_larger_share_only_adds(tmp_path):
    source = write(tmp_path / "in.jsonl", RECORDS)
    held = []
    for share in (0.05, 0.2):
        split_files([source], tmp_path / "out", share)
        held.append({record["id"] for record in read(tmp_path / "out", "heldout.jsonl")})
    assert held[0] < held[1]


@pytest.mark.parametrize("share", [1e-9, 0.999999999])
def test_both_sides_have_a_document(tmp_path, share):
    source = write(tmp_path / "in.jsonl", RECORDS[:40] * 2)
    split_files([source], tmp_path / "out", share)
    counts = sorted(len(read(tmp_path / "out", name)) for name in SIDES)
    assert counts == [2, 78]  # every text stands twice, and stays together


def test_what_cannot_be_split_is_refused_and_leaves_nothing(tmp_path):
    source = write(tmp_path / "in.jsonl", RECORDS[:1] * 5)
    with pytest.raises(DataError, match=r"in\.jsonl: 5 documents with 1 different text cannot be split"):
        split_files([source], tmp_path / "out", 0.1)
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(DataError, match=r"is not a share between 0 and 1; 0\.01 works"):
            split_files([source], tmp_path / "out", share)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(RECORDS[0]) + "\n[1]\n")
    with pytest.raises(DataError, match=r"bad\.jsonl: line 2, byte offset \d+: missing_field"):
        split_files([str(bad)], tmp_path / "out", 0.1)
    assert not list((tmp_path / "out").glob("*"))


def test_other_files_are_not_written_over(tmp_path):
    source = write(tmp_path / "train.jsonl", RECORDS)
    with pytest.raises(DataError, match=r"train\.jsonl: is an input and would be written over"):
        split_files([source], tmp_path, 0.1)
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "heldout.jsonl", RECORDS[:3])
    with pytest.raises(DataError, match=r"heldout\.jsonl: exists, and no split has written it"):
        split_files([source], tmp_path / "out", 0.1)
    (tmp_path / "out" / "heldout.jsonl").unlink()
    first = split_files([source], tmp_path / "out", 0.1)
    assert split_files([source], tmp_path / "out", 0.1) == first
    assert len(read(tmp_path / "train.jsonl".replace("train.jsonl", ""), "train.jsonl")) == 500


def test_text_files_nested_keys_and_mended_records(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"Text {i}\nof two lines")
    split_files([str(tmp_path / f"{i}.txt") for i in range(20)], tmp_path / "texts", 0.3)
    found = [record for name in SIDES for record in read(tmp_path / "texts", name)]
    assert sorted(record["text"] for record in found) == sorted(f"Text {i}\nof two lines" for i in range(20))
    lines = ['{"a": {"text": "half \\ud800", "b": 1}, "other": "\\udc00"}'] + [
        json.dumps({"a": {"text": f"text {i}", "b": i}}) for i in range(9)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "{"]))
    rules = Rules(text_key="a.text", on_bad="replace")
    manifest = split_files([str(tmp_path / "in.jsonl")], tmp_path / "nested", 0.3, rules)
    found = [record for name in SIDES for record in read(tmp_path / "nested", name)]
    assert {"a": {"text": "half \ufffd", "b": 1}, "other": "\udc00"} in found
    assert len(found) == 10
    assert manifest["bad"] == {"bad_json": 1, "surrogate": 1}
    assert len(read(tmp_path / "nested", "split.bad.jsonl")) == 2


def test_the_command_and_the_licence_that_tokenize_takes_from_it(tiny, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", RECORDS)
    out = f"{tmp_path}/out"
    command = ["split", "--input", f"{tmp_path}/in", "--out", out, "--heldout", "0.1", "--licence", "CC0"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "1 files" in said
    assert f"split      {out}/heldout.jsonl: " in said
    tokenize = ["--tokenizer", f"{tiny.folder}/tokenizer.model", "--out", f"{out}/heldout", "--workers", "1"]
    assert main(["tokenize", "--input", f"{out}/heldout.jsonl", *tokenize]) == 0
    assert json.loads((tmp_path / "out/heldout.manifest.json").read_bytes())["licence"] == "CC0"
