"""Save, kill, resume, refuse."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from multirank import RankDied, run_ranks
from toy_run import Run

from parallel import checkpoint
from parallel.errors import CheckpointError
from parallel.groups import start
from parallel.topology import ParallelConfig

EXTRA = {"consumed_samples": 16, "fingerprint": "ab12"}


def save(run: Run, folder: Path, step: int, keep: int = 2) -> Path:
    state = run.model.state_dict() if run.ranks.rank == 0 else None
    return checkpoint.save(folder, step, run.ranks, state, run.optimizer.state_dict(), EXTRA, keep)


def load(run: Run, folder: Path) -> checkpoint.Loaded | None:
    shapes = {name: tuple(tensor.shape) for name, tensor in run.model.state_dict().items()}
    loaded = checkpoint.load(folder, run.ranks, shapes)
    if loaded is not None:
        run.model.load_state_dict(loaded.model)
        run.optimizer.load_state_dict(loaded.shard)
    return loaded


def train_and_save(folder: Path, precision: str, steps: list[int], keep: int = 2) -> list[str]:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        run = Run(ranks, precision)
        done = 0
        for step in steps:
            run.train(range(done, step))
            save(run, folder, step, keep)
            done = step
        return sorted(os.listdir(folder))


def go_on(folder: Path, precision: str, resume: bool) -> tuple[list[float], dict, dict, dict | None]:
    """Steps 2 and 3: after a resume, or at the end of an uninterrupted run."""
    with start(ParallelConfig(), timeout_s=30) as ranks:
        run = Run(ranks, precision)
        if not resume:
            run.train(range(2))
            losses = run.train(range(2, 4), 0.7)
            return losses, run.parameters(), run.optimizer.state_dict(), None
        run.train(range(7, 9))  # other weights and states than at the start, so that loading has to replace them
        run.optimizer.set_lr(9.0)
        loaded = load(run, folder)
        assert loaded is not None
        losses = run.train(range(2, 4), 0.7)
        return losses, run.parameters(), run.optimizer.state_dict(), {"step": loaded.step, **loaded.extra}


@pytest.mark.parametrize(("precision", "ranks"), [("fp32", 2), ("bf16", 2), ("fp32", 1)])
def test_resume_is_bit_equal(tmp_path: Path, precision: str, ranks: int) -> None:
    names = run_ranks(train_and_save, ranks, tmp_path, precision, [2])[0]
    assert names == ["latest", "step_00000002"]
    straight = run_ranks(go_on, ranks, tmp_path, precision, False)
    resumed = run_ranks(go_on, ranks, tmp_path, precision, True)
    for (losses, parameters, states, _), (losses2, parameters2, states2, extra) in zip(straight, resumed, strict=True):
        assert losses == losses2
        assert all(torch.equal(parameters[name], parameters2[name]) for name in parameters)
        assert_same(states, states2)
        assert extra == {"step": 2, **EXTRA}
    odd = straight[0][2]["optimizer"]["state"][0]["odd"]
    assert odd.dtype == torch.int64
    assert odd.shape == (3, 5)


def assert_same(a: Any, b: Any) -> None:
    """Equal bit for bit, types included."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def refusal(folder: Path, dim: int) -> str:
    with start(ParallelConfig(), timeout_s=30) as ranks, pytest.raises(CheckpointError) as error:
        load(Run(ranks, dim=dim), folder)
    return str(error.value)


def test_another_size_or_model_is_refused(tmp_path: Path) -> None:
    run_ranks(train_and_save, 2, tmp_path, "fp32", [1])
    for message in run_ranks(refusal, 4, tmp_path, 10):
        assert (
            "was saved in the layout tensor 1 x pipeline 1 x virtual_pipeline 1 x data 2, and this run has" in message
        )
        assert "this run has tensor 1 x pipeline 1 x virtual_pipeline 1 x data 4; resume in the layout" in message
        assert str(tmp_path / "step_00000001") in message
    for message in run_ranks(refusal, 2, tmp_path, 12):
        assert "belongs to another model, 6 tensors differ" in message
        assert "emb.weight: checkpoint (31, 10), model (31, 12)" in message


def states_alone(precision: str) -> tuple[dict, dict]:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        run, other = Run(ranks, precision), Run(ranks, precision)
        run.train(range(2))
        other.optimizer.load_state_dict(run.optimizer.state_dict())
        return run.parameters(), other.parameters()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_masters_alone_bring_back_the_parameters(precision: str) -> None:
    for parameters, restored in run_ranks(states_alone, 2, precision):
        assert_same(parameters, restored)


