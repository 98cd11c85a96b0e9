import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.errors import DataError
from data_prep.indexed import read_header
from data_prep.inspection.stats import draw, picture, short_number, token_set_table


def test_bars_are_as_high_as_their_counts():
    image = np.asarray(draw({"2^3": 100, "2^5": 50, "2^6": 1}))
    fill = (image == (70, 110, 170)).all(axis=2).sum(axis=0)
    heights = [int(height) for k, height in enumerate(fill) if height and (k == 0 or fill[k - 1] == 0)]
    assert heights == [200, 100, 2]
    assert image.shape[1] == 2 * 24 + 4 * 44  # the empty class 2^4 has its place


def test_counts_and_edges_are_written():
    """The ink above a bar and below the axis changes with the numbers, and only there."""
    one, two = (np.asarray(draw({"2^3": 100, "2^5": count})) for count in (51, 57))
    assert (one.sum(axis=2) < 300).any()
    rows = np.flatnonzero((one != two).any(axis=(1, 2)))
    assert len(rows) > 5
    assert rows.max() < 48 + 200


def test_numbers_are_short():
    assert [short_number(n) for n in (0, 999, 1000, 1563, 19816, 3 * 10**9)] == [
        "0",
        "999",
        "1k",
        "1.56k",
        "19.8k",
        "3G",
    ]
    assert [short_number(2**k, 1024) for k in (9, 10, 17, 20)] == ["512", "1k", "128k", "1M"]


def test_table_and_picture_of_a_set(tiny, tmp_path):
    text = token_set_table(tiny.train_prefix)
    lengths = read_header(tiny.train_prefix).document_lengths
    assert f"documents        {len(lengths):,}" in text
    assert f"length, 100%     {lengths.max():,} tokens" in text
    assert "licence          PSF-2.0" in text
    bars = [line for line in text.splitlines() if line.endswith("#")]
    assert sum(int(line.split()[1].replace(",", "")) for line in bars) == len(lengths)
    picture(tiny.train_prefix, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        image.load()
        assert (image.format, image.height) == ("PNG", 296)


def test_one_picture_for_one_set(tiny, tmp_path, capsys):
    both = [tiny.train_prefix, tiny.heldout_prefix]
    assert main(["stats", *both]) == 0
    assert capsys.readouterr().out.count("bytes per token") == 2
    assert main(["stats", *both, "--png", str(tmp_path / "x.png")]) == 2
    assert main(["stats", both[0], "--png", str(tmp_path / "x.jpg")]) == 2
    assert f"{tmp_path}/x.png works" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"absent\.idx: no such file"):
        token_set_table(tmp_path / "absent")
