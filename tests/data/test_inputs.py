"""What `--input` may name: folders, and files in any compression under any name."""

import bz2
import gzip
import json
import lzma

import pytest
import zstandard

from data_prep.__main__ import main
from data_prep.compressed import open_bytes
from data_prep.errors import DataError
from data_prep.tokenizing.inputs import input_files

LINES = b"".join(json.dumps({"text": f"Document {i} with grüße."}).encode() + b"\n" for i in range(300))
PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("pack", PACK.values(), ids=PACK)
@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.GZ", "in.jsonl.bz2", "in.jsonl.zst"])
def test_the_first_bytes_decide_how_a_file_is_unpacked(tiny, tmp_path, pack, name):
    (tmp_path / name).write_bytes(pack(LINES[:5000]) + pack(LINES[5000:]))
    (tmp_path / "plain.jsonl").write_bytes(LINES)
    for source, out in ((name, "packed"), ("plain.jsonl", "plain")):
        command = ["tokenize", "--input", f"{tmp_path}/{source}", "--tokenizer", f"{tiny.folder}/tokenizer.model"]
        assert main([*command, "--out", f"{tmp_path}/{out}", "--workers", "1"]) == 0
    assert (tmp_path / "packed.bin").read_bytes() == (tmp_path / "plain.bin").read_bytes()


@pytest.mark.parametrize("suffix", PACK)
def test_a_cut_or_a_broken_second_stream_is_an_error_not_an_end(tmp_path, suffix):
    path, whole = tmp_path / f"in{suffix}", PACK[suffix](LINES)
    for data in (whole[:-1], whole[: len(whole) // 2], whole + b"rubbish", whole + whole[:9], b"plain", b""):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"in\{suffix}: damaged or truncated"), open_bytes(path) as stream:
            stream.read()
    path.write_bytes(whole + whole)
    with open_bytes(path) as stream:
        assert stream.read() == LINES * 2


def test_padding_and_frames_without_content_are_passed_over(tmp_path):
    for data in (PACK[".gz"](LINES) + bytes(512), b"\x50\x2a\x4d\x18\x04\0\0\0four" + PACK[".zst"](LINES)):
        (tmp_path / "in").write_bytes(data)
        with open_bytes(tmp_path / "in") as stream:
            assert stream.read() == LINES


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jsonl", "a/z.TXT", "a/c.md.gz", "a/b.json", "d.parquet", "notes.pdf", "a/x.py", ".hidden.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    for name in ("manifest.json", "x.manifest.json", "x.bad.jsonl", "x.work/k.json", ".git/a.txt"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    return tmp_path / "in"


def test_a_folder_is_its_files_in_order_and_says_what_it_passes_over(folder):
    said = []
    found = input_files([str(folder), "more.jsonl"], said.append)
    names = ["a/b.json", "a/c.md.gz", "a/z.TXT", "b.jsonl", "d.parquet"]
    assert found == [*(f"{folder}/{name}" for name in names), "more.jsonl"]
    (line,) = said
    assert f"{folder}: 5 files, {folder}/a/b.json to {folder}/d.parquet; passed over 5 files" in line
    assert ".pdf 1" in line


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.pdf"], r"a folder without files that end in \.jsonl.*passed over 1 files \(\.pdf 1\)"),
        (["a.jsonl", "a.jsonl.gz"], r"a\.jsonl and .*a\.jsonl\.gz: one text twice"),
        (["x/train.jsonl", "x/heldout.jsonl"], r"training and held-out text .*which must stay apart"),
    ],
)
def test_a_folder_that_would_be_read_wrongly_is_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=message):
        input_files([str(tmp_path)], lambda line: None)


def test_a_file_named_twice_under_two_names_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(LINES)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.jsonl")
    names = [f"{tmp_path}/in.jsonl", f"{tmp_path}/link.jsonl"]
    for command in (["split"], ["tokenize", "--tokenizer", f"{tiny.folder}/tokenizer.model"]):
        assert main([*command, "--input", *names, "--out", f"{tmp_path}/out"]) == 2
        assert f"link.jsonl: named twice (also as {tmp_path}/in.jsonl)" in capsys.readouterr().err


def test_commands_take_folders(tiny, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / "in" / name).write_bytes((tiny.folder / "train.jsonl").read_bytes())
    assert main(["tokenizer", "train", "--input", f"{tmp_path}/in", "--vocab", "360", "--out", f"{tmp_path}/t"]) == 0
    command = ["tokenize", "--input", f"{tmp_path}/in", "--tokenizer", f"{tmp_path}/t", "--out", f"{tmp_path}/x"]
    for _ in range(2):
        assert main(command) == 0
        assert "2 files" in capsys.readouterr().out
    sources = json.loads((tmp_path / "x.manifest.json").read_bytes())["sources"]
    assert [source["name"] for source in sources] == [f"{tmp_path}/in/a.jsonl", f"{tmp_path}/in/b.jsonl"]
