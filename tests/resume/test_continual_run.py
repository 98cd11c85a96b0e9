"""Whole runs of train.mode continual: where every token comes from, resuming in and at a border, layouts, refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from multirank import run_ranks
from test_training_run import events, metrics, run, weights
from tiny import config_file, token_set

import pretrain_hope
from configs.schema import load
from data_prep.training.feed import Feed
from hope.stored import manifest
from hope.train.continual import measures
from hope.train.plot.__main__ import main as plot

NAMES, STEPS = ("a", "b", "c"), {"a": 3, "b": 1, "c": 4}
BORDERS = [(0, 0), (1, 3), (2, 4), (3, 8)]


def continual(folder: Path) -> tuple[str, list[str]]:
    """Three phases of 3, 1 and 4 steps; evaluated every 2."""
    path, sources = config_file(folder), []
    for seed, name in enumerate(NAMES):
        token_set(folder / f"train_{name}", 20 + seed, 10 + seed)
        token_set(folder / f"heldout_{name}", 20, 20 + seed)
        sets = f"train: {folder}/train_{name}, heldout: {folder}/heldout_{name}"
        sources.append(f"{{name: {name}, {sets}, weight: {STEPS[name]}}}")
    flags = ["data.train=", "data.heldout=", f"data.sources=[{', '.join(sources)}]", "train.mode=continual"]
    return path, [*flags, "train.eval_every=2", "log.every=8", "optim.eps=1e-4"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str, list[str]]:
    """A run from end to end on one device: its folder, configuration and flags."""
    folder = tmp_path_factory.mktemp("whole")
    path, flags = continual(folder)
    assert run_ranks(run, 1, path, *flags, "run.name=whole", timeout=120) == [0]
    return folder, path, flags


def last_extra(folder: Path, name: str) -> dict:
    return manifest.read(folder / "runs" / name / "checkpoints" / "step_00000008").extra


def at_borders(folder: Path, name: str) -> list[dict]:
    return [record for record in metrics(folder, name) if "phase" in record]


def raw(folder: Path, first: int) -> str:
    """A raw set of the token ids `first` to `first + 19`, which no other source has."""
    folder.mkdir()
    np.save(folder / "0.npy", (first + np.random.default_rng(first).integers(0, 20, 500)).astype(np.uint16))
    (folder / "raw.json").write_text('{"eos_id": 1, "vocab_size": 64}')
    return str(folder)


@pytest.mark.parametrize("size", [1, 2])
def test_every_token_of_a_phase_is_of_its_source(tmp_path, size):
    """On every data-parallel rank, and asked for in any order: step 8 first."""
    path, flags = continual(tmp_path)
    first = {"a": 2, "b": 22, "c": 42}
    flags += [f"data.sources[{i}].train={raw(tmp_path / f'raw_{n}', first[n])}" for i, n in enumerate(NAMES)]
    config = load(path, flags, world_size=1)
    for rank in range(size):
        feed, found = Feed(config.data, config.train, rank, size), {}
        for step in (8, *range(1, 8)):
            tokens = torch.cat([batch.tokens_TB.flatten() for batch in feed.batches(step)])
            assert len(tokens) == 8 * 16 // size
            found[step] = "".join(n for n in NAMES if ((tokens - first[n] >= 0) & (tokens - first[n] < 20)).any())
        feed.close()
        assert [found[step] for step in range(1, 9)] == [*"aaa", "b", *"cccc"]
        assert feed.position(3)["consumed"] == {"a": 24, "b": 0, "c": 0}
        assert feed.position(8)["consumed"] == {"a": 24, "b": 8, "c": 32}


@pytest.mark.parametrize("at", [pytest.param(n, marks=() if n == 6 else pytest.mark.slow) for n in (2, 3, 4, 6)])
def test_a_run_resumed_in_a_phase_or_at_a_border_is_the_same_to_the_bit(whole, at):
    folder, path, flags = whole
    name = f"stopped_at_{at}"
    assert run_ranks(run, 1, path, *flags, f"run.name={name}", f"train.stop_after={at}", timeout=120) == [0]
    assert run_ranks(run, 1, path, *flags, f"run.name={name}", timeout=120) == [0]
    records = metrics(folder, "whole")
    assert [record["step"] for record in records if "heldout_loss" in record] == [0, 2, 3, 4, 6, 8]
    told = lambda records: [
        {key: value for key, value in r.items() if key.startswith(("heldout", "continual", "loss", "phase"))}
        for r in records
        if r["step"] in (0, 2, 3, 4, 6, 8)
    ]
    assert told(records) == told(metrics(folder, name))
    assert last_extra(folder, "whole")["next_batch"] == last_extra(folder, name)["next_batch"]
    phases = [(e["phase"], e["source"], e["step"]) for e in events(folder, name) if e["event"] == "PHASE"]
    assert phases == [(1, "a", 3), (2, "b", 4), (3, "c", 8)]


def test_the_matrix_of_a_run_is_in_its_metrics_and_its_picture(whole, tmp_path, capsys):
    folder, _, _ = whole
    borders = at_borders(folder, "whole")
    assert [(r["phase"], r["step"]) for r in borders] == BORDERS
    rows = [{name: record[f"continual.loss.{name}"] for name in NAMES} for record in borders]
    assert rows == [{name: record[f"heldout_loss.{name}"] for name in NAMES} for record in borders]
    assert len({value for row in rows for value in row.values()}) == 12
    assert last_extra(folder, "whole")["course"] == rows
    expected = measures(NAMES, rows, rows[-1], 2)
    told = {k: v for k, v in borders[-1].items() if k.startswith("continual.") and ".loss." not in k}
    assert told == expected
    assert expected["continual.backward_transfer.a"] == rows[1]["a"] - rows[3]["a"]
    share = (rows[1]["b"] - rows[3]["b"]) / (rows[1]["b"] - rows[2]["b"])
    assert expected["continual.retained.b"] == pytest.approx(share)
    assert plot([str(folder / "runs/whole"), "--matrix", "--out", str(tmp_path / "matrix")]) == 0
    picture = (tmp_path / "matrix.svg").read_text()
    assert all(f">{value:.3f}<" in picture for row in rows for value in row.values())
    assert all(f">{value:.3f}<" in picture for value in expected.values())
    assert (tmp_path / "matrix.png").stat().st_size > 1000
    assert f"{expected['continual.retained']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "layout", ["data", pytest.param("tensor", marks=pytest.mark.slow), pytest.param("pipeline", marks=pytest.mark.slow)]
)
def test_two_ranks_equal_one_device(whole, layout):
    folder, path, flags = whole
    more = [] if layout == "data" else [f"parallel.{layout}=2"]
    assert run_ranks(run, 2, path, *flags, *more, f"run.name={layout}", timeout=100) == [0, 0]
    one, two = metrics(folder, "whole"), metrics(folder, layout)
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        keys = [key for key in a if key.startswith(("heldout_loss", "continual.loss"))]
        assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], rel=2e-5)
    assert last_extra(folder, "whole")["next_batch"] == last_extra(folder, layout)["next_batch"]


@pytest.mark.slow
def test_the_last_phase_can_be_made_longer_and_an_earlier_one_cannot(tmp_path, capfd):
    path, flags = continual(tmp_path)
    assert run_ranks(run, 1, path, *flags, "train.stop_after=6", "optim.decay=constant", timeout=120) == [0]
    change = ["optim.decay=constant", "checkpoint.on_change={data: override, train: override}"]
    earlier = ["train.steps=9", "data.sources[1].weight=2"]
    assert run_ranks(run, 1, path, *flags, *change, *earlier, timeout=120) == [2]
    assert "the order of the data would change" in capfd.readouterr().err
    longer = ["train.steps=10", "data.sources[2].weight=6"]
    assert run_ranks(run, 1, path, *flags, *change, *longer, timeout=120) == [0]
    assert (metrics(tmp_path)[-1]["phase"], metrics(tmp_path)[-1]["step"]) == (3, 10)


def test_one_level_learns_two_sources_while_the_rest_is_frozen(whole):
    """From an earlier run's weights; begun on two devices, in the middle of the second phase resumed on one.

    The same level of the other block is frozen, and gradients of this one wait on their rank for step 3.
    """
    folder, path, flags = whole
    sets = [f"{{name: {n}, train: {folder}/train_{n}, heldout: {folder}/heldout_{n}}}" for n in "bc"]
    frozen = "optim.groups=[{match: 'blocks.1.cms.levels.1.*'}, {match: '*', rate: 0}]"
    more = [*flags, f"data.sources=[{', '.join(sets)}]", frozen, "optim.accumulate=local", "run.name=frozen"]
    more += [f"model.init={folder}/runs/whole", "optim.weight_decay=0.5"]
    assert run_ranks(run, 2, path, *more, "train.stop_after=5", timeout=120) == [0, 0]
    assert metrics(folder, "frozen")[1]["reduced_bytes"] == 0  # of step 1
    assert run_ranks(run, 1, path, *more, timeout=120) == [0]
    start, end = weights(folder, 8, "whole"), weights(folder, 8, "frozen")
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {name for name in start if name.startswith("blocks.1.cms.levels.1.")}
    saved = manifest.read(folder / "runs/frozen/checkpoints/step_00000008").tensors
    states = {name.partition("/")[2] for name in saved if name.startswith(("memory/", "square/", "accumulator/"))}
    assert states == moved
    assert [r["step"] for r in at_borders(folder, "frozen")] == [0, 4, 8]
    last = metrics(folder, "frozen")[-1]
    assert (last["clock.base.group1"], last["clock.cms1.group0"]) == (8, 8)
    assert last["continual.loss.b"] != metrics(folder, "frozen")[0]["continual.loss.b"]


@pytest.mark.slow
@pytest.mark.parametrize("more", ["train.precision=bf16", "parallel.pipeline=2", "parallel.tensor=2", "optim.name=m3"])
def test_the_last_block_learns_alone(whole, more):
    """With pipeline 2 the first stage is frozen as a whole."""
    folder, path, flags = whole
    frozen = "optim.groups=[{match: 'blocks.1.*'}, {match: '*', rate: 0}]"
    flags = [*flags, frozen, more, f"run.name={more}", f"model.init={folder}/runs/whole"]
    assert run_ranks(run, 2, path, *flags, "checkpoint.every=4", timeout=120) == [0, 0]
    start, end = weights(folder, 4, more), weights(folder, 8, more)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {name for name in start if name.startswith("blocks.1.")}
    assert metrics(folder, more)[-1]["loss"] > 0


def interrupted(path: str, *overrides: str) -> int:
    """A run that is told to stop during the evaluation at the first border."""
    original = pretrain_hope.heldout_losses
    begun: list[int] = []

    def losses(*args):
        begun.append(0)
        return None if len(begun) == 3 else original(*args)  # after steps 0, 2 and 3

    pretrain_hope.heldout_losses = losses
    return run(path, *overrides)


def test_a_border_whose_evaluation_was_broken_off_is_made_up_for(whole, tmp_path):
    folder, path, flags = whole
    flags = [*flags, "run.name=broken"]
    assert run_ranks(interrupted, 1, path, *flags, "train.stop_after=3", timeout=120) == [0]
    assert [r["phase"] for r in at_borders(folder, "broken")] == [0]
    assert run_ranks(run, 1, path, *flags, "train.stop_after=4", timeout=120) == [0]
    assert [r["phase"] for r in at_borders(folder, "broken")] == [0, 2]
    found = [e for e in events(folder, "broken") if e["event"] == "PHASE" and "continual.loss.a" in e]
    rows = {r["phase"]: r for r in at_borders(folder, "whole")}
    assert [(e["phase"], e["continual.loss.a"]) for e in found] == [(p, rows[p]["continual.loss.a"]) for p in (1, 2)]
    assert plot([str(folder / "runs/broken"), "--matrix", "--out", str(tmp_path / "matrix.svg")]) == 0
    picture = (tmp_path / "matrix.svg").read_text()
    assert all(f">{rows[p][f'continual.loss.{name}']:.3f}<" in picture for p in (0, 1, 2) for name in NAMES)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.steps=9"], ["train.steps", "9 steps cannot be shared 3 : 1 : 4", "8 or 16"]),
        (["data.sources=[]", "data.train=X", "data.heldout=X"], ["train.mode", "data.sources has 0"]),
        (["train.steps=3"], ["train.steps", "3 steps cannot be shared 3 : 1 : 4", "try: 8; or weights"]),
        (["train.steps=null", "train.tokens=1152"], ["train.tokens", "9 steps cannot be shared", "1024 or 2048"]),
        (["data.documents=stream"], ["data.documents", "stream follows one text", "names 3"]),
        (["train.spike_sigma=6"], ["train.spike_sigma", "every new source", "0; or train.mode=blend"]),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(tmp_path, capfd, overrides, said):
    path, flags = continual(tmp_path)
    words = [word.replace("X", f"{tmp_path}/train") for word in overrides]
    assert run(path, *flags, *words, "--dry-run") == 2
    error = capfd.readouterr().err
    assert all(word in error for word in said), error


def test_a_dry_run_prints_the_phases(tmp_path, capfd):
    path, flags = continual(tmp_path)
    assert run(path, *flags, "--dry-run") == 0
    told = capfd.readouterr().out
    assert "a steps 1 to 3, b steps 4 to 4, c steps 5 to 8" in told
    assert "epochs: a " in told
