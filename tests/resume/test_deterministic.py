"""`train.deterministic`: two runs are the same run; on a GPU attention is what would part them."""

import functools
import json
import os
from pathlib import Path

import pytest
import torch
from multirank import run_ranks
from tiny import config_file

import pretrain_hope
from hope.train.config import TrainConfig
from hope.train.numerics import set_numerics

# A size at which attention's backward pass on an H200, left to itself, parts two runs at their first gradient norm. (At
# width 256 and micro-batches of 4 it did not.)
WIDE = ["model.width=384", "model.heads=6", "model.layers=4", "train.seq_len=1024", "train.global_batch=32",
        "train.micro_batch=32", "train.steps=6", "train.precision=bf16", "train.eval_windows=32"]  # fmt: skip
WIDE_CHUNKS = ["model.mixers.hope.projection_chunk=128", "model.mixers.hope.main_chunk=128"]
NARROW = ["train.steps=4"]


def run(path: str, name: str, deterministic: bool, kind: str) -> bool:
    """Whether torch was told."""
    torch.set_num_threads(1)
    size = WIDE if torch.cuda.is_available() else NARROW
    if size is WIDE and kind == "hope":
        size = [*WIDE, *WIDE_CHUNKS]
    one_level = ["model.cms.periods=[1]"] if kind == "transformer" else []
    flags = [f"run.name={name}", *one_level, f"train.deterministic={deterministic}"]
    assert pretrain_hope.main([path, *size, *flags]) == 0
    return torch.are_deterministic_algorithms_enabled()


def curve(folder: Path, name: str) -> list[tuple]:
    records = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records]


@pytest.mark.parametrize("kind", ["transformer", "hope_attention", "hope"])
def test_the_same_run_twice_is_equal_to_the_last_bit(tmp_path, kind):
    path = config_file(tmp_path, "matrix" if kind == "hope" else "attention", documents=(1200, 1200))
    go = functools.partial(run_ranks, run, 1, path, timeout=120)
    assert go("a", True, kind) == [True]
    assert go("b", True, kind) == [True]
    assert len(curve(tmp_path, "a")) > 4
    assert curve(tmp_path, "a") == curve(tmp_path, "b")
    if not torch.cuda.is_available():  # a CPU's kernels repeat themselves anyway, and are the same ones
        assert go("c", False, kind) == [False]
        assert curve(tmp_path, "a") == curve(tmp_path, "c")


@pytest.fixture
def numerics_as_before(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that what a test leaves is taken back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    deterministic, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


def test_settings_reach_torch(numerics_as_before):
    sizes = {"steps": 1, "seq_len": 16, "global_batch": 1, "micro_batch": 1}
    torch.set_float32_matmul_precision("highest")
    set_numerics(TrainConfig(**sizes))
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    set_numerics(TrainConfig(**sizes, precision="bf16", deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "high"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_workspace_that_the_user_chose_stays(numerics_as_before, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_numerics(TrainConfig(steps=1, seq_len=16, global_batch=1, micro_batch=1, deterministic=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
