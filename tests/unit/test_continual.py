"""train.mode continual without a run: the order of phases, measures against numbers by hand, the matrix's picture."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from data_prep.config import DataConfig, SourceConfig
from data_prep.errors import DataError
from data_prep.training.index_build import read_config
from data_prep.training.phase_order import PhaseOrder, order_of, phases_of
from hope.train.config import TrainConfig
from hope.train.continual import Course, measures
from hope.train.plot.__main__ import main as plot
from hope.train.plot.curves import NoCurve
from hope.train.plot.matrix import read_matrix

NAMES = ["x", "y", "z"]
ROWS = [
    {"x": 6.0, "y": 6.0, "z": 6.0},
    {"x": 4.0, "y": 5.5, "z": 5.8},
    {"x": 4.5, "y": 3.0, "z": 5.4},
    {"x": 5.0, "y": 3.3, "z": 2.0},
]
BY_HAND = {
    "forward_transfer": 0.55, "forward_transfer.y": 0.5, "forward_transfer.z": 0.6,  # 6 - 5.5, 6 - 5.4
    "forgetting": 0.65, "forgetting.x": 1.0, "forgetting.y": 0.3,  # 5 - 4, 3.3 - 3
    "backward_transfer": -0.65, "backward_transfer.x": -1.0, "backward_transfer.y": -0.3,
    "retained": 0.69, "retained.x": 0.5, "retained.y": 0.88,  # 1 / 2, 2.2 / 2.5
}  # fmt: skip


def train(steps: int, **more) -> TrainConfig:
    return TrainConfig(**{"mode": "continual", "seq_len": 16, "global_batch": 8, "micro_batch": 2} | more, steps=steps)


def sources(*weights: float) -> DataConfig:
    return DataConfig(sources=[SourceConfig(name=n, weight=w) for n, w in zip("xyz", weights, strict=False)])


def test_the_order_of_phases_is_a_pure_function_of_the_position():
    order = PhaseOrder([3, 1, 4])
    expected = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4)]
    assert [order.locate(i) for i in range(9)] == expected
    assert [order.locate(i) for i in reversed(range(9))] == expected[::-1]
    assert [order.counts(i) for i in (0, 2, 3, 4, 6, 8, 9)] == [
        [0, 0, 0], [2, 0, 0], [3, 0, 0], [3, 1, 0], [3, 1, 2], [3, 1, 4], [3, 1, 5],
    ]  # fmt: skip
    assert order.shares == [3 / 8, 1 / 8, 4 / 8]
    with pytest.raises(IndexError, match="-1"):
        order.locate(-1)
    for bad in ([], [2, 0]):
        with pytest.raises(ValueError, match="one or more"):
            PhaseOrder(bad)


def test_phases_are_the_weights_shares_of_the_steps_and_of_their_samples():
    phases = phases_of(sources(3, 0.5, 1.5), train(20))
    assert [(p.name, p.first, p.last) for p in phases] == [("x", 1, 12), ("y", 13, 14), ("z", 15, 20)]
    order = order_of(sources(3, 0.5, 1.5), train(20))
    assert [order.locate(8 * step)[0] for step in range(20)] == [0] * 12 + [1] * 2 + [2] * 6
    with pytest.raises(ValueError, match="multiple of 10"):
        phases_of(sources(3, 0.5, 1.5), train(15))
    assert phases_of(sources(1, 1), train(20, mode="blend")) == []


def test_the_identity_of_an_order_has_no_length_of_the_last_phase():
    words = lambda *lengths: PhaseOrder(lengths).words
    assert words(3, 1, 4) == words(3, 1, 9)
    assert words(3, 1, 4) != words(3, 2, 4)


def test_what_shows_the_order_of_a_blend_refuses_phases(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train: {seq_len: 16, mode: continual}")
    assert read_config(str(path), [])[1] == 16
    assert read_config(str(path), ["train.mode=blend"], blended=True)[1] == 16
    with pytest.raises(DataError, match="--dry-run` shows its phases"):
        read_config(str(path), [], blended=True)


def test_measures_are_those_computed_by_hand():
    found = measures(NAMES, ROWS, ROWS[-1], 2)
    assert found == {f"continual.{key}": pytest.approx(value) for key, value in BY_HAND.items()}


def test_before_a_phase_has_ended_nothing_is_forgotten_and_a_missing_row_is_left_out():
    assert measures(NAMES, ROWS[:1], ROWS[0], 0) == {}
    within_z = {"x": 4.6, "y": 2.9, "z": 4.0}
    found = measures(NAMES, [ROWS[0], None, ROWS[2]], within_z, 2)
    assert found["continual.forgetting.x"] == pytest.approx(0.1)  # from 4.5, the best known
    assert found["continual.forgetting.y"] == 0  # it is at its best
    assert {"continual.backward_transfer.x", "continual.retained.x", "continual.retained.y"}.isdisjoint(found)
    assert found["continual.backward_transfer"] == found["continual.backward_transfer.y"] == pytest.approx(0.1)
    worse = measures(NAMES, [{**ROWS[0], "x": 3.0}, *ROWS[1:]], ROWS[-1], 2)
    assert "continual.retained.x" not in worse  # its phase improved nothing


def course() -> Course:
    return Course(phases_of(sources(3, 1, 4), train(8)))


def losses(row: dict[str, float]) -> dict[str, float]:
    return {"heldout_loss": 0.0, **{f"heldout_loss.{name}": loss for name, loss in row.items()}}


def test_a_course_notes_rows_at_borders_and_goes_on_from_its_state():
    whole, parts = course(), course()
    steps = [(0, ROWS[0]), (2, ROWS[3]), (3, ROWS[1]), (4, ROWS[2]), (6, ROWS[0]), (8, ROWS[3])]
    assert whole.borders == [0, 3, 4, 8]
    for step, row in steps:
        told = whole.note(step, losses(row))
        parts.note(step, losses(row))
        assert told == course_again(parts).note(step, losses(row))
        parts = course_again(parts)
    assert whole.state() == ROWS
    assert told["phase"] == 3
    assert {key: told[f"continual.{key}"] for key in BY_HAND} == pytest.approx(BY_HAND)
    assert whole.ended(4) == {"phase": 2, "source": "y", **{f"continual.loss.{n}": v for n, v in ROWS[2].items()}}
    assert whole.ended(6) == whole.ended(0) == {}


def test_what_was_measured_at_the_end_of_a_phase_that_goes_on_is_no_row():
    """The last phase was made longer: until its new end, R has no row of it."""
    longer = Course(phases_of(sources(3, 1, 6), train(10)))
    longer.restore([*ROWS[:3], dict.fromkeys(NAMES, 1.0)])
    told = longer.note(9, losses(ROWS[3]))
    assert told["continual.forgetting.x"] == pytest.approx(1.0)  # from 4.0, after its own phase
    assert longer.note(10, losses(ROWS[3]))["phase"] == 3
    assert longer.state() == ROWS


def course_again(before: Course) -> Course:
    after = course()
    after.restore(json.loads(json.dumps(before.state())))
    return after


def test_what_was_not_measured_is_lacking_and_a_blend_has_no_course():
    found = course()
    assert found.note(3, {}) == {}
    assert [step for step in range(9) if found.lacks(step)] == [0, 3, 4, 8]
    found.note(3, losses(ROWS[1]))
    assert not found.lacks(3)
    old = course()
    old.restore([])  # of a checkpoint that has no course
    assert old.lacks(3)
    assert old.note(4, losses(ROWS[2]))["phase"] == 2
    assert old.state() == [None, None, ROWS[2], None]
    none = Course([])
    assert none.note(3, losses(ROWS[1])) == losses(ROWS[1])
    assert not none.lacks(3)
    assert none.borders == none.state() == []


def written(folder: Path, rows: list[dict[str, float]]) -> Path:
    folder.mkdir()
    records = [
        {"step": n, "phase": n, **{f"continual.loss.{k}": v for k, v in row.items()}} for n, row in enumerate(rows)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_the_picture_has_losses_measures_and_a_frame_for_every_phase(tmp_path, capsys):
    run = written(tmp_path / "run", ROWS)
    assert plot([str(run), "--matrix", "--out", str(tmp_path / "matrix"), "--title", "of <x>"]) == 0
    root = ElementTree.fromstring((tmp_path / "matrix.svg").read_text())
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    numbers = [f"{value:.3f}" for row in ROWS for value in row.values()]
    assert sorted(w for w in words if w[-1].isdigit()) == sorted([*numbers, *(f"{v:.3f}" for v in BY_HAND.values())])
    assert {"of <x>", "before", "after z", "forward transfer", "retained", "mean"} <= set(words)
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert len([line for line in lines if line.get("stroke-width") == "1.5"]) == 3
    darkest = [line for line in lines if line.get("stroke") == "#a4d6a0"]
    assert len(darkest) == 3  # the lowest loss of every source
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out.splitlines()
    assert said[5].split() == ["forgetting", "1.0000", "0.3000", "0.6500"]


def test_a_run_without_phases_has_no_matrix(tmp_path, capsys):
    run = written(tmp_path / "run", [])
    assert plot([str(run), "--matrix"]) == 2
    assert "train.mode=continual" in capsys.readouterr().err
    with pytest.raises(NoCurve):
        read_matrix(tmp_path / "nothing")


def test_a_run_that_is_not_done_has_the_rows_so_far(tmp_path):
    found = read_matrix(written(tmp_path / "run", ROWS[:3]))
    assert [phase for phase, _ in found.rows] == [0, 1, 2]
    assert found.measures["continual.forgetting"] == pytest.approx(0.5)
    assert found.measures["continual.forward_transfer.z"] == pytest.approx(0.6)
