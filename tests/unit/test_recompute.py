"""Recomputation repeats the same inner writes: gradients and states to the last bit, with less kept."""

import pytest
import torch
from models import named

from hope.memory.config import MemoryConfig
from hope.memory.delta import DeltaChunk
from hope.model import Model, Slice, next_token_loss
from parallel.layout.memory import StepShape, activation_bytes, build_part


def run(what: str, memory: str, static: str, monkeypatch) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Gradients, and the end state of every inner write in the order they were made."""
    config = named(
        vocab_size=64,
        width=32,
        layers=2,
        heads=2,
        memory=MemoryConfig(memory=memory, static=static, projection_chunk=8, main_chunk=8),
    )
    model = Model(config).initialise(0)
    model.set_recompute(what)
    writes = []
    original = DeltaChunk.write

    def write(self, *args):
        written = original(self, *args)
        writes.append(written.state.weight.detach().clone())
        return written

    with monkeypatch.context() as patch:
        patch.setattr(DeltaChunk, "write", write)
        ids = torch.randint(0, 64, (33, 2), generator=torch.Generator().manual_seed(0))
        next_token_loss(model(ids[:-1])[0], ids[1:]).backward()
    return {n: p.grad for n, p in model.named_parameters()}, writes


@pytest.mark.parametrize(("memory", "static"), [("matrix", "learned"), ("mlp", "learned"), ("matrix", "projected")])
@pytest.mark.parametrize("what", ["block", "memory", "sublayer"])
def test_gradients_and_inner_writes_are_repeated_exactly(what, memory, static, monkeypatch):
    plain, once = run("none", memory, static, monkeypatch)
    again, twice = run(what, memory, static, monkeypatch)
    for name in plain:
        assert torch.equal(plain[name], again[name]), name
    per_layer = len(once) // 2
    first_pass = twice[: len(once)]
    # the backward pass visits the last block first
    second_pass = twice[len(once) + per_layer :] + twice[len(once) : len(once) + per_layer]
    assert len(second_pass) == len(once)
    for a, b, c in zip(once, first_pass, second_pass, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_mlps_alone_repeat_no_write(monkeypatch):
    plain, once = run("none", "matrix", "projected", monkeypatch)
    again, writes = run("mlp", "matrix", "projected", monkeypatch)
    assert len(writes) == len(once)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_less_is_kept():
    config = named(vocab_size=64, width=64, layers=4, heads=2)
    kept = {}
    for what in ("none", "memory", "mlp", "sublayer", "block"):
        shape = StepShape(seq_len=256, micro_batch=2, bf16=True, recompute=what)
        kept[what] = activation_bytes(build_part(config, Slice(0, 4), shape), shape)
    assert kept["block"] < 0.2 * kept["memory"] < 0.2 * kept["none"]
    assert kept["block"] < kept["sublayer"] < 0.2 * kept["none"]
    # each is spared what the other keeps, and both keep the input of a sublayer that is computed again
    inputs = 4 * 3 * 256 * 2 * 64 * 2  # of three sublayers in four blocks, bf16
    assert kept["memory"] + kept["mlp"] < kept["none"] + 2 * inputs
    assert kept["mlp"] < kept["none"] - inputs


@pytest.mark.parametrize(("what", "again"), [("none", []), ("memory", [True]), ("mlp", [False, False])])
def test_what_is_computed_again(what, again, monkeypatch):
    """By whether tokens meet in it: the mixer, or the two levels."""
    found = []

    def counted(sublayer, *given):
        found.append(sublayer.mixes)
        return sublayer(*given)

    monkeypatch.setattr("hope.block._again", counted)
    model = Model(named(vocab_size=64, width=32, layers=1, heads=2)).initialise(0)
    model.set_recompute(what)
    model(torch.zeros(8, 1, dtype=torch.long))
    assert found == again
