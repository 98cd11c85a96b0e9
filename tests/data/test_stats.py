import struct
import zlib

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.errors import DataError
from data_prep.indexed import read_header
from data_prep.stats import draw, picture, png, short_number, table


def decode(data):
    """An independent reader of unfiltered 8-bit RGB PNG that checks every chunk's sum."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, {}
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        place += 12 + length
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 2, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_png_round_trip():
    image = np.random.default_rng(0).integers(0, 256, (13, 7, 3), dtype=np.uint8)
    assert np.array_equal(decode(png(image)), image)


def test_bars_are_as_high_as_their_counts():
    image = draw({"2^3": 100, "2^5": 50, "2^6": 1})
    fill = (image == (70, 110, 170)).all(axis=2).sum(axis=0)
    heights = [int(height) for k, height in enumerate(fill) if height and (k == 0 or fill[k - 1] == 0)]
    assert heights == [200, 100, 2]
    assert image.shape[1] == 2 * 24 + 4 * 44  # the empty class 2^4 has its place


def test_numbers_fit_over_a_bar():
    assert [short_number(n) for n in (0, 999, 1024, 16384, 1 << 20, 3 * 10**9)] == ["0", "999", "1k", "16k", "1M", "3G"]


def test_table_and_picture_of_a_set(tiny, tmp_path):
    text = table(tiny.train_prefix)
    lengths = read_header(tiny.train_prefix).document_lengths
    assert f"documents        {len(lengths):,}" in text
    assert f"length, 100%     {lengths.max():,} tokens" in text
    assert "licence          PSF-2.0" in text
    bars = [line for line in text.splitlines() if line.endswith("#")]
    assert sum(int(line.split()[1].replace(",", "")) for line in bars) == len(lengths)
    picture(tiny.train_prefix, tmp_path / "x.png")
    assert decode((tmp_path / "x.png").read_bytes()).shape[0] == 248


def test_one_picture_for_one_set(tiny, tmp_path, capsys):
    both = [tiny.train_prefix, tiny.heldout_prefix]
    assert main(["stats", *both]) == 0
    assert capsys.readouterr().out.count("bytes per token") == 2
    assert main(["stats", *both, "--png", str(tmp_path / "x.png")]) == 2
    with pytest.raises(DataError, match=r"absent\.idx: no such file"):
        table(tmp_path / "absent")
