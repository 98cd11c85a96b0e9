"""Whole runs with other optimizers: resumed bit for bit, spikes skipped, every group's numbers in the log."""

import pytest
from multirank import run_ranks
from test_training_run import events, metrics, run, same_curve
from tiny import config_file

import pretrain_hope
from parallel.compute import replica

SETTINGS = {
    "mlp-local": [
        "optim.dmgd.memory=mlp",
        "optim.accumulate=local",
        "model.cms.unit=tokens",
        "model.cms.periods=[128,384]",
    ],
    "m3": ["optim.name=m3", "optim.m3.slow_period=2"],
    "muon-local": ["optim.name=muon", "optim.accumulate=local"],
    "muon-mlp": ["optim.name=muon", "optim.muon.memory=mlp"],
    "muon-scalar": ["optim.name=muon", "optim.muon.memory=scalar"],
    "scalar": ["optim.dmgd.memory=scalar"],
    "muon-frozen": ["optim.name=muon", "optim.muon.memory=mlp", "optim.accumulate=local",
               'optim.groups=[{match: "blocks.0.*", rate: 0}]'],
    "mlp-only": ["optim.dmgd.memory=mlp_only", "optim.dmgd.mlp.key=gradient", "optim.dmgd.output=rms_match",
                 "optim.dmgd.mlp.decay=0"],  # it is all of this write, and can raise the loss at the key
}  # fmt: skip
ALWAYS = ("mlp-local", "muon-mlp")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in SETTINGS]
)
def test_resume_is_bit_equal(tmp_path, name):
    """Saved at step 4, in the middle of a period of 3 steps, by both runs; one of them stops there and goes on."""
    path, flags = config_file(tmp_path), [*SETTINGS[name], "checkpoint.every=4"]
    assert run_ranks(run, 2, path, "run.name=whole", *flags, timeout=90) == [0, 0]
    for more in (["train.stop_after=4"], []):
        assert run_ranks(run, 2, path, "run.name=parts", *flags, *more, timeout=90) == [0, 0]
    assert "RESUME" in [e["event"] for e in events(tmp_path, "parts")]
    same_curve(metrics(tmp_path, "whole"), metrics(tmp_path, "parts"))
    last = metrics(tmp_path, "parts")[-1]
    assert (last["clock.base"], last["clock.cms1.undecayed"]) == (8, 8)
    assert last["update_ratio.base"] > 0
    assert (last["momentum_norm.base"] > 0) == (name != "mlp-only")  # which has no momentum
    assert 0 < last["inner_loss_after.base"] < last["inner_loss_before.base"]  # a write lowers the loss at its key
    assert last["reduced_bytes"] > 0
    groups = {key.split(".", 1)[1] for key in last if key.startswith("clock.")}
    assert ("cms1.matrices" in groups) == name.startswith(("muon", "m3"))


def spiked(path: str, steps: tuple[int, ...], *overrides: str) -> int:
    """A run whose loss is ten times as large at the given steps."""
    original, original_loss = pretrain_hope.Run._one_step, replica.sharded_loss

    def one_step(self, log, last):
        factor = 10.0 if self.step + 1 in steps else 1.0
        replica.sharded_loss = lambda *args: original_loss(*args) * factor
        original(self, log, last)

    pretrain_hope.Run._one_step = one_step
    return run(path, *overrides)


def test_a_loss_spike_is_skipped_with_its_numbers_and_too_many_stop_the_run(tmp_path):
    path = config_file(tmp_path)
    flags = ["train.spike_sigma=20", "train.spike_window=3", "train.max_skips=2", "train.eval_every=0"]
    assert run_ranks(spiked, 2, path, (5, 7, 8), *flags, timeout=120) == [93, 93]
    skips = [e for e in events(tmp_path) if e["event"] == "SKIP"]
    assert [(e["step"], e["reason"]) for e in skips] == [(5, "loss_spike"), (7, "loss_spike"), (8, "loss_spike")]
    assert all(e["loss"] > 10 > e["bound"] for e in skips)
    assert events(tmp_path)[-1]["reason"] == "loss_spikes"
    clocks = {r["step"]: r["clock.cms1"] for r in metrics(tmp_path)[1:]}
    assert (clocks[4], clocks[5], clocks[6], clocks[8]) == (4, 4, 5, 5)


@pytest.mark.parametrize(
    "name", ["mlp-local", pytest.param("m3", marks=pytest.mark.slow), pytest.param("muon-mlp", marks=pytest.mark.slow)]
)
def test_a_checkpoint_of_one_rank_goes_on_on_two(tmp_path, name):
    path, flags = config_file(tmp_path), [*SETTINGS[name], "optim.eps=1e-4", "model.layers=3"]
    assert run_ranks(run, 1, path, "run.name=whole", *flags, timeout=90) == [0]
    assert run_ranks(run, 1, path, "run.name=parts", *flags, "train.stop_after=4", timeout=90) == [0]
    assert run_ranks(run, 2, path, "run.name=parts", *flags, timeout=90) == [0, 0]
    same_curve(metrics(tmp_path, "whole"), metrics(tmp_path, "parts"), 2e-5)
