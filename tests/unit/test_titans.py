"""The mixer `titans`: every rule of its table, every depth and every key, against a token loop whose inner gradients
are autograd's."""

import dataclasses
from pathlib import Path

import pytest
import torch
from titans_reference import by_documents, layer_of_a_document

from configs.errors import ConfigError
from configs.schema import load
from hope.config import CmsConfig, ModelConfig
from hope.documents import Documents
from hope.memory.titans_config import TITANS_RULES, TitansConfig, TitansRule
from hope.mixers.titans import Titans
from hope.model import Model, Slice
from hope.optim.config import OptimConfig
from hope.parameters import declarations
from hope.train.diagnostics import MixerProbe
from parallel.layout.memory import StepShape, rank_memory
from parallel.layout.plan import plan_of_config

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
BOUND = 1e-11
LENGTH, BATCH = 13, 2
CONFIGS = {name: TitansConfig(rule=name, chunk=4, theta_max=0.3) for name in TITANS_RULES} | {
    "matrix": TitansConfig(depth=1, chunk=5, theta_max=0.5, decay_bias=-1.0, residual=False, inner_norm=False),
    "deep": TitansConfig(depth=3, expansion=2, chunk=4, theta_max=0.2, decay_bias=-2.0, activation="silu"),
    "deepest": TitansConfig(depth=4, expansion=1, chunk=8, theta_max=0.2, inner_norm=False, gate="sigmoid"),
    "online": TitansConfig(chunk=1, theta_max=0.05, momentum_max=0.5, conv_width=0, unit_keys=False, gate="none"),
    "no momentum": TitansConfig(chunk=4, theta_max=0.3, momentum=False, residual=False),
    "no decay": TitansConfig(chunk=4, theta_max=0.3, decay=False, expansion=2, conv_width=1),
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


@pytest.mark.parametrize("name", list(TITANS_RULES))
def test_bf16_keeps_its_memory_in_fp32(name):
    layer, x = model(CONFIGS[name]).blocks["0"].mixer, activations()
    with torch.no_grad():
        expected = layer(x)[0]
        y, state = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert {t.dtype for layer in state.weights for t in (layer.weight, layer.momentum) if t is not None} == {
        torch.float32
    }
    assert (y.double() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", list(TITANS_RULES))
def test_what_is_declared(name):
    """Only the norm is not cut; the memory's layers are stacks of maps."""
    config = ModelConfig(["titans"], 32, 8, 1, 2, mixers={"titans": CONFIGS[name]})
    shared = {n for n, layout in plan_of_config(config).items() if ".mixer." in n and layout.dim is None}
    assert shared == {"blocks.0.mixer.norm.weight"}
    declared = {n: d.update for n, _, d in declarations(model(CONFIGS[name]).blocks["0"].mixer)}
    layers = {n for n, update in declared.items() if update == "matrix_per_head"}
    assert layers == {f"memory.network.layers.{number}" for number in range(CONFIGS[name].resolved().depth)}


def test_memory_prediction_and_flops():
    config = ModelConfig(["titans"], 32, 16, 4, 2, mixers={"titans": TitansConfig()}, cms=CmsConfig(periods=[1]))
    predicted = rank_memory(config, [Slice(0, 4)], 1, StepShape(256, 2, False), OptimConfig())
    # layers x sequences x (two layers with momentum of heads x 4 K x K, three inputs of three convolutions) x bytes
    assert predicted.fast_weights == 4 * 2 * (2 * 2 * 2 * 4 * 8 * 8 + 3 * 3 * 16) * 4
    layer = model(TitansConfig(depth=1, chunk=4)).blocks["0"].mixer
    projections, convolutions, rates = 5 * 2 * 8 * 8, 3 * 2 * 8 * 4, 3 * 2 * 8 * 2
    weights = 2 * 4 * 4
    assert layer.flops(64).dense == projections + convolutions + rates + 2 * (2 * weights + 4 * 8)
    assert layer.flops(64).writes == 2 * (weights + 2 * weights)


def test_bounds_and_biases_that_are_not_given():
    """theta: 1 / 4^(depth + 1), TTT's over the width of a head; alpha: a matrix forgets 2 % of itself, others less."""
    kinds = [
        (TitansConfig(), (1 / 64, -8.0)),
        (TitansConfig(depth=1, residual=False), (1 / 16, -4.0)),
        (TitansConfig(rule="ttt_linear"), (1 / 10, -4.0)),
        (TitansConfig(rule="ttt_mlp"), (0.01, -8.0)),
        (TitansConfig(rule="ttt_mlp", theta_max=0.5, decay=True, decay_bias=-1.5), (0.5, -1.5)),
    ]
    for config, expected in kinds:
        assert (config.theta_bound(10), config.decay_start) == pytest.approx(expected)
    layer = model(TitansConfig(), heads=4).blocks["0"].mixer.memory.rates
    assert layer.theta_max == 1 / 64
    assert layer.decay_bias.tolist() == [-8.0] * 4


def test_what_the_log_shows():
    made = model(TitansConfig(), layers=2)
    probe = MixerProbe([made])
    probe.arm(True)
    made(torch.randint(0, 32, (9, 2)))
    assert set(probe.scalars()) == {"memory_norm.0", "memory_norm.1"}
    shown = dict(probe.histograms())
    assert set(shown) == {f"{name}.{layer}" for name in ("theta", "alpha", "eta") for layer in (0, 1)}
    assert all(((t[..., :9] > 0) & (t[..., :9] < 1)).all() for t in shown.values())


BAD = {
    "depth=5": ("depth", "5 is not in 1 to 4"),
    "expansion=0": ("expansion", "0 is less than 1"),
    "depth=1,expansion=2": ("expansion", "is not used: depth is 1"),
    "depth=1,activation=gelu": ("activation", "is not used: depth is 1"),
    "chunk=0": ("chunk", "0 is less than 1"),
    "conv_width=-1": ("conv_width", "-1 is negative"),
    "theta_max=0": ("theta_max", "0.0 is not positive"),
    "momentum_max=1": ("momentum_max", "1.0 is not in (0, 1)"),
    "momentum=false,momentum_max=0.5": ("momentum_max", "is not used: no momentum"),
    "decay=false,decay_bias=-3": ("decay_bias", "is not used: no decay"),
}


@pytest.mark.parametrize("words", list(BAD))
def test_what_cannot_work_is_a_problem_with_its_path(words):
    key, what = BAD[words]
    changes = ["model.pattern=[titans]", *(f"model.mixers.titans.{word}" for word in words.split(","))]
    with pytest.raises(ConfigError) as caught:
        load(str(QUICKSTART), changes)
    [problem] = [p for p in caught.value.problems if not p.path.startswith("data.")]
    assert problem.path == f"model.mixers.titans.{key}"
    assert problem.what.startswith(what)
    assert problem.fix
