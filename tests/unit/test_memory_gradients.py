"""Every memory learns through its writes, and writing changes what later tokens read."""

import pytest
import torch
from models import named

from hope.config import CmsConfig
from hope.memory import matrix, mlp
from hope.memory.config import MemoryConfig
from hope.memory.delta import DeltaChunk, DeltaState
from hope.model import Model, next_token_loss

KINDS = ["matrix", "mlp"]


def small(kind: str = "matrix", **changes) -> Model:
    memory = MemoryConfig(memory=kind, projection_chunk=8, main_chunk=8, **changes.pop("memory", {}))
    config = named(vocab_size=64, width=32, layers=2, heads=2, memory=memory, cms=CmsConfig(), **changes)
    return Model(config).initialise(3)


def tokens(length: int = 33, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 64, (length, batch), generator=torch.Generator().manual_seed(0))


def gradients(model: Model) -> dict[str, torch.Tensor]:
    ids = tokens()
    model.zero_grad()
    next_token_loss(model(ids[:-1])[0], ids[1:]).backward()
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"memory": {"adaptive_query": True, "momentum": 0.5}},
        {"memory": {"read": "boundary"}},
        {"memory": {"static": "projected", "output_gate": "sigmoid"}},
        {"memory": {"erase_max": 1.9, "alpha_spread": 2.0}},
        {"tie_embeddings": False},
    ],
    ids=["default", "adaptive-q-momentum", "boundary", "projected", "erase", "untied"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient(kind, changes):
    for name, grad in gradients(
        small(kind, **{k: dict(v) if isinstance(v, dict) else v for k, v in changes.items()})
    ).items():
        assert grad is not None, f"{name} has no gradient"
        assert torch.isfinite(grad).all(), name
        assert grad.abs().max() > 1e-12, f"{name} has a zero gradient"


@pytest.mark.parametrize("kind", KINDS)
def test_every_memory_learns_from_what_its_writes_do_later(kind, monkeypatch):
    """With the gradient through writes cut, every initial state, key map and gate gets another gradient.

    The memories that are read in the first chunk have a gradient even without writes, so 'non-zero' alone would not
    notice a detach; this test does: it makes one and sees the difference.
    """
    learned = {"memory": {"static": "learned"}}
    whole = gradients(small(kind, **learned))
    original = DeltaChunk.write

    def detached(self, state, read_keys, errors):
        written = original(self, state, read_keys, errors)
        object.__setattr__(written, "state", DeltaState(written.state.weight.detach()))
        return written

    monkeypatch.setattr(DeltaChunk, "write", detached)
    cut = gradients(small(kind, **learned))
    watched = [n for n in whole if "memories.initial" in n or "static_" in n or "eta_" in n or "alpha_" in n]
    # the last block's main matrix multiplies the shared factors from outside: its gradient needs their value only
    watched = [n for n in watched if n != "blocks.1.mixer.memories.initial.main"]
    assert len(watched) == 2 * 6 + {"matrix": 9, "mlp": 20}[kind]
    for name in watched:
        change = (whole[name] - cut[name]).norm() / whole[name].norm()
        assert change > 1e-3, f"{name}: no gradient came through the writes ({change:.1e})"


@pytest.mark.parametrize("read", ["causal", "boundary"])
@pytest.mark.parametrize("kind", KINDS)
def test_writing_changes_what_later_tokens_read(kind, read, monkeypatch):
    """Outputs after the first chunk differ from those of a model whose writes are dropped."""
    model, ids = small(kind, memory={"read": read}), tokens()
    bank = matrix.MatrixBank if kind == "matrix" else mlp.MlpBank
    with torch.no_grad():
        written = model(ids)[0]
        original = bank.write
        monkeypatch.setattr(bank, "write", lambda self, state, *rest: (state, original(self, state, *rest)[1]))
        dropped = model(ids)[0]
    assert torch.equal(written[:8], dropped[:8])
    assert (written[8:] - dropped[8:]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_memory_is_a_static_net(kind, monkeypatch):
    """Invariant 8: with eta = 0 and alpha = 1 states stay at M_0 and the read is a plain forward of M_0."""
    model = small(kind)
    mixer = model.blocks["0"].mixer
    with torch.no_grad():
        mixer.eta_bias.fill_(-1e9)
        mixer.alpha_bias.fill_(1e9)
    x = torch.randn(20, 2, 32)
    _, state = mixer(x)
    bank = mixer.memories.bank((*mixer.boxes, "main"), torch.float32)
    for now, start in zip(state.main, bank.start(2), strict=True):
        torch.testing.assert_close(now.weight, start.weight, rtol=0, atol=0)


def test_states_are_fp32_in_a_bf16_model():
    model = small().bfloat16()
    logits, states = model(tokens())
    assert logits.dtype == torch.bfloat16
    assert states[0][0].main[0].weight.dtype == torch.float32
