"""`python -m hope.train.plot`: curves of runs as SVG and PNG, and what has none."""

import io
import itertools
import json
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from hope.train.plot.__main__ import main
from hope.train.plot.curves import NoCurve, read_run, smoothed
from hope.train.plot.matrix import read_matrix
from hope.train.plot.picture import Axis, rounded


def run(folder, losses, every=5):
    folder.mkdir(parents=True)
    lines = [{"step": 0, "tokens": 0, "loss": None, "heldout_loss": losses[0]}]
    for step, loss in enumerate(losses, 1):
        more = {"heldout_loss": loss + 0.1, "heldout_loss.code": 1.0} if step % every == 0 else {}
        lines.append({"step": step, "tokens": 1000 * step, "loss": loss, **more})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 99, "lo')
    return folder


def test_runs_are_compared_in_an_svg_and_a_png(tmp_path, capsys):
    one = run(tmp_path / "one", [4 - 0.1 * n for n in range(20)])
    two = run(tmp_path / "two", [4 - 0.05 * n for n in range(20)])
    assert main([str(one), f"slow & <sure>={two}", "--out", str(tmp_path / "curves"), "--smooth", "3"]) == 0
    said = capsys.readouterr().out
    assert "one  step 20  loss 2.2000" in said
    assert "heldout_loss 2.2000, best 2.2000 at step 20" in said
    root = ElementTree.fromstring((tmp_path / "curves.svg").read_text())
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"one  loss", "slow & <sure>  loss", "one  heldout_loss 2.2000", "step"} <= set(words)
    dots = [element for element in root.iter() if element.tag.endswith("circle")]
    assert len(dots) == 2 * 5  # at step 0 and every fifth
    image = Image.open(io.BytesIO((tmp_path / "curves.png").read_bytes())).convert("RGB")
    assert image.size == (1720, 960)
    colours = {colour for _, colour in image.getcolors(1 << 22)}
    assert {(31, 111, 235), (209, 36, 47)} <= colours  # both runs' lines were painted


def test_a_lower_loss_is_lower_in_the_picture_and_nothing_leaves_the_frame(tmp_path):
    path = run(tmp_path / "one", [4 - 0.1 * n for n in range(20)] + [90.0])  # a spike
    assert main([str(path), "--out", str(tmp_path / "a.svg"), "--smooth", "1", "--x", "tokens", "--from", "2000"]) == 0
    assert not (tmp_path / "a.png").exists()
    line = re.search(r'points="([^"]*)"[^>]*stroke-width="1.8"', (tmp_path / "a.svg").read_text())
    points = [tuple(map(float, pair.split(","))) for pair in line[1].split()]
    assert len(points) == 20  # from token 2000 on
    assert points == sorted(points)
    assert all(before[1] < after[1] for before, after in itertools.pairwise(points[:-1]))
    assert all(64 <= x <= 650 and 40 <= y <= 430 for x, y in points)


def test_smoothing_is_a_mean_without_bias():
    assert smoothed([(0, 3.0), (1, 3.0)], 7) == [(0, 3.0), (1, 3.0)]
    values = smoothed([(0, 1.0), (1, 2.0)], 3)  # keeps a half: (0.5 * 1 + 2) / 1.5
    assert values == [(0, 1.0), (1, pytest.approx(2.5 / 1.5))]
    assert smoothed([(0, 1.0), (1, 5.0)], 1) == [(0, 1.0), (1, 5.0)]


def test_marks_are_round_and_inside():
    assert rounded(0, 20) == [0, 5, 10, 15, 20]
    for low, high in ((2.31, 2.37), (0, 1e9), (-3.0, 0.1)):
        marks = Axis(low, high, 0, 100).marks()
        assert 3 <= len(marks) <= 10
        assert all(low <= mark <= high + 1e-9 for mark in marks)
    assert Axis(3, 700, 0, 1, logarithmic=True).marks() == [5, 10, 20, 50, 100, 200, 500]


def test_what_has_no_curve_is_said(tmp_path, capsys):
    path = run(tmp_path / "one", [1.0, 2.0, 3.0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metrics.jsonl").write_text("")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/metrics.jsonl").write_text("x\n{}\n")
    for word, said in (
        ("nowhere", "nowhere: no such file"),
        ("empty", "no line has step and a loss yet"),
        ("bad", "line 1 is no JSON"),
    ):
        assert main([str(tmp_path / word), "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    assert main([str(path), "--from", "50", "--out", str(tmp_path / "out")]) == 2
    assert "one ends at 3, before 50" in capsys.readouterr().err
    assert main([str(path), "--log-x", "--key", "heldout_loss.code", "--out", str(tmp_path / "log")]) == 0
    assert read_run(path, only=["heldout_loss.code"]).heldout == {}
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("ends", [(1e308, -1e308), (1e308, 1e308 * (1 - 1e-15))])
def test_numbers_that_no_axis_holds_are_refused(tmp_path, capsys, ends):
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(ends)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    assert main([str(tmp_path), "--smooth", "1", "--out", str(tmp_path / "out.svg")]) == 2
    assert "cannot be told apart on an axis" in capsys.readouterr().err
    assert not (tmp_path / "out.svg").exists()


def test_marks_of_a_logarithmic_axis_end_where_floats_do():
    axis = Axis(5e-324, 1.7e308, 0, 100, logarithmic=True)
    assert max(axis.marks()) == 1e308
    assert 0 <= axis.at(1.0) <= 100
    with pytest.raises(ValueError, match="no logarithmic axis"):
        Axis(0.0, 1.0, 0, 100, logarithmic=True)


@pytest.mark.parametrize("phase", [10**30, -1, 3, [], {}, None, 0.5])
def test_a_line_of_no_phase_is_no_border(tmp_path, phase):
    losses = {"continual.loss.a": 2.0, "continual.loss.b": 3.0}
    lines = [{"phase": 0, **losses}, {"phase": phase, **losses}, {"phase": 1, **losses, "continual.loss.a": 1e400}]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), ""]))
    assert [found for found, _ in read_matrix(tmp_path).rows] == [0]


def test_borders_of_other_sources_are_no_matrix(tmp_path):
    lines = [{"phase": 0, "continual.loss.a": 2.0}, {"phase": 1, "continual.loss.b": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), ""]))
    with pytest.raises(NoCurve, match="phase 0 has losses of a, phase 1 of others"):
        read_matrix(tmp_path)
