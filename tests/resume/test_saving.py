"""When a run is saved, what a resumed run says about changes, and what happens when saving fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from multirank import run_ranks
from test_training_run import events, metrics, run, same_curve, weights
from tiny import config_file

import pretrain_hope
from hope.stored import folders, manifest
from parallel.checkpoint.format.storage import RawWriter


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "runs/tiny/checkpoints"))


def of_kind(folder: Path, *words: str) -> list[dict]:
    return [event for event in events(folder) if event["event"] in words]


def touching(path: str, file: str, at: int, *overrides: str) -> int:
    """A run in which somebody touches RUN/file in step `at`; rank 0 is the one that sees it."""
    original = pretrain_hope.Run._one_step

    def one_step(self, log, last):
        if self.step + 1 == at and self.ranks.rank == 0:
            (self.folder / file).touch()
        original(self, log, last)

    pretrain_hope.Run._one_step = one_step
    return run(path, *overrides)


def test_touching_save_saves_once_and_the_file_goes_away(tmp_path):
    path = config_file(tmp_path)
    assert run_ranks(touching, 2, path, "SAVE", 3, timeout=90) == [0, 0]
    assert [event["step"] for event in of_kind(tmp_path, "SAVE")] == [3, 8]
    assert not (tmp_path / "runs/tiny/SAVE").exists()


def test_touching_stop_saves_and_ends(tmp_path):
    path = config_file(tmp_path)
    assert run_ranks(run, 2, path, "run.name=whole", timeout=90) == [0, 0]
    assert run_ranks(touching, 2, path, "STOP", 3, timeout=90) == [0, 0]
    assert [event["step"] for event in of_kind(tmp_path, "SAVE", "STOP")] == [3, 3]
    assert metrics(tmp_path)[-1]["step"] == 3
    assert not (tmp_path / "runs/tiny/STOP").exists()
    assert run_ranks(run, 2, path, timeout=90) == [0, 0]
    same_curve(metrics(tmp_path, "whole"), metrics(tmp_path))


def watched(path: str, held: tuple[int, ...], *overrides: str) -> int:
    """A run that is asked to save in step 4, and that notes after each step how many checkpoints are durable, and
    whether the file SAVE is there. Saves of the steps `held` are not written before the following step is over."""
    write_data, one_step = RawWriter.write_data, pretrain_hope.Run._one_step

    def held_back(self, plan, planner):
        step = folders.step_of(self._folder)
        deadline = time.monotonic() + 60
        while step in held and not (self._folder.parent / f"over_{step + 1}").exists():
            assert time.monotonic() < deadline, f"step {step + 1} waits for the save of step {step}"
            time.sleep(0.01)
        return write_data(self, plan, planner)

    def noted(self, log, last):
        one_step(self, log, last)
        if self.ranks.rank == 0:
            checkpoints = self.folder / "checkpoints"
            found = len(folders.finished(checkpoints))
            log.event("NOTE", step=self.step, durable=found, wish=(self.folder / "SAVE").exists())
            if self.step == 4:
                (self.folder / "SAVE").touch()
            checkpoints.mkdir(exist_ok=True)
            (checkpoints / f"over_{self.step}").touch()

    RawWriter.write_data, pretrain_hope.Run._one_step = held_back, noted
    return run(path, *overrides)


def test_training_goes_on_while_a_save_is_written_and_the_next_waits(tmp_path):
    path = config_file(tmp_path)
    flags = ["checkpoint.every=3", "train.steps=6", "checkpoint.keep=9"]
    assert run_ranks(watched, 2, path, (3, 4), *flags, timeout=150) == [0, 0]
    notes = {event["step"]: event for event in of_kind(tmp_path, "NOTE")}
    assert [notes[step]["durable"] for step in (3, 4, 5)] == [0, 0, 1]
    assert notes[5]["wish"], "SAVE went away with the save before the one that answers it"
    assert not (tmp_path / "runs/tiny/SAVE").exists()
    saves = of_kind(tmp_path, "SAVE")
    assert [event["step"] for event in saves] == [3, 4, 6]
    assert all(event["durable_s"] > event["staged_s"] > 0 for event in saves)
    assert "waited_s" not in saves[0]
    assert all(event["waited_s"] > 0 for event in saves[1:])


def test_synchronous_saves_are_durable_before_the_next_step(tmp_path):
    path = config_file(tmp_path)
    flags = ["checkpoint.every=3", "train.steps=5", "checkpoint.keep=9", "checkpoint.asynchronous=false"]
    assert run_ranks(watched, 1, path, (), *flags, timeout=120) == [0]
    assert [event["durable"] for event in of_kind(tmp_path, "NOTE")] == [0, 0, 0, 1, 2]
    assert [event["step"] for event in of_kind(tmp_path, "SAVE")] == [3, 4, 5]


def test_background_saves_leave_the_run_as_it_is(tmp_path):
    """Saved while it trains, every step: the same curve and weights, and any of the checkpoints goes on alike."""
    path = config_file(tmp_path)
    assert run_ranks(run, 2, path, "run.name=whole", timeout=90) == [0, 0]
    flags = ["checkpoint.every=1", "checkpoint.keep=99"]
    assert run_ranks(run, 2, path, *flags, timeout=90) == [0, 0]
    same_curve(metrics(tmp_path, "whole"), metrics(tmp_path))
    for step in (8, 7, 6):  # the newest goes, the run resumes from the one before
        subprocess.run(["rm", "-r", str(tmp_path / f"runs/tiny/checkpoints/step_{step:08d}")], check=True)
    assert run_ranks(run, 2, path, *flags, timeout=90) == [0, 0]
    assert [event["step"] for event in of_kind(tmp_path, "RESUME")] == [5]
    same_curve(metrics(tmp_path, "whole"), metrics(tmp_path))
    for name, values in weights(tmp_path, 8, "whole").items():
        assert values.equal(weights(tmp_path, 8)[name]), name


def test_a_damaged_checkpoint_is_named_in_the_resume_event(tmp_path):
    path = config_file(tmp_path)
    assert run_ranks(run, 2, path, "checkpoint.every=4", "run.name=whole", timeout=90) == [0, 0]
    assert run_ranks(run, 2, path, "checkpoint.every=4", "train.stop_after=6", timeout=90) == [0, 0]
    shard = tmp_path / "runs/tiny/checkpoints/step_00000006/rank_00001.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    assert run_ranks(run, 2, path, "checkpoint.every=4", timeout=90) == [0, 0]
    resumed = of_kind(tmp_path, "RESUME")[0]
    assert resumed["step"] == 4
    assert "skipped step_00000006: rank_00001.bin has another content than was written" in resumed["notes"][0]
    assert names(tmp_path) == ["latest", "step_00000004", "step_00000006.bad", "step_00000008"]
    same_curve(metrics(tmp_path, "whole"), metrics(tmp_path))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The run's checkpoint folder, with room for two checkpoints and a bit."""
    folder = tmp_path / "runs/tiny/checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def filled(path: str, keep_full: bool, *overrides: str) -> int:
    """A run whose disk is filled up in step 3, and emptied again in step 5 unless `keep_full`."""
    original = pretrain_hope.Run._one_step

    def one_step(self, log, last):
        ballast = self.folder / "checkpoints" / "ballast"
        if self.ranks.rank == 0 and self.step == 2:
            room = os.statvfs(ballast.parent)
            ballast.write_bytes(bytes(room.f_bavail * room.f_bsize - 8192))
        if self.ranks.rank == 0 and self.step == 4 and not keep_full:
            ballast.unlink()
        original(self, log, last)

    pretrain_hope.Run._one_step = one_step
    return run(path, *overrides)


