"""A log that cannot be written is said once and tried again; nothing of it is half written."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from full_disk import no_file_beyond

from hope.train import metrics
from hope.train.board import Board
from hope.train.metrics import MetricsLog
from hope.train.throughput import Devices


def open_at(folder: Path, said: list[str], **options) -> MetricsLog:
    return MetricsLog(folder, steps=100, devices=Devices(count=1), say=said.append, **{"tensorboard": False, **options})


def complaints(said: list[str]) -> list[str]:
    return [line for line in said if line.startswith("log: ")]


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("resume_step", [None, 5])
def test_lines_for_a_full_device_wait_until_there_is_room(tmp_path, resume_step):
    said: list[str] = []
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    with open_at(tmp_path, said, resume_step=resume_step) as log:
        for step in (10, 20):
            log.scalars({"step": step, "loss": math.nan})
            log.event("SAVE", step=step)
        assert len(complaints(said)) == 2
        assert "metrics.jsonl cannot be written: No space left on device" in complaints(said)[0]
        (tmp_path / "metrics.jsonl").unlink()
        log.scalars({"step": 30})
    assert steps_in(tmp_path) == [10, 20, 30]
    assert complaints(said)[2].endswith("metrics.jsonl is written again")
    assert complaints(said)[3].endswith("events.jsonl was not written to the end; 2 lines are lost")


def test_no_line_is_half_written(tmp_path):
    said: list[str] = []
    with open_at(tmp_path, said) as log:
        log.scalars({"step": 10})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with no_file_beyond(size + 5):
            log.scalars({"step": 20})
            assert (tmp_path / "metrics.jsonl").stat().st_size == size
        log.scalars({"step": 30})
    assert steps_in(tmp_path) == [10, 20, 30]


def test_a_resume_on_a_full_disk_still_keeps_every_step_once(tmp_path):
    with open_at(tmp_path, []) as log:
        for step in (0, 10, 20, 30):
            log.scalars({"step": step, "loss": 1.0})
    with no_file_beyond(1), open_at(tmp_path, [], resume_step=20):
        assert steps_in(tmp_path) == [0, 10, 20]


def test_a_small_file_is_whole_or_as_it_was_and_comes_later(tmp_path):
    said: list[str] = []
    with open_at(tmp_path, said) as log:
        log.text("config.yaml", "old")
        with no_file_beyond(2):
            log.text("config.yaml", "new content")
        assert (tmp_path / "config.yaml").read_text() == "old"
        assert "config.yaml cannot be written" in complaints(said)[0]
        log.scalars({"step": 10})
        assert (tmp_path / "config.yaml").read_text() == "new content"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "events.jsonl", "logs", "metrics.jsonl"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread ends so
def test_tensorboard_on_a_full_disk_is_said_once_and_tried_again(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(metrics, "Board", lambda *args: Board(*args, retry_s=0.0))
    said: list[str] = []
    with open_at(tmp_path, said, tensorboard=True) as log:
        with no_file_beyond(10):
            for step in range(1, 40):
                log.scalars({"step": step, "loss": 1.0})
                log.histogram("eta", torch.ones(3), step)
        log.scalars({"step": 50, "loss": 2.0})
    assert len([line for line in complaints(said) if line.endswith("goes on without it")]) == 1
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert (found[-1].step, found[-1].value) == (50, 2.0)


def test_a_console_that_takes_nothing_ends_nothing(tmp_path, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with MetricsLog(tmp_path, steps=100, devices=Devices(count=1), tensorboard=False) as log:
            log.scalars({"step": 10})
    assert steps_in(tmp_path) == [10]
