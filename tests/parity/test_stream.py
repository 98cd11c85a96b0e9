"""`data.documents: stream`: the state goes on from step to step, in every layout, and through checkpoints."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import named
from multirank import run_ranks
from tiny import config_file

import pretrain_hope
from configs.schema import load
from data_prep.training.index_store import open_store
from data_prep.training.order import LaneOrder
from hope.config import CmsConfig, ModelConfig
from hope.memory.config import MemoryConfig
from hope.memory.in_context_config import InContextConfig
from hope.mixers.attention import AttentionConfig
from hope.mixers.base import tensors_of
from hope.model import Model, next_token_loss
from hope.stored import manifest
from hope.stored.folders import step_folder
from hope.stored.tensors import read_tensor
from parallel.compute.stream import CarriedStates, leaves, rewritten

STREAM = "data.documents=stream"


def model_config(kind: str) -> ModelConfig:
    sizes = {"vocab_size": 32, "width": 16, "layers": 2, "heads": 2}
    if kind == "attention":
        return ModelConfig(pattern=["attention"], mixers={"attention": AttentionConfig(window=7)}, **sizes)
    if kind == "linear":
        return ModelConfig(pattern=["linear"], **sizes)
    if kind in LEVELS:
        fast = [InContextConfig(chunk=chunk, rate=0.5) for chunk in (4, 8)]
        return ModelConfig(pattern=["linear"], cms=CmsConfig(kind, in_context=fast), **sizes)
    memory, projection_chunk = kind.split()
    section = MemoryConfig(memory=memory, projection_chunk=int(projection_chunk), main_chunk=8)
    return named("hope", memory=section, **sizes)


LEVELS = ("sequential", "independent", "nested")
"""How levels in context are put together."""
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["matrix 8", "matrix 4", "mlp 4", "linear", "attention", *LEVELS])
def test_steps_equal_one_long_sequence_with_its_past_detached(kind):
    """Float64, two micro-batches of four steps of 13 tokens, a length that no chunk divides. Outputs are those of one
    call over all tokens; gradients those of one call over the whole past without any, and one with."""
    length, rows, steps = 13, 2, 4
    model = Model(model_config(kind)).double().initialise(3)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (2, steps * length + 1, rows), generator=generator)
    carried = CarriedStates([model])
    found: list[list[torch.Tensor]] = [[], []]
    for step in range(steps):
        at = slice(step * length, (step + 1) * length)
        carried.begin()
        model.zero_grad()
        for micro in range(2):
            hidden = carried.trunk(model, tokens[micro, at], None)
            scores = model.vocabulary.logits(hidden)
            next_token_loss(scores, tokens[micro, 1:][at]).backward()
            found[micro].append(scores.detach())
        carried.keep(True)
        own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        for micro in range(2):
            state = None
            if step:
                with torch.no_grad():
                    _, state = model(tokens[micro, : at.start])
            scores, _ = model(tokens[micro, at], state)
            next_token_loss(scores, tokens[micro, 1:][at]).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(own[name], parameter.grad, rtol=1e-9, atol=1e-12)
    for micro in range(2):
        whole, _ = model(tokens[micro, :-1])
        torch.testing.assert_close(torch.cat(found[micro]), whole, rtol=1e-9, atol=1e-10)


def test_a_step_that_is_not_kept_leaves_the_states():
    model = Model(model_config("matrix 8")).initialise(3)
    carried = CarriedStates([model])
    tokens = torch.arange(26).view(13, 2) % 32
    one = lambda: (carried.begin(), carried.trunk(model, tokens, None))[1]
    fresh = one()
    carried.keep(False)
    assert carried.kept is None
    assert torch.equal(one(), fresh)
    carried.keep(True)
    second = one()
    assert not torch.equal(second, fresh)
    carried.keep(False)
    assert torch.equal(one(), second)
    with pytest.raises(ValueError, match="more than the 1 micro-batches"):
        carried.trunk(model, tokens, None)
    assert all(not t.requires_grad for states in carried.kept[0] for t in tensors_of(tuple(states.values())))


def test_banks_that_share_their_states_go_on_to():
    model = Model(model_config("matrix 8"))
    state = model.trunk(torch.zeros(8, 2, dtype=torch.long))[1][0][0]
    assert state.projections is state.main
    copy = rewritten(state, lambda leaf: leaf)
    assert copy.projections is copy.main
    assert len(list(leaves(state))) == len(list(leaves(copy)))


def run(path: str, *words: str) -> int:
    torch.set_num_threads(1)
    return pretrain_hope.main([path, STREAM, *words])


def records(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, name: str) -> list[float]:
    return [record["loss"] for record in records(folder, name) if record["step"]]


def tensors(folder: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    path = step_folder(folder / "runs" / name / "checkpoints", step)
    found = manifest.read(path)
    assert found.carried_memory_state.startswith("carried")
    return {key: read_tensor(path, entry).clone() for key, entry in found.tensors.items() if "rng/" not in key}


def test_a_run_is_plain_torch_over_the_file(tmp_path):
    """The loss of every step from the weights before it, windows cut from the file here, states carried here."""
    path = config_file(tmp_path)
    assert run_ranks(run, 1, path, "checkpoint.every=1", "checkpoint.keep=9", timeout=120) == [0]
    config, store = load(path, []), open_store(str(tmp_path / "train"))
    text, n = torch.from_numpy(store.read(0, store.tokens).astype(np.int64)), (store.tokens - 1) // 16
    first = LaneOrder(n, 8, config.data.seed).first
    model, states = Model(config.model).initialise(config.run.seed), None
    for step, loss in enumerate(losses(tmp_path, "tiny")):
        if step:
            before = tensors(tmp_path, step, "tiny")
            model.load_state_dict({name: before[f"master/{name}"] for name, _ in model.named_parameters()})
        begins = [(first + lane * n // 8 + step) % n * 16 for lane in range(8)]
        window = torch.stack([text[begin : begin + 17] for begin in begins], 1)
        with torch.no_grad():
            scores, states = model(window[:-1], states)
        assert loss == pytest.approx(next_token_loss(scores, window[1:]).item(), rel=2e-6)
        fresh = next_token_loss(model(window[:-1])[0], window[1:]).item()
        assert step == 0 or abs(fresh - loss) > 1e-5  # the state matters


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (2, []),
        slow(1, ["train.micro_batch=8"]),
        slow(2, ["parallel.tensor=2"]),
        slow(2, ["parallel.tensor=2", "parallel.sequence=true"]),
        slow(2, ["parallel.pipeline=2"]),
        (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.layers=4"]),
        slow(1, ["train.recompute=block"]),
    ],
)
def test_layouts_equal_one_device(tmp_path, ranks, words):
    path = config_file(tmp_path)
    layers = [word for word in words if "layers" in word]
    assert run_ranks(run, 1, path, "run.name=one", *layers, timeout=120) == [0]
    assert run_ranks(run, ranks, path, "run.name=cut", *words, timeout=120) == [0] * ranks
    assert losses(tmp_path, "cut") == pytest.approx(losses(tmp_path, "one"), rel=2e-5)
    held = [[r["heldout_loss"] for r in records(tmp_path, name) if "heldout_loss" in r] for name in ("cut", "one")]
    assert held[0] == pytest.approx(held[1], rel=2e-5)


@pytest.mark.parametrize("memory", ["matrix", slow("attention"), slow("linear"), *map(slow, LEVELS)])
@pytest.mark.parametrize(
    ("ranks", "layout"), [(1, []), slow(2, ["parallel.tensor=2"]), slow(2, ["parallel.pipeline=2"])]
)
def test_a_resumed_run_is_the_run_to_the_last_bit(tmp_path, memory, ranks, layout):
    """With windows of 18 tokens no chunk ends with a step, so that tokens are pending; attention's window of 40 is
    still filling when the run stops."""
    path = config_file(tmp_path, "attention" if memory == "attention" else "matrix")
    words = [*layout, "train.seq_len=18"]
    words += ["model.mixers.attention.window=40"] if memory == "attention" else []
    if memory in LEVELS:
        words += ["model.cms.in_context=[{chunk: 4}, {chunk: 8}]", f"model.cms.variant={memory}"]
    if memory == "linear":
        path = str(tmp_path / "linear.yaml")
        text = (tmp_path / "tiny.yaml").read_text().splitlines()
        lines = ["  pattern: [linear]" if "mixers:" in line else line for line in text]
        Path(path).write_text("\n".join(lines))
    assert run_ranks(run, ranks, path, "run.name=whole", *words, timeout=120) == [0] * ranks
    for stop in ("train.stop_after=1", "train.stop_after=3", "train.stop_after=0"):
        assert run_ranks(run, ranks, path, "run.name=parts", stop, *words, timeout=120) == [0] * ranks
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")
    whole, parts = (tensors(tmp_path, 8, name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert any(name.startswith("stream/") for name in whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_goes_on_in_another_layout(tmp_path, capfd):
    """Saved by two data ranks, resumed by one with other micro-batches and by two stages; other tensor ranks are
    refused, and so are windows that do not follow one another."""
    path = config_file(tmp_path)
    assert run_ranks(run, 1, path, "run.name=one", timeout=120) == [0]
    for name, ranks, words in (("a", 1, ["train.micro_batch=4"]), ("b", 2, ["parallel.pipeline=2"])):
        assert run_ranks(run, 2, path, f"run.name={name}", "train.stop_after=4", timeout=120) == [0, 0]
        assert run_ranks(run, ranks, path, f"run.name={name}", *words, timeout=120) == [0] * ranks
        assert losses(tmp_path, name) == pytest.approx(losses(tmp_path, "one"), rel=2e-5)
    assert run_ranks(run, 1, path, "run.name=c", "train.stop_after=4", timeout=120) == [0]
    assert run_ranks(run, 2, path, "run.name=c", "parallel.tensor=2", timeout=120) == [2, 2]
    assert "were saved by parallel.tensor 1, this run has 2; use parallel.tensor=1" in capfd.readouterr().err
    assert run_ranks(run, 1, path, "run.name=c", "data.documents=carry", timeout=120) == [2]


def test_the_dry_run_says_what_the_states_take(tmp_path, capsys):
    path = config_file(tmp_path)
    assert pretrain_hope.main([path, STREAM, "--dry-run"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stream")]
    assert "GiB of states per rank go on from step to step" in line
