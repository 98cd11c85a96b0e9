"""Save and resume with the model divided over pipeline and tensor ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hope_run import LayoutRun, model_config
from multirank import run_ranks

from parallel.errors import CheckpointError
from parallel.groups import start
from parallel.resume import resume_run, save_run
from parallel.topology import ParallelConfig

PP2 = ParallelConfig(pipeline=2)
INTERLEAVED = ParallelConfig(pipeline=2, virtual_pipeline=2)
TP2_PP2 = ParallelConfig(tensor=2, pipeline=2)
EXTRA = {"order": {"seed": 1}, "next_batch": "ab12"}


def resume(run: LayoutRun, folder: Path) -> int:
    loaded = resume_run(folder, run.ranks, run.models, run.optimizer, {"seed": 1}, lambda step: "ab12")
    assert loaded is not None
    return loaded.step


def save_and_go_on(layout: ParallelConfig, precision: str, folder: Path) -> tuple[list[float], dict, int]:
    with start(layout, timeout_s=60) as ranks:
        run = LayoutRun(ranks, layout, model_config(), precision)
        run.train(range(2))
        size = save_run(folder, 2, ranks, run.models, run.optimizer, EXTRA, keep=1)
        return run.train(range(2, 4)), run.weights(), size


def go_on(layout: ParallelConfig, precision: str, folder: Path) -> tuple[list[float], dict, int]:
    with start(layout, timeout_s=60) as ranks:
        run = LayoutRun(ranks, layout, model_config(), precision)
        run.train(range(6, 7))  # other weights and states than at the start, so that loading has to replace them
        step = resume(run, folder)
        return run.train(range(2, 4)), run.weights(), step


@pytest.mark.parametrize(
    ("layout", "world", "precision"),
    [(PP2, 2, "fp32"), (PP2, 4, "bf16"), (INTERLEAVED, 2, "fp32"), (TP2_PP2, 4, "fp32")],
)
def test_resume_is_bit_equal(tmp_path: Path, layout: ParallelConfig, world: int, precision: str) -> None:
    straight = run_ranks(save_and_go_on, world, layout, precision, tmp_path, timeout=120)
    resumed = run_ranks(go_on, world, layout, precision, tmp_path, timeout=120)
    for (losses, weights, _), (losses2, weights2, step) in zip(straight, resumed, strict=True):
        assert step == 2
        assert losses == losses2
        assert weights.keys() == weights2.keys()
        assert all(torch.equal(weights[name], weights2[name]) for name in weights)


def refusal(layout: ParallelConfig, folder: Path) -> str:
    with start(layout, timeout_s=60) as ranks:
        run = LayoutRun(ranks, layout, model_config(), "fp32")
        with pytest.raises(CheckpointError) as error:
            resume(run, folder)
        return str(error.value)


def test_files_and_other_layouts(tmp_path: Path) -> None:
    sizes = [size for _, _, size in run_ranks(save_and_go_on, 4, PP2, "fp32", tmp_path, timeout=120)]
    folder = tmp_path / "step_00000002"
    parts = [f"model_tp00_pp{stage:02d}.pt" for stage in (0, 1)]
    shards = [f"optimizer_tp00_pp{stage:02d}_{data:05d}.pt" for stage in (0, 1) for data in (0, 1)]
    assert sorted(os.listdir(folder)) == ["meta.json", *parts, *shards]
    assert sizes == [sum(file.stat().st_size for file in folder.iterdir()), 0, 0, 0]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["layout"] == {"tensor": 1, "pipeline": 2, "virtual_pipeline": 1, "data": 2}
    first, last = (torch.load(folder / part, weights_only=True) for part in parts)
    assert {name.split(".")[1] for name in first if "blocks" in name} == {"0", "1", "2"}
    assert {name.split(".")[1] for name in last if "blocks" in name} == {"3", "4"}
    assert meta["parameters"][parts[1]] == {name: list(tensor.shape) for name, tensor in last.items()}
    assert torch.equal(first["embedding.weight"], last["embedding.weight"])  # tied
    saved = "was saved in the layout tensor 1 x pipeline 2 x virtual_pipeline 1 x data 2, and this run has"
    for layout, world, own in (
        (PP2, 2, "tensor 1 x pipeline 2 x virtual_pipeline 1 x data 1"),
        (INTERLEAVED, 4, "tensor 1 x pipeline 2 x virtual_pipeline 2 x data 2"),
        (ParallelConfig(), 1, "tensor 1 x pipeline 1 x virtual_pipeline 1 x data 1"),
    ):
        for message in run_ranks(refusal, world, layout, tmp_path, timeout=60):
            assert f"{folder} {saved} {own}; resume in the layout that saved it" in message