def test_no_space_is_an_event_and_the_run_and_the_last_checkpoint_live(tmp_path, small_disk):
    path = config_file(tmp_path)
    flags = ["checkpoint.every=1", "checkpoint.keep=1", "checkpoint.asynchronous=false", "train.steps=6"]
    assert run_ranks(filled, 2, path, False, *flags, timeout=90) == [0, 0]
    failed = of_kind(tmp_path, "SAVE_FAILED")
    assert [(event["step"], event["in_a_row"]) for event in failed] == [(3, 1), (4, 2)]
    assert all("No space left on device" in event["reason"] for event in failed)
    assert [event["step"] for event in of_kind(tmp_path, "SAVE")] == [1, 2, 5, 6]
    assert names(tmp_path) == ["latest", "step_00000006"]


@pytest.mark.parametrize("more", [["checkpoint.max_failures=2"], ["train.stop_after=3", "checkpoint.max_failures=9"]])
def test_no_space_for_long_or_at_the_end_is_an_error(tmp_path, small_disk, capfd, more):
    path = config_file(tmp_path)
    flags = ["checkpoint.every=1", "checkpoint.keep=1", "checkpoint.asynchronous=false", *more]
    assert run_ranks(filled, 2, path, True, *flags, timeout=90) == [1, 1]
    error = capfd.readouterr().err
    expected = r"2 saves in a row failed \(checkpoint.max_failures\), the last at step 4: .*No space left on device"
    assert re.search(expected if "max" in more[0] else "no checkpoint of step 3, at which the run was to stop", error)
    assert names(tmp_path) == ["ballast", "latest", "step_00000002"]
    (small_disk / "ballast").unlink()
    assert run_ranks(run, 2, path, timeout=90) == [0, 0]
    assert of_kind(tmp_path, "RESUME")[-1]["step"] == 2


