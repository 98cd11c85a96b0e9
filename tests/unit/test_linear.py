"""The mixer `linear`: every rule of its table, and every key, against a token loop written from the papers."""

import dataclasses
from pathlib import Path

import pytest
import torch
from linear_reference import layer_by_tokens

from configs.errors import ConfigError
from configs.schema import load
from hope.config import CmsConfig, ModelConfig
from hope.documents import Documents
from hope.memory.linear_config import RULES, LinearConfig, Rule
from hope.mixers.linear import LinearMemory
from hope.model import Model, Slice
from hope.optim.config import OptimConfig
from hope.parameters import declarations
from hope.train.diagnostics import MixerProbe
from parallel.layout.memory import StepShape, rank_memory
from parallel.layout.plan import plan_of_config

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
BOUND = 1e-12
LENGTH, BATCH = 21, 3
CONFIGS = {name: LinearConfig(rule=name, chunk=8) for name in RULES} | {
    "no normaliser": LinearConfig(
        rule="linear_attention", feature_map="identity", normaliser=False, head_norm=True, chunk=8
    ),
    "decayed normaliser": LinearConfig(rule="linear_attention", decay="head", write="step", gate="silu", chunk=8),
    "unit features": LinearConfig(rule="deltanet", feature_map="elu1", write_max=2.0, rope_base=100.0, chunk=8),
    "bare": LinearConfig(rule="kda", conv_width=0, gate="none", head_norm=False, skip=True, decay_rank=3, chunk=8),
    "one tap": LinearConfig(rule="gated_deltanet", conv_width=1, write="one", chunk=8),
    "gated linear attention": LinearConfig(rule="kda", erase=False, write="one", unit_keys=False, chunk=8),
}


def model(config: LinearConfig, layers: int = 1, heads: int = 2, **settings) -> Model:
    made = ModelConfig(["linear"], 32, 16, layers, heads, mixers={"linear": config}, **settings)
    return Model(made).double().initialise(3)


def layer_of(config: LinearConfig) -> LinearMemory:
    """Away from special initial values: identity convolutions, equal norms."""
    layer = model(config).blocks["0"].mixer
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return layer


