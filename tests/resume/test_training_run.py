"""Whole runs of pretrain_hope.main on one and two ranks: learning, resuming, skipping, stopping."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from multirank import run_ranks
from tiny import config_file

import pretrain_hope
from configs.schema import load
from data_prep.training.batches import batch_of_windows
from data_prep.training.reading import TrainingSet
from hope.model import Model, next_token_loss
from hope.stored import manifest
from hope.stored.folders import step_folder
from hope.stored.tensors import read_tensor
from parallel.compute import replica


def run(path: str, *overrides: str) -> int:
    torch.set_num_threads(1)
    return pretrain_hope.main([path, *overrides])


def metrics(folder: Path, name: str = "tiny") -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path, name: str = "tiny") -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / name / "events.jsonl").read_text().splitlines()]


def weights(folder: Path, step: int, name: str = "tiny") -> dict[str, torch.Tensor]:
    """The fp32 weights in a checkpoint, under single-device names."""
    path = step_folder(folder / "runs" / name / "checkpoints", step)
    tensors = manifest.read(path).tensors
    masters = [name for name in tensors if name.startswith("master/")]
    return {name.removeprefix("master/"): read_tensor(path, tensors[name]).clone() for name in masters}


def same_curve(a: list[dict], b: list[dict], tolerance: float = 0.0) -> None:
    assert [r["step"] for r in a] == [r["step"] for r in b]
    for x, y in zip(a, b, strict=True):
        for key in ("loss", "grad_norm", "heldout_loss"):
            assert (x.get(key) is None) == (y.get(key) is None)
            if x.get(key) is not None:
                assert x[key] == pytest.approx(y[key], rel=tolerance, abs=0), (x["step"], key)


@pytest.mark.parametrize("memory", ["matrix", "mlp"])
def test_loss_falls_and_the_run_folder_is_complete(tmp_path, memory):
    path = config_file(tmp_path, memory)
    more = ["train.steps=40", "log.tensorboard=true", "log.histograms=20", "checkpoint.every=20"]
    assert run_ranks(run, 2, path, *more, timeout=120) == [0, 0]
    records, folder = metrics(tmp_path), tmp_path / "runs" / "tiny"
    assert records[0]["step"] == 0
    assert records[-1]["step"] == 40
    assert records[0]["heldout_loss"] == pytest.approx(4.1589, rel=0.04)  # ln 64; gates begin half open
    assert records[-1]["heldout_loss"] < records[0]["heldout_loss"] - 0.5
    contract = (
        "step tokens loss grad_norm lr step_time_s data_time_s tokens_per_s tokens_per_s_per_device mfu memory_gb"
    )
    assert set(contract.split()) <= set(records[-1])
    assert records[-1]["tokens"] == 40 * 8 * 16
    assert {"memory_norm.0", "memory_norm.1", "grad_norm.base", "grad_norm.cms1"} <= set(records[-1])
    assert [e["step"] for e in events(tmp_path) if e["event"] == "SAVE"] == [20, 40]
    for name in ("config.yaml", "env.txt", "logs", "tensorboard", "checkpoints/latest"):
        assert (folder / name).exists(), name


def test_tensorboard_holds_scalars_and_gate_histograms(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = config_file(tmp_path)
    assert run_ranks(run, 1, path, "log.tensorboard=true", "log.histograms=4", timeout=120) == [0]
    board = EventAccumulator(str(tmp_path / "runs/tiny/tensorboard"), size_guidance={"histograms": 0})
    board.Reload()
    assert {"loss", "heldout_loss", "memory_norm.1", "grad_norm.cms1"} <= set(board.Tags()["scalars"])
    assert {"eta.0", "alpha.0", "eta.1", "alpha.1"} <= set(board.Tags()["histograms"])
    assert [h.step for h in board.Histograms("eta.0")] == [4, 8]
    assert board.Histograms("eta.0")[0].histogram_value.max <= 0.25  # eta_max


def test_two_ranks_equal_one(tmp_path):
    """Same batches, same losses, same weights whatever the data-parallel degree and the micro-batch."""
    path = config_file(tmp_path)
    assert run_ranks(run, 1, path, "run.name=one", timeout=120) == [0]
    assert run_ranks(run, 2, path, "run.name=two", "train.micro_batch=4", timeout=120) == [0, 0]
    same_curve(metrics(tmp_path, "one"), metrics(tmp_path, "two"), 2e-5)
    one, two = weights(tmp_path, 8, "one"), weights(tmp_path, 8, "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2-sp-pp2": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
    "pp2-vpp2-dp2": (4, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}


@pytest.mark.parametrize(
    "layout",
    [pytest.param("tp2", marks=pytest.mark.slow), "tp2-sp-pp2", pytest.param("pp2-vpp2-dp2", marks=pytest.mark.slow)],
)
def test_tensor_and_pipeline_layouts_train_and_resume_alike(tmp_path, layout):
    """The whole program under a layout: the curve of one device, and a bit-equal resume in a CMS period."""
    path, (ranks, flags) = config_file(tmp_path), LAYOUTS[layout]
    four = ["model.layers=4", "optim.eps=1e-4"]
    assert run_ranks(run, 1, path, "run.name=one", *four, timeout=120) == [0]
    assert set(run_ranks(run, ranks, path, "run.name=whole", *four, *flags, timeout=100)) == {0}
    same_curve(metrics(tmp_path, "one"), metrics(tmp_path, "whole"), 2e-5)
    assert {f"memory_norm.{layer}" for layer in range(4)} <= set(metrics(tmp_path, "whole")[-1])
    for more in (["train.stop_after=4"], []):
        assert set(run_ranks(run, ranks, path, "run.name=parts", *four, *flags, *more, timeout=100)) == {0}
    same_curve(metrics(tmp_path, "whole"), metrics(tmp_path, "parts"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bit_equal(tmp_path, precision):
    """Stopped at step 4, in the middle of a CMS period of 3, and gone on: same losses and weights to the last bit."""
    path = config_file(tmp_path)
    flags = [f"train.precision={precision}"]
    assert run_ranks(run, 2, path, "run.name=whole", *flags, timeout=120) == [0, 0]
    assert run_ranks(run, 2, path, "run.name=parts", "train.stop_after=4", *flags, timeout=120) == [0, 0]
    assert metrics(tmp_path, "parts")[-1]["step"] == 4
    assert run_ranks(run, 2, path, "run.name=parts", *flags, timeout=120) == [0, 0]
    assert [e["event"] for e in events(tmp_path, "parts")] == ["SAVE", "RESUME", "SAVE"]
    same_curve(metrics(tmp_path, "whole"), metrics(tmp_path, "parts"))
    whole, parts = weights(tmp_path, 8, "whole"), weights(tmp_path, 8, "parts")
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def test_every_step_sees_its_own_batch(tmp_path):
    """At a vanishing learning rate the loss of step k is that of the untrained model on samples 8(k-1) to 8k-1."""
    path = config_file(tmp_path)
    assert run_ranks(run, 2, path, "optim.lr=1e-30", "train.steps=4", timeout=120) == [0, 0]
    config = load(path, [])
    model = Model(config.model).initialise(config.run.seed)
    data = TrainingSet(config.data.train, config.train.seq_len, config.data.seed)
    expected = []
    for step in range(4):
        batch = batch_of_windows([data.sample(8 * step + i) for i in range(8)], "carry", data.eos_id)
        with torch.no_grad():
            expected.append(next_token_loss(model(batch.tokens_TB)[0], batch.targets_TB).item())
    assert len(set(expected)) == 4
    assert [r["loss"] for r in metrics(tmp_path)[1:]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_are_clipped_to_the_global_norm(tmp_path, ranks):
    """Plain gradient descent (no memory, no normaliser, no decay) moves the weights by exactly lr x clip."""
    path = config_file(tmp_path)
    plain = ["optim.dmgd.objective=dot", "optim.dmgd.preconditioner=none", "optim.beta1=0", "optim.weight_decay=0"]
    more = ["optim.lr=0.5", "optim.warmup=0", "optim.decay=constant", "train.grad_clip=0.01", "model.cms.periods=[1,1]"]
    assert set(run_ranks(run, ranks, path, *plain, *more, "train.stop_after=1", timeout=120)) == {0}
    assert metrics(tmp_path)[1]["grad_norm"] > 0.5
    start = Model(load(path, more).model).initialise(1).state_dict()
    moved = sum((w - start[name]).square().sum().item() for name, w in weights(tmp_path, 1).items()) ** 0.5
    assert moved == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_a_finished_run_is_not_repeated(tmp_path):
    path = config_file(tmp_path)
    assert run_ranks(run, 1, path, timeout=120) == [0]
    before = metrics(tmp_path)
    assert run_ranks(run, 1, path, timeout=120) == [0]
    assert metrics(tmp_path) == before


def poisoned(path: str, steps: tuple[int, ...], *overrides: str) -> int:
    """A run in which rank 1's loss is NaN at the given steps."""
    original, original_loss = pretrain_hope.Run._one_step, replica.sharded_loss

    def one_step(self, log, last):
        bad = self.ranks.rank == 1 and self.step + 1 in steps
        replica.sharded_loss = lambda *args: original_loss(*args) * (float("nan") if bad else 1.0)
        original(self, log, last)

    pretrain_hope.Run._one_step = one_step
    return run(path, *overrides)


