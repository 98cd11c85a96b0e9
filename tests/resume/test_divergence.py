"""A run that diverges keeps what it had: doubtful checkpoints count for nothing, and the end says so."""

import pytest
from multirank import run_ranks
from test_saving import names, of_kind
from test_training_run import metrics, poisoned, run
from tiny import config_file

import pretrain_hope
from hope.stored import folders, manifest
from parallel.checkpoint.__main__ import main as checkpoint

FLAGS = ["train.steps=30", "checkpoint.every=2", "train.eval_every=0", "train.max_skips=9"]
GOOD = ["latest", "step_00000002", "step_00000004"]


def test_a_diverged_run_keeps_its_good_checkpoints_and_goes_on_from_them(tmp_path, capsys):
    path = config_file(tmp_path)
    assert run_ranks(run, 2, path, *FLAGS, "train.stop_after=4", timeout=90) == [0, 0]
    lost = [*FLAGS, "optim.lr=1e30", "checkpoint.on_change={optim.lr: override}"]
    assert run_ranks(run, 2, path, *lost, timeout=90) == [93, 93]
    stop = of_kind(tmp_path, "STOP")[-1]
    assert (stop["reason"], stop["last_good"]) == ("nonfinite_gradients", "step_00000004")
    checkpoints = tmp_path / "runs/tiny/checkpoints"
    kept = [path.name for path in folders.doubtful(checkpoints)]
    assert names(tmp_path) == [*GOOD, *sorted(kept)]
    assert len(kept) == 2  # checkpoint.keep, counted apart from the good ones
    assert (checkpoints / "latest").read_text() == "step_00000004\n"
    doubts = of_kind(tmp_path, "DOUBTFUL")
    assert len(doubts) > 2
    assert all("skipped: nonfinite_gradients" in event["reason"] for event in doubts)
    assert manifest.read(checkpoints / kept[0]).extra["doubt"] == doubts[-1]["reason"]
    assert checkpoint(["inspect", str(checkpoints / kept[0])]) == 0
    assert doubts[-1]["reason"] in capsys.readouterr().out

    assert run_ranks(run, 2, path, *FLAGS, "train.stop_after=6", timeout=90) == [0, 0]
    resumed = of_kind(tmp_path, "RESUME")[-1]
    assert resumed["step"] == 4
    assert any(f"skipped {kept[0]}: the last" in note for note in resumed["notes"])
    assert names(tmp_path)[:3] == ["latest", "step_00000004", "step_00000006"]
    assert metrics(tmp_path)[-1]["step"] == 6


def test_a_run_that_ends_in_skipped_steps_does_not_end_with_0_and_is_not_gone_on_from(tmp_path, capfd):
    path = config_file(tmp_path)
    assert run_ranks(run, 1, path, "optim.lr=1e30", "optim.warmup=1", "train.max_skips=99", timeout=120) == [93]
    stop = of_kind(tmp_path, "STOP")[-1]
    assert stop["step"] == 8
    assert stop["reason"].startswith("the last ")
    assert stop["last_good"] == "none"
    assert names(tmp_path) == ["step_00000008.doubtful"]
    assert run_ranks(run, 1, path, "optim.warmup=1", timeout=120) == [2]
    assert "only doubtful ones:\n  step_00000008.doubtful: the last" in capfd.readouterr().err


def test_one_skipped_step_is_forgotten_by_the_next_and_stays_at_the_end(tmp_path):
    path = config_file(tmp_path)
    flags = ["checkpoint.every=1", "checkpoint.keep=9", "train.steps=5"]
    assert run_ranks(poisoned, 2, path, (2, 5), *flags, timeout=120) == [93, 93]
    assert [event["step"] for event in of_kind(tmp_path, "SAVE")] == [1, 3, 4]
    assert [event["step"] for event in of_kind(tmp_path, "DOUBTFUL")] == [2, 5]
    assert of_kind(tmp_path, "STOP")[-1]["last_good"] == "step_00000004"


def spoiled(path: str, at: int, *overrides: str) -> int:
    """A run in which one weight that rank 1 holds becomes infinite after step `at`, unseen by any gradient."""
    original = pretrain_hope.Run._one_step

    def one_step(self, log, last):
        original(self, log, last)
        if self.step == at and self.ranks.rank == 1:
            masters = [piece for piece in self.optimizer.pieces() if piece.key == "master"]
            masters[-1].values[-1] = float("-inf")

    pretrain_hope.Run._one_step = one_step
    return run(path, *overrides)


@pytest.mark.parametrize("background", ["true", "false"])
def test_weights_that_are_not_finite_on_one_rank_make_it_doubtful(tmp_path, background):
    path = config_file(tmp_path)
    flags = ["checkpoint.every=1", "checkpoint.keep=1", f"checkpoint.asynchronous={background}"]
    run_ranks(spoiled, 2, path, 3, *flags, "train.stop_after=3", timeout=120)
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000003.doubtful"]
    assert of_kind(tmp_path, "DOUBTFUL")[0]["reason"].endswith("has values that are not finite")


def test_what_a_person_put_beside_the_checkpoints_stays(tmp_path):
    path = config_file(tmp_path)
    own = ["step_00000002.old", "step_00000099.tmp", "step_00000002.copy"]
    for name in own:
        (tmp_path / "runs/tiny/checkpoints" / name).mkdir(parents=True)
    assert run_ranks(run, 1, path, "checkpoint.every=2", "checkpoint.keep=1", timeout=120) == [0]
    assert names(tmp_path) == sorted(["latest", "step_00000008", *own])