def activations() -> torch.Tensor:
    return torch.randn(LENGTH, BATCH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def with_gradients(function, layer, x: torch.Tensor) -> list[torch.Tensor]:
    """y, and the gradients of a fixed weighting by the input and every parameter."""
    x = x.clone().requires_grad_()
    y = function(x)
    total = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    return [y, *torch.autograd.grad(total, [x, *layer.parameters()])]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_outputs_and_gradients_are_those_of_the_papers(name, packed):
    layer, x = layer_of(CONFIGS[name]), activations()
    starts = torch.rand(LENGTH, BATCH, generator=torch.Generator().manual_seed(2)) < 0.2 if packed else None
    documents = None if starts is None else Documents(starts)
    found = with_gradients(lambda x: layer(x, None, documents)[0], layer, x)
    expected = with_gradients(lambda x: layer_by_tokens(layer, x, starts), layer, x)
    names = ["y", "x", *(n for n, _ in layer.named_parameters())]
    for what, one, other in zip(names, found, expected, strict=True):
        assert other.abs().max() > 0, what
        assert (one - other).abs().max() <= BOUND * max(1.0, other.abs().max()), what


def test_the_configurations_use_every_choice():
    rules = [config.resolved() for config in CONFIGS.values()]
    for field in dataclasses.fields(Rule):
        assert len({getattr(rule, field.name) for rule in rules}) >= 2, field.name
    assert {rule.decay for rule in rules} == {"none", "constant", "head", "channel"}
    assert {rule.write for rule in rules} == {"one", "beta", "step"}
    assert {rule.gate for rule in rules} == {"none", "silu", "sigmoid"}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_size_of_chunks_changes_nothing(name):
    layer, x = layer_of(CONFIGS[name]), activations()
    with torch.no_grad():
        expected = layer(x)[0]
        for layer.chunk in (1, 3, 64):
            assert (layer(x)[0] - expected).abs().max() <= BOUND * expected.abs().max()


@pytest.mark.parametrize("name", list(RULES))
def test_rows_are_independent(name):
    layer, x = layer_of(CONFIGS[name]), activations()
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        assert torch.allclose(layer(x[:, order])[0], layer(x)[0][:, order], rtol=0, atol=1e-13)


class TestLimits:
    """Where one row of the table is another, as layers with the same weights."""

    def assert_same(self, one: LinearConfig, other: LinearConfig, change=lambda layer: None) -> None:
        first, second = layer_of(one), layer_of(other)
        with torch.no_grad():
            change(first)
            weights = dict(first.named_parameters())
            for name, parameter in second.named_parameters():
                parameter.copy_(weights[name])
            assert (first(activations())[0] - second(activations())[0]).abs().max() <= BOUND

    def test_gated_deltanet_that_keeps_everything_is_deltanet(self):
        keep = lambda layer: layer.decay_rate.fill_(-1e9)
        self.assert_same(CONFIGS["gated_deltanet"], LinearConfig(rule="deltanet", gate="silu"), keep)

    def test_deltanet_without_erasing_and_gates_is_linear_attention(self):
        plain = {"conv_width": 0, "unit_keys": False}
        without = LinearConfig(rule="deltanet", erase=False, write="one", **plain)
        self.assert_same(without, CONFIGS["no normaliser"])

    def test_kda_with_equal_channels_is_gated_deltanet(self):
        """The low-rank gate gives every channel of a head what the gate of the head would give."""
        kda, gated = layer_of(CONFIGS["kda"]), layer_of(LinearConfig(rule="gated_deltanet", gate="sigmoid"))
        with torch.no_grad():
            weights = dict(kda.named_parameters())
            for name, parameter in gated.named_parameters():
                if not name.startswith("decay_"):
                    parameter.copy_(weights[name])
            kda.decay_rate.copy_(gated.decay_rate)
            kda.decay_bias.copy_(gated.decay_bias.repeat_interleave(8))
            kda.decay_down.zero_()
            kda.decay_down[:2].copy_(gated.decay_weight)
            kda.decay_up.weight.zero_()
            kda.decay_up.weight[:8, 0] = kda.decay_up.weight[8:, 1] = 1.0
            assert (kda(activations())[0] - gated(activations())[0]).abs().max() <= BOUND

    def test_retnet_that_keeps_everything_is_linear_attention(self):
        rest = {"rope_base": 0.0, "gate": "none"}
        self.assert_same(LinearConfig(rule="retnet", decay="none", **rest), CONFIGS["no normaliser"])


def test_heads_of_another_tensor_rank_have_their_own_fixed_decays():
    whole = layer_of(LinearConfig(rule="retnet", gate="none"))
    with torch.no_grad():
        state = whole(activations())[1].weight
        for name in ("query", "key", "value"):
            weight = getattr(whole, name).weight
            weight.data = weight.data[8:]
        whole.output.weight.data = whole.output.weight.data[:, 8:]
        assert not torch.allclose(whole(activations())[1].weight, state[:, 1:])
        whole.first_head = 1
        assert torch.allclose(whole(activations())[1].weight, state[:, 1:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", list(RULES))
def test_bf16_keeps_its_memory_in_fp32(name):
    layer, x = layer_of(CONFIGS[name]), activations()
    with torch.no_grad():
        expected = layer(x)[0]
        y, state = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert state.weight.dtype == torch.float32
    assert (y.double() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", list(RULES))
def test_what_is_declared(name):
    """Every parameter that is not cut is summed over ranks; tensors of one dimension are not decayed."""
    config = ModelConfig(["linear"], 32, 16, 1, 2, mixers={"linear": CONFIGS[name]})
    shared = {n for n, layout in plan_of_config(config).items() if ".mixer." in n and layout.dim is None}
    expected = {"norm.weight"} if RULES[name].head_norm else set()
    expected |= {"decay_down"} if name == "kda" else set()
    assert shared == {f"blocks.0.mixer.{n}" for n in expected}
    maps = {n for n, _, d in declarations(model(CONFIGS[name]).blocks["0"].mixer) if d.head_rows}
    assert maps >= {"query.weight", "key.weight", "value.weight"}


def test_memory_prediction_and_flops():
    config = ModelConfig(["linear"], 32, 16, 4, 2, mixers={"linear": CONFIGS["kda"]}, cms=CmsConfig(periods=[1]))
    shape = StepShape(256, 2, False)
    predicted = rank_memory(config, [Slice(0, 4)], 1, shape, OptimConfig())
    # layers x sequences x (heads x K x K and three inputs of three convolutions) x bytes
    assert predicted.fast_weights == 4 * 2 * (2 * 8 * 8 + 3 * 3 * 16) * 4
    layer = layer_of(CONFIGS["deltanet"])
    projections, convolutions, gates = 4 * 2 * 16 * 16, 3 * 2 * 16 * 4, 2 * 16 * 2
    assert layer.flops(64).dense == projections + convolutions + gates + 2 * (2 * 64 + 8 * 16)
    assert layer.flops(64).writes == 2 * (2 * 64 + 8 * 24 + 2 * 64 + 2 * 64 * 2)


def test_what_the_log_shows():
    made = model(CONFIGS["kda"], layers=2)
    probe = MixerProbe([made])
    probe.arm(True)
    made(torch.randint(0, 32, (9, 2)))
    assert set(probe.scalars()) == {"memory_norm.0", "memory_norm.1"}
    shown = dict(probe.histograms())
    assert set(shown) == {"decay.0", "write.0", "decay.1", "write.1"}
    assert all(((t > 0) & (t <= 1)).all() for t in shown.values())


BAD = {
    "write=step": (
        "write",
        "a write by the step needs a decay with one step per head, not decay none of rule deltanet",
    ),
    "write=step,decay=head": ("write", "erasing at the rate of a step, which has no bound, diverges"),
    "normaliser=true": ("normaliser", "a sum of weights that may be 0 cannot divide"),
    "rope_base=-1": ("rope_base", "-1.0 is negative"),
    "conv_width=-1": ("conv_width", "-1 is negative"),
    "write_max=3": ("write_max", "3.0 is not in (0, 2]"),
    "write_max=2,write=one": ("write_max", "is not used: write is one"),
    "decay_rank=4": ("decay_rank", "is not used: decay is none"),
    "decay=channel,decay_rank=0": ("decay_rank", "0 is less than 1"),
    "chunk=0": ("chunk", "0 is less than 1"),
}


@pytest.mark.parametrize("words", list(BAD))
def test_what_cannot_work_is_a_problem_with_its_path(words):
    key, what = BAD[words]
    changes = ["model.pattern=[linear]", *(f"model.mixers.linear.{word}" for word in words.split(","))]
    with pytest.raises(ConfigError) as caught:
        load(str(QUICKSTART), [*changes, "model.mixers.linear.rule=deltanet"])
    [problem] = [p for p in caught.value.problems if not p.path.startswith("data.")]
    assert problem.path == f"model.mixers.linear.{key}"
    assert problem.what.startswith(what)
    assert problem.fix


def test_an_odd_head_cannot_be_rotated():
    [problem] = LinearConfig(rule="retnet").problems("model.mixers.linear", 7)
    assert problem.path == "model.heads"
    assert list(LinearConfig(rule="retnet", rope_base=0.0).problems("model.mixers.linear", 7)) == []
