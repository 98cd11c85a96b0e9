"""Whole runs on blends, on rows of one document, with stages, and on data that changed."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from multirank import run_ranks
from test_training_run import metrics, run, same_curve
from tiny import config_file, token_set

from hope.stored import manifest

BLEND = (
    "data.sources=[{name: a, train: DIR/train, heldout: DIR/heldout, weight: 3},"
    " {name: b, train: DIR/train_b, heldout: DIR/heldout_b, weight: 1}]"
)


def blend_config(folder: Path) -> tuple[str, list[str]]:
    path = config_file(folder)
    token_set(folder / "train_b", 40, 5)
    token_set(folder / "heldout_b", 20, 6)
    return path, ["data.train=", "data.heldout=", BLEND.replace("DIR", str(folder))]


def extra(folder: Path, step: int, name: str = "tiny") -> dict:
    return manifest.read(folder / "runs" / name / "checkpoints" / f"step_{step:08d}").extra


def test_a_blend_reports_every_source_and_resumes(tmp_path):
    path, blend = blend_config(tmp_path)
    assert run_ranks(run, 1, path, *blend, "run.name=whole", timeout=120) == [0]
    assert run_ranks(run, 1, path, *blend, "run.name=parts", "train.stop_after=4", timeout=120) == [0]
    assert extra(tmp_path, 4, "parts")["consumed"] == {"a": 24, "b": 8}
    assert run_ranks(run, 1, path, *blend, "run.name=parts", timeout=120) == [0]
    assert extra(tmp_path, 8, "parts")["consumed"] == {"a": 48, "b": 16}
    same_curve(metrics(tmp_path, "whole"), metrics(tmp_path, "parts"))
    last = metrics(tmp_path, "whole")[-1]
    assert last["heldout_loss"] == pytest.approx(0.75 * last["heldout_loss.a"] + 0.25 * last["heldout_loss.b"])
    assert last["heldout_loss.a"] != last["heldout_loss.b"]


def test_a_blend_with_other_weights_is_not_resumed(tmp_path, capfd):
    path, blend = blend_config(tmp_path)
    assert run_ranks(run, 1, path, *blend, "train.stop_after=2", timeout=120) == [0]
    assert run_ranks(run, 1, path, *blend, "data.sources[1].weight=2", timeout=120) == [2]
    error = capfd.readouterr().err
    assert "the order of the data would change" in error
    assert re.search(r"data\.sources: checkpoint a 0\.75 .*, b 0\.25 .*, now a 0\.6 ", error)


@pytest.mark.parametrize("documents", ["reset", "doc"])
def test_two_ranks_equal_one_with_every_way_to_treat_documents(tmp_path, documents):
    path = config_file(tmp_path)
    flag = f"data.documents={documents}"
    assert run_ranks(run, 1, path, flag, "run.name=one", "train.micro_batch=8", timeout=120) == [0]
    assert run_ranks(run, 2, path, flag, "run.name=two", "train.micro_batch=1", timeout=120) == [0, 0]
    same_curve(metrics(tmp_path, "one"), metrics(tmp_path, "two"), 5e-5)


def test_stages_keep_tokens_and_order(tmp_path):
    """With rows of 4, then 8, then 16 tokens; a resumed run finds the stage of its step."""
    path = config_file(tmp_path)
    stages = (
        "train.seq_len_stages=[{from_step: 1, seq_len: 4}, {from_step: 4, seq_len: 8}, {from_step: 7, seq_len: 16}]"
    )
    assert run_ranks(run, 1, path, "run.name=plain", timeout=120) == [0]
    assert run_ranks(run, 1, path, stages, "run.name=whole", timeout=120) == [0]
    assert run_ranks(run, 1, path, stages, "run.name=parts", "train.stop_after=4", timeout=120) == [0]
    assert run_ranks(run, 1, path, stages, "run.name=parts", timeout=120) == [0]
    whole, plain = metrics(tmp_path, "whole"), metrics(tmp_path, "plain")
    same_curve(whole, metrics(tmp_path, "parts"))
    assert [r["tokens"] for r in whole] == [r["tokens"] for r in plain]
    assert extra(tmp_path, 8, "whole")["next_batch"] == extra(tmp_path, 8, "plain")["next_batch"]
    assert whole[1]["loss"] != plain[1]["loss"]
    assert whole[0]["heldout_loss"] == plain[0]["heldout_loss"], "evaluation always takes whole windows"


def test_a_missing_required_index_is_a_config_error_with_the_command(tmp_path, capsys):
    path = config_file(tmp_path)
    assert run(path, "data.index=require") == 2
    error = capsys.readouterr().err
    assert re.search(r"data\.train .*has no index", error)
    assert "`python -m data_prep index CONFIG`" in error
    assert not (tmp_path / "runs").exists()


def test_data_changed_under_its_name_is_refused_before_the_first_step(tmp_path, capfd):
    path = config_file(tmp_path)
    tokens = np.memmap(tmp_path / "train.bin", dtype="<u2", mode="r+")
    tokens[10] ^= 1
    tokens.flush()
    assert run_ranks(run, 1, path, timeout=120) == [2]
    assert "train.bin: sha256" in capfd.readouterr().err
    assert not (tmp_path / "runs/tiny/metrics.jsonl").exists()


@pytest.mark.parametrize("documents", ["carry", "reset", "doc"])
def test_a_set_without_documents_is_refused_by_name(tmp_path, capsys, documents):
    """megatron-core loops for ever on one."""
    path = config_file(tmp_path)
    token_set(tmp_path / "empty", 0, 0)
    for key in ("train", "heldout"):
        assert run(path, f"data.{key}={tmp_path}/empty", f"data.documents={documents}") == 2
        error = re.sub(r"\s+", " ", capsys.readouterr().err)
        assert re.search(rf"data\.{key} .*empty\.idx: 0 documents, 0 tokens; need at least one", error)
    assert not (tmp_path / "runs").exists()


BAD = [
    (["data.train=x"], r"data\.train .*is set beside data\.sources"),
    (["data.sources[1].name=a"], r"data\.sources\[1\]\.name .*'a' is taken"),
    (["data.sources[0].name=a/b"], r"data\.sources\[0\]\.name .*'a/b' is not a name"),
    (["data.sources[0].weight=0"], r"data\.sources\[0\]\.weight .*0\.0 is not a share"),
    (["data.sources[0].weigth=2"], r"data\.sources\[0\]\.weigth .*unknown key"),
    (["data.sources[1].train=/nowhere/b"], r"data\.sources\[1\]\.train .*/nowhere/b\.idx: no such file"),
    (
        ["data.sources[1].heldout=${data.sources[0].train}"],
        r"\[1\]\.heldout .*same tokens as data\.sources\[0\]\.train",
    ),
    (["data.sources=three"], r"data\.sources .*'three' is not a list"),
    (["train.seq_len_stages=[{from_step: 1, seq_len: 5}]"], r"stages\[0\]\.seq_len .*5 does not divide .* 4, 8"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[c[0][0][:30] for c in BAD])
def test_a_bad_blend_is_refused_with_a_message(tmp_path, capsys, overrides, message):
    path, blend = blend_config(tmp_path)
    assert run(path, *blend, *overrides) == 2
    error = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert re.search(message, error), error
    torch.set_num_threads(2)
