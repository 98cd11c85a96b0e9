"""16k tokens through the default configuration: finite, bounded states, finite gradients."""

import pytest
import torch
from models import named

from hope.memory.config import MemoryConfig
from hope.mixers import Trunk
from hope.mixers.self_modifying import SelfModifyingTitans
from hope.parameters import initialise

LENGTH = 16384


def stream(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(LENGTH, 1, 32, generator=generator)
    if kind == "random":
        return noise
    if kind == "correlated":  # neighbouring tokens nearly equal: keys repeat, every write hits the same direction
        return noise[:1] + 0.05 * noise
    walk = noise.cumsum(0)
    return walk / walk.square().mean(-1, keepdim=True).sqrt()


ERASING = {"erase_max": 1.9, "static": "projected", "output_gate": "sigmoid"}


MODELS = {
    "matrix": ({}, None),
    "mlp": ({"memory": "mlp"}, None),
    "matrix-erase": (ERASING, 0.0),
    "matrix-erase-all": (ERASING, 20.0),
    "mlp-erase-all": ({**ERASING, "memory": "mlp"}, 20.0),
}
IN_THE_SUITE = {
    ("matrix", "random"), ("mlp", "correlated"), ("matrix-erase-all", "walk"), ("mlp-erase-all", "random"),
}  # fmt: skip
CASES = [
    pytest.param(
        *of_model, inputs, id=f"{name}-{inputs}", marks=() if (name, inputs) in IN_THE_SUITE else pytest.mark.slow
    )
    for name, of_model in MODELS.items()
    for inputs in ("random", "correlated", "walk")
]  # fmt: skip


@pytest.mark.parametrize(("settings", "erase_bias", "inputs"), CASES)
def test_long_sequences_stay_finite(settings, erase_bias, inputs):
    """Also where each write flips the sign of what it finds: with a bias of 20 the erase rate is 1.9 throughout."""
    mixer = SelfModifyingTitans(Trunk(32, 1, 1), MemoryConfig(**settings))
    initialise(mixer, 0)
    if erase_bias is not None:
        torch.nn.init.constant_(mixer.erase_bias, erase_bias)
    x = stream(inputs).requires_grad_()
    y, state = mixer(x)
    y.square().mean().backward()
    assert torch.isfinite(y).all()
    for layer in state.main:
        assert torch.linalg.matrix_norm(layer.weight, ord=2).max() < 20, (
            "a state grew: its largest gain was O(1) at start"
        )
    for name, gradient in [("x", x.grad), *((n, p.grad) for n, p in mixer.named_parameters())]:
        assert torch.isfinite(gradient).all(), name


def test_the_bound_can_be_broken():
    """Raw values with the residual of Eq. 89 and eta_max 1/2: the largest gain passed 300 within 4096 tokens."""
    memory = MemoryConfig(eta_max=0.5, normalise_values=False, contribution=1.0, static="identity")
    mixer = SelfModifyingTitans(Trunk(32, 1, 1), memory)
    initialise(mixer, 0)
    with torch.no_grad():
        _, state = mixer(stream("correlated")[:4096])
    assert torch.linalg.matrix_norm(state.main[0].weight, ord=2).max() > 20


@pytest.mark.parametrize("kind", ["matrix", "mlp"])
def test_memories_do_not_fade_away(kind):
    """At initialisation the state is still of order one after 4096 tokens: alpha's bias does not erase it."""
    mixer = SelfModifyingTitans(Trunk(32, 1, 1), MemoryConfig(memory=kind))
    initialise(mixer, 0)
    with torch.no_grad():
        _, state = mixer(stream("random")[:4096])
    assert all(torch.linalg.matrix_norm(s.weight, ord=2).max() > 0.05 for s in state.main)


def test_hazards_are_reachable_with_a_warning():
    config = named(memory=MemoryConfig(eta_max=0.5, normalise_values=False))
    with pytest.warns(UserWarning, match="eta_max 0.5") as seen:
        config.warn_hazards()
    assert any("normalise_values" in str(w.message) for w in seen)
    assert MemoryConfig().hazards() == []
    assert MemoryConfig(memory="mlp").hazards() == []