def test_a_nonfinite_gradient_skips_the_step_and_advances_no_clock(tmp_path):
    path = config_file(tmp_path)
    assert run_ranks(poisoned, 2, path, (2,), "train.steps=4", timeout=120) == [0, 0]
    skip = [e for e in events(tmp_path) if e["event"] == "SKIP"]
    assert [(e["step"], e["reason"]) for e in skip] == [(2, "nonfinite_gradient")]
    assert skip[0]["param"] == "embedding.weight"
    clocks = manifest.read(tmp_path / "runs/tiny/checkpoints/step_00000004").counters
    assert clocks["base"] == {"clock": 3, "updates": 3}
    assert clocks["cms1"] == {"clock": 3, "updates": 1}
    assert all(torch.isfinite(w).all() for w in weights(tmp_path, 4).values())


def test_too_many_skips_in_a_row_stop_the_run(tmp_path):
    path = config_file(tmp_path)
    flags = ["train.max_skips=3", "checkpoint.every=2"]
    assert run_ranks(poisoned, 2, path, (3, 4, 5, 6), *flags, timeout=120) == [93, 93]
    stop = [event for event in events(tmp_path) if event["event"] == "STOP"]
    assert stop[-1] | {"time": 0} == {
        "time": 0,
        "event": "STOP",
        "step": 5,
        "reason": "nonfinite_gradients",
        "in_a_row": 3,
        "last_good": "step_00000002",
    }


