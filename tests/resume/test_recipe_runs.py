"""Whole runs: a stable phase that goes on or branches into a decay, parameters grouped anew, levels switched off."""

import shutil

import pytest
from multirank import run_ranks
from test_training_run import metrics, run
from tiny import config_file

WSD = ["optim.decay=wsd", "optim.decay_length=2", "train.eval_every=0", "checkpoint.keep=9"]


def curve(folder, name: str, first: int = 0) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in metrics(folder, name) if r["step"] >= first]


def test_a_stable_phase_goes_on_without_a_word_and_a_decay_branches_from_a_copied_checkpoint(tmp_path):
    """Both are then, bit for bit, what a run of that schedule from step 0 is."""
    path, copied = config_file(tmp_path), "checkpoints/step_00000004"
    one = lambda *flags: run_ranks(run, 1, path, *WSD, *flags, timeout=120)
    assert one("run.name=long", "train.steps=9") == [0]
    assert one("run.name=parts", "train.steps=8", "train.stop_after=4") == [0]
    shutil.copytree(tmp_path / "runs/parts" / copied, tmp_path / "runs/branch" / copied)
    assert one("run.name=parts", "train.steps=null", "train.tokens=1152") == [0]  # 9 steps
    assert len(curve(tmp_path, "long")) == 10
    assert curve(tmp_path, "long") == curve(tmp_path, "parts")
    assert one("run.name=short", "train.steps=6", "optim.decay_shape=sqrt") == [0]
    assert one("run.name=branch", "train.steps=6", "optim.decay_shape=sqrt") == [0]
    assert curve(tmp_path, "short", first=5) == curve(tmp_path, "branch")
    rates = [record["lr"] for record in metrics(tmp_path, "short")]
    assert rates[1:] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2, 1e-2 * (1 - 0.9 * 0.5**0.5), 1e-3])


def test_what_is_regrouped_keeps_its_levels_time(tmp_path, capfd):
    path, muon = config_file(tmp_path), ["optim.name=muon", "train.eval_every=0"]
    exception = 'optim.groups=[{match: "*.levels.1.*", rate: 0.5, weight_decay: 0.0}]'
    assert run_ranks(run, 1, path, *muon, "train.stop_after=4", timeout=120) == [0]
    assert run_ranks(run, 1, path, *muon, exception, timeout=120) == [2]
    assert "optim.groups" in capfd.readouterr().err
    words = "checkpoint.on_change={optim.groups: override, optim.muon.per_head: override}"
    assert run_ranks(run, 1, path, *muon, exception, "optim.muon.per_head=true", words, timeout=120) == [0]
    last = metrics(tmp_path)[-1]
    names = {key.removeprefix("clock.") for key in last if key.startswith("clock.")}
    assert {"cms1.matrices.group0", "cms1.undecayed.group0", "base.matrices.heads_of_8"} <= names
    assert all(last[f"clock.{name}"] == 8 for name in names)


def test_levels_are_switched_off_alike_in_every_layout(tmp_path):
    """And what a level's last update did is told when it was not due in the very step that is logged."""
    path = config_file(tmp_path)
    flags = ["train.eval_levels=true", "optim.eps=1e-4", "log.every=4", "train.steps=4"]
    layout = ["parallel.tensor=2", "parallel.sequence=true"]
    assert run_ranks(run, 1, path, "run.name=one", *flags, timeout=120) == [0]
    assert run_ranks(run, 2, path, "run.name=two", *flags, *layout, timeout=100) == [0, 0]
    one, two = metrics(tmp_path, "one"), metrics(tmp_path, "two")
    keys = ["heldout_loss", "heldout_loss_without.cms0", "heldout_loss_without.cms1"]
    for a, b in ((one[0], two[0]), (one[-1], two[-1])):
        assert len({a[key] for key in keys}) == 3
        assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], rel=2e-5)
    assert (one[-1]["step"], one[-1]["clock.cms1"]) == (4, 4)  # due every 3 steps
    assert one[-1]["update_ratio.cms1"] > 0
    assert two[-1]["update_ratio.cms1"] == pytest.approx(one[-1]["update_ratio.cms1"], rel=1e-3)