def shard_refusal() -> list[str]:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        run = Run(ranks)
        good = run.optimizer.state_dict()
        layout = [[("emb.weight", 7), *group[1:]] if i == 0 else group for i, group in enumerate(good["layout"])]
        messages = []
        for change in ({"dp_size": 3}, {"dp_rank": 1 - ranks.dp_rank}, {"layout": layout}):
            with pytest.raises(CheckpointError) as error:
                run.optimizer.load_state_dict({**good, **change})
            messages.append(str(error.value))
        return messages


def test_the_optimizer_itself_refuses_a_wrong_shard() -> None:
    for size, _rank, layout in run_ranks(shard_refusal, 2):
        assert "data-parallel size 3, and this run has 2" in size
        assert "('emb.weight', 7), ('emb.weight', 310)" in layout


def killed_while_saving(folder: Path, when: str) -> None:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        run = Run(ranks)
        run.train(range(1))
        save(run, folder, 1)
        run.train(range(1, 2))
        replace = os.replace

        def die(source: Path, target: Path) -> None:
            if when == "before" or Path(source).name == "latest.tmp":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        checkpoint.os.replace = die
        save(run, folder, 2)


def resumed_step(folder: Path) -> tuple[int, list[str]] | None:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        loaded = load(Run(ranks), folder)
        return (loaded.step, loaded.notes) if loaded else None


@pytest.mark.parametrize(("when", "step"), [("before", 1), ("between", 2)])
def test_a_kill_while_saving_leaves_the_last_complete_one(tmp_path: Path, when: str, step: int) -> None:
    with pytest.raises(RankDied, match="rank 0 ended without a result: SIGKILL"):
        run_ranks(killed_while_saving, 2, tmp_path, when)
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    assert (tmp_path / "step_00000002.tmp").exists() == (when == "before")
    for found, notes in run_ranks(resumed_step, 2, tmp_path):
        assert found == step
        assert notes == (["skipped step_00000002.tmp: the run was killed while saving it"] if when == "before" else [])
    run_ranks(train_and_save, 2, tmp_path, "fp32", [2])  # saving the same step again works
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001", "step_00000002"]


def test_damaged_ones_are_skipped_and_named(tmp_path: Path) -> None:
    assert run_ranks(resumed_step, 1, tmp_path) == [None]
    run_ranks(train_and_save, 2, tmp_path, "fp32", [1, 2, 3], 3)
    shard = tmp_path / "step_00000003" / "optimizer_00001.pt"
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    (tmp_path / "step_00000002" / "meta.json").unlink()
    for step, notes in run_ranks(resumed_step, 2, tmp_path):
        assert step == 1
        assert notes[0] == f"skipped step_00000003: optimizer_00001.pt has {size - 1} bytes of {size}"
        assert notes[1].startswith("skipped step_00000002: ")


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run_ranks(train_and_save, 2, tmp_path, "fp32", [1, 2, 3, 4], 2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000003", "step_00000004"]
    assert (tmp_path / "latest").read_text() == "step_00000004\n"
    meta = json.loads((tmp_path / "step_00000004" / "meta.json").read_text())
    assert meta["layout"] == {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "data": 2}
    assert meta["parameters"]["model.pt"]["down.weight"] == [10, 30]
    assert meta["extra"] == EXTRA


def failed_write(folder: Path, bad_rank: int) -> str:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        run = Run(ranks)
        save(run, folder, 1)

        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        if ranks.rank == bad_rank:
            checkpoint.os.fsync = full
        with pytest.raises(CheckpointError) as error:
            save(run, folder, 2)
        return str(error.value)


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_full_disk_on_one_rank_fails_on_all_and_leaves_nothing(tmp_path: Path, bad_rank: int) -> None:
    messages = run_ranks(failed_write, 2, tmp_path, bad_rank)
    assert "No space left on device" in messages[bad_rank]
    assert "failed on another rank" in messages[1 - bad_rank]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001"]


def unpickling(folder: Path) -> str:
    with start(ParallelConfig(), timeout_s=30) as ranks:
        with pytest.raises(CheckpointError) as error:
            load(Run(ranks), folder)
        return str(error.value)


def test_a_file_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    run_ranks(train_and_save, 1, tmp_path, "fp32", [1])
    folder, witness = tmp_path / "step_00000001", tmp_path / "ran"
    torch.save(Evil(witness), folder / "model.pt")
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"]["model.pt"] = (folder / "model.pt").stat().st_size
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "Weights only load failed" in run_ranks(unpickling, 1, tmp_path)[0]
    assert not witness.exists()


class Evil:
    """Creates a file when unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.witness),)