def interrupted(path: str, number: int) -> int:
    """Rank 0 gets a signal in its third step; rank 1 never sees it."""
    original = pretrain_hope.Run._one_step

    def one_step(self, log, last):
        if self.ranks.rank == 0 and self.step == 2:
            os.kill(os.getpid(), number)
        original(self, log, last)

    pretrain_hope.Run._one_step = one_step
    return run(path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 85), (signal.SIGUSR1, 85)])
def test_a_signal_on_one_rank_stops_all_at_one_step_with_everything_saved(tmp_path, number, code):
    path = config_file(tmp_path)
    codes = run_ranks(interrupted, 2, path, int(number), timeout=120)
    assert codes == [code, code]
    assert metrics(tmp_path)[-1]["step"] == 3
    assert weights(tmp_path, 3)
    assert run_ranks(run, 2, path, timeout=120) == [0, 0]
    assert metrics(tmp_path)[-1]["step"] == 8


def full_disk(path: str, *overrides: str) -> int:
    """A run whose console and logs find no room."""
    with open("/dev/full", "w") as sys.stdout:
        return run(path, *overrides)


def test_logs_and_a_console_without_room_do_not_end_a_run(tmp_path):
    path, folder = config_file(tmp_path), tmp_path / "runs/tiny"
    folder.mkdir(parents=True)
    for name in ("metrics.jsonl", "events.jsonl"):
        (folder / name).symlink_to("/dev/full")
    (folder / "tensorboard").write_text("in the way")
    assert run_ranks(full_disk, 2, path, "log.tensorboard=true", "checkpoint.every=4", timeout=120) == [0, 0]
    (folder / "metrics.jsonl").unlink()
    more = ["train.steps=9", "checkpoint.on_change={train.steps: override}"]
    assert run_ranks(run, 2, path, *more, timeout=120) == [0, 0]
    assert [record["step"] for record in metrics(tmp_path)] == [9]