def test_changes_are_asked_for_and_then_shown(tmp_path, capfd):
    path = config_file(tmp_path)
    assert run_ranks(run, 1, path, "train.stop_after=2", timeout=90) == [0]
    assert run_ranks(run, 1, path, "optim.lr=2e-2", "optim.beta1=0.8", timeout=90) == [2]
    error = capfd.readouterr().err
    assert "2 problems" in error
    assert "optim.lr" in error
    assert "checkpoint 0.01, now 0.02" in error
    assert "'checkpoint.on_change={optim.lr: override}' for 0.02, keep for 0.01" in re.sub(r"\s+", " ", error)
    change = "checkpoint.on_change={optim.lr: override, optim: keep}"
    assert run_ranks(run, 1, path, "optim.lr=2e-2", "optim.beta1=0.8", "log.every=2", change, timeout=90) == [0]
    out = capfd.readouterr().out
    assert "optim.lr: checkpoint 0.01, config 0.02, effective 0.02 (override)" in out
    assert "optim.beta1: checkpoint 0.9, config 0.8, effective 0.9 (keep)" in out
    assert "log.every: checkpoint 1, config 2, effective 2 (free)" in out
    written = (tmp_path / "runs/tiny/config.yaml").read_text()
    assert "beta1: 0.9" in written
    assert metrics(tmp_path)[-1]["lr"] > 0.01 * 0.1 * 1.5  # final_lr is a tenth of the peak, now 0.02


def test_an_unknown_key_in_on_change_is_refused(tmp_path, capsys):
    assert run(config_file(tmp_path), "checkpoint.on_change={optim.rl: override, train: maybe}") == 2
    error = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "optim.rl is no key or section; did you mean: optim.lr" in error
    assert "train: 'maybe' says neither; try: keep, or override" in error


def test_what_a_checkpoint_records(tmp_path):
    """Data position, schedule, counters, the next batch, the memory state; and nothing of the environment."""
    os.environ["SECRET_TOKEN"] = "hunter2"
    path = config_file(tmp_path)
    assert run_ranks(run, 2, path, "train.stop_after=4", timeout=90) == [0, 0]
    folder = tmp_path / "runs/tiny/checkpoints/step_00000004"
    content = manifest.read(folder)
    assert content.extra["consumed"] == {"train": 32}
    assert content.extra["tokens"] == 4 * 8 * 16
    assert content.extra["schedule"]["of"] == 8
    assert content.extra["skips"]["in_a_row"] == 0
    assert re.fullmatch("[0-9a-f]{64}", content.extra["next_batch"])
    assert content.extra["config"]["optim"]["lr"] == 0.01
    assert content.carried_memory_state.startswith("none: ")
    assert content.layout == {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "data": 2}
    text = json.dumps(json.loads((folder / "manifest.json").read_text()))
    assert "hunter2" not in text
    assert "SECRET" not in text
