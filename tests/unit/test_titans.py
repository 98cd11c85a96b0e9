"""The mixer `titans`: every rule of its table, every depth and every key, against a token loop whose inner gradients
are autograd's."""

import dataclasses
from pathlib import Path

import pytest
import torch
from titans_reference import by_documents, layer_of_a_document

from hope.config import ModelConfig
from hope.documents import Documents
from hope.memory.titans_config import TITANS_RULES, TitansConfig, TitansRule
from hope.mixers.titans import Titans
from hope.model import Model

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
BOUND = 1e-11
LENGTH, BATCH = 13, 2
CONFIGS = {name: TitansConfig(rule=name, chunk=4, theta_max=0.3) for name in TITANS_RULES} | {
    "matrix": TitansConfig(depth=1, chunk=5, theta_max=0.5, decay_bias=-1.0),
    "deep": TitansConfig(depth=3, expansion=2, chunk=4, theta_max=0.2, decay_bias=-2.0),
    "deepest": TitansConfig(depth=4, chunk=8, theta_max=0.2, residual=True, gate="sigmoid"),
    "online": TitansConfig(chunk=1, theta_max=0.05, momentum_max=0.5, conv_width=0, unit_keys=False, gate="none"),
    "no momentum": TitansConfig(chunk=4, theta_max=0.3, momentum=False, activation="gelu"),
    "no decay": TitansConfig(chunk=4, theta_max=0.3, decay=False, inner_norm=True, conv_width=1),
    "one chunk": TitansConfig(chunk=64, theta_max=0.05),
}


def model(config: TitansConfig, layers: int = 1, heads: int = 2, **settings) -> Model:
    made = ModelConfig(["titans"], 32, 8, layers, heads, mixers={"titans": config}, **settings)
    return Model(made).double().initialise(3)


def shaken(layer: torch.nn.Module) -> torch.nn.Module:
    """Away from special initial values: identity convolutions, equal norms."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return layer


def layer_of(config: TitansConfig) -> Titans:
    return shaken(model(config).blocks["0"].mixer)  # type: ignore[return-value]


def activations(width: int = 8) -> torch.Tensor:
    return torch.randn(LENGTH, BATCH, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def marks(packed: bool) -> torch.Tensor | None:
    return torch.rand(LENGTH, BATCH, generator=torch.Generator().manual_seed(2)) < 0.2 if packed else None


def with_gradients(function, layer, x: torch.Tensor) -> list[torch.Tensor]:
    """y, and the gradients of a fixed weighting by the input and every parameter."""
    x = x.clone().requires_grad_()
    y = function(x)
    total = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    return [y, *torch.autograd.grad(total, [x, *layer.parameters()])]


def assert_same(layer, reference, packed: bool) -> None:
    """Outputs and all gradients are the reference's."""
    starts, x = marks(packed), activations()
    documents = None if starts is None else Documents(starts)
    found = with_gradients(lambda x: layer(x, None, documents)[0], layer, x)
    expected = with_gradients(lambda x: by_documents(lambda d: reference(layer, d), x, starts), layer, x)
    names = ["y", "x", *(n for n, _ in layer.named_parameters())]
    for what, one, other in zip(names, found, expected, strict=True):
        assert other.abs().max() > 0, what
        assert (one - other).abs().max() <= BOUND * max(1.0, other.abs().max()), what


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_outputs_and_gradients_are_those_of_the_papers(name, packed):
    assert_same(layer_of(CONFIGS[name]), layer_of_a_document, packed)


def test_the_configurations_use_every_choice():
    rules = [config.resolved() for config in CONFIGS.values()]
    for field in dataclasses.fields(TitansRule):
        assert len({getattr(rule, field.name) for rule in rules}) >= 2, field.name
    assert {rule.depth for rule in rules} == {1, 2, 3, 4}
    assert {rule.gate for rule in rules} == {"none", "silu", "sigmoid"}
