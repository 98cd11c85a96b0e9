"""Memories that forget towards their initial states stay distinct, and the initial states keep learning.

4096 tokens at alpha 0.982. With `forget: zero`, the paper's literal form, all of it is false.
"""

from functools import cache

import pytest
import torch
from torch import Tensor

from hope.config import ModelConfig
from hope.memory.config import MemoryConfig
from hope.mixers import Trunk
from hope.mixers.self_modifying import SelfModifyingTitans
from hope.parameters import initialise

LENGTH, EARLY, WIDTH = 4096, 256, 32
KINDS = pytest.mark.parametrize("kind", ["matrix", "mlp"])


def mixer_of(kind: str, forget: str) -> SelfModifyingTitans:
    # the mlp's default bias of 8 forgets so slowly that 4096 tokens would not tell the forms apart
    memory = MemoryConfig(memory=kind, forget=forget, alpha_bias=4.0)
    mixer = SelfModifyingTitans(Trunk(WIDTH, 1, 1), memory)
    initialise(mixer, 0)
    return mixer


def outputs(mixer: SelfModifyingTitans, length: int):
    tokens = torch.randn(LENGTH, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    return mixer(tokens[:length])


@torch.no_grad()
def kept_apart(mixer: SelfModifyingTitans, state) -> float:
    """|M_k - M_v| of the one head, over the same at the start: of the matrices, or of the first layers."""
    bank = mixer._memories(torch.float32).main

    def distance(state) -> Tensor:
        if mixer.config.memory == "mlp":
            outer, _ = bank.layers(state)
            return (outer[0, 0, 0] - outer[0, 0, 1]).norm()
        key, value, *_ = bank.read(state, torch.eye(WIDTH).view(1, 1, WIDTH, WIDTH)).unbind(2)
        return (key - value).norm()

    return (distance(state.main) / distance(mixer.start(1).main)).item()


@cache
def after_many_tokens(kind: str, forget: str) -> tuple[float, list[float]]:
    """`kept_apart` after 4096 tokens; and by initial state the share of its gradient that comes from tokens beyond the
    256th, |later| / (|early| + |later|)."""
    mixer = mixer_of(kind, forget)
    y, state = outputs(mixer, LENGTH)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    initial = list(mixer.memories.initial.values())
    of = lambda y, weights: torch.autograd.grad((y * weights).sum(), initial)
    # the early tokens alone give the same, since they do not see the later ones: a short backward pass
    early, later = of(outputs(mixer, EARLY)[0], weights[:EARLY]), of(y[EARLY:], weights[EARLY:])
    shares = [(b.norm() / (a.norm() + b.norm())).item() for a, b in zip(early, later, strict=True)]
    return kept_apart(mixer, state), shares


@KINDS
def test_memories_stay_distinct(kind):
    assert after_many_tokens(kind, "initial")[0] > 0.5  # 0.91 and 1.00
    assert after_many_tokens(kind, "zero")[0] < 1e-6


@KINDS
def test_initial_states_learn_from_late_tokens(kind):
    assert min(after_many_tokens(kind, "initial")[1]) > 0.5  # 0.77 to 0.90
    assert max(after_many_tokens(kind, "zero")[1]) < 0.1  # at most 0.05


@KINDS
def test_without_writes_alpha_forgets_nothing(kind):
    """At alpha 1/2 and eta 0 a memory is its initial state for ever; towards zero it would be gone."""
    left: dict[str, float] = {}
    for forget in ("initial", "zero"):
        mixer = mixer_of(kind, forget)
        with torch.no_grad():
            mixer.eta_bias.fill_(-1e9)
            mixer.alpha_bias.fill_(0.0)
            left[forget] = kept_apart(mixer, outputs(mixer, 256)[1])
    assert left["initial"] == pytest.approx(1.0, abs=1e-6)
    assert left["zero"] < 1e-6


def test_records_of_earlier_versions_forgot_towards_zero():
    """They have no such key. A new configuration without it forgets towards the initial states."""
    recorded = {"pattern": ["hope"], "mixers": {"hope": {"eta_max": 0.5}}, "cms": {}}
    earlier = MemoryConfig(forget="zero", static="learned", output_gate="silu", eta_max=0.5)
    assert ModelConfig.of(recorded).mixers["hope"] == earlier
    assert ModelConfig.of({**recorded, "mixers": {}}).mixers["hope"].forget == "zero"
    recorded["mixers"]["hope"]["forget"] = "initial"
    assert ModelConfig.of(recorded).mixers["hope"].forget == "initial"
    assert ModelConfig.of({"pattern": ["attention"], "mixers": {"attention": {}}, "cms": {}}).mixers.keys() == {
        "attention"
    }
    assert ModelConfig().mixers["hope"].forget == "initial"
