"""The mixer `mamba2` against a token loop in float64: outputs, states and all gradients, and what it starts from."""

import math
from functools import partial

import pytest
import torch
from mamba2_reference import layer_by_tokens

from configs.errors import ConfigError
from configs.schema import load
from hope.config import CmsConfig, ModelConfig
from hope.documents import Documents
from hope.memory.given.ops import fused_memory
from hope.memory.kernels import shared_keys_for
from hope.memory.linear import in_squares, linear_memory
from hope.mixers.mamba2 import Mamba2, Mamba2Config
from hope.model import Model
from hope.parameters import declarations
from hope.train.diagnostics import MixerProbe

BOUND = 1e-12
BATCH, WIDTH, HEADS = 3, 16, 2
CONFIGS = {
    "published": Mamba2Config(state=12, chunk=8),
    "two groups": Mamba2Config(state=6, groups=2, chunk=8),
    "a group per head": Mamba2Config(state=5, groups=4, chunk=4, conv_width=2),
    "as wide as the model": Mamba2Config(expand=1, state=8, chunk=8, conv_width=1),
}


def model(config: Mamba2Config, layers: int = 1, width: int = WIDTH, heads: int = HEADS) -> Model:
    made = ModelConfig(["mamba2"], 32, width, layers, heads, mixers={"mamba2": config}, cms=CmsConfig(periods=[1]))
    return Model(made).double().initialise(3)


def layer_of(config: Mamba2Config) -> Mamba2:
    """Away from special initial values: equal norms and skips, long memories."""
    layer = model(config).blocks["0"].mixer
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return layer


def activations(length: int) -> torch.Tensor:
    return torch.randn(length, BATCH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def with_gradients(function, layer, x: torch.Tensor) -> list[torch.Tensor]:
    """y, and the gradients of a fixed weighting by the input and every parameter."""
    x = x.clone().requires_grad_()
    y = function(x)
    total = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    return [y, *torch.autograd.grad(total, [x, *layer.parameters()])]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [5, 21])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_outputs_and_gradients_are_those_of_the_paper(name, length, packed):
    layer, x = layer_of(CONFIGS[name]), activations(length)
    starts = torch.rand(length, BATCH, generator=torch.Generator().manual_seed(2)) < 0.2 if packed else None
    documents = None if starts is None else Documents(starts)
    found = with_gradients(lambda x: layer(x, None, documents)[0], layer, x)
    expected = with_gradients(lambda x: layer_by_tokens(layer, x, starts), layer, x)
    names = ["y", "x", *(n for n, _ in layer.named_parameters())]
    for what, one, other in zip(names, found, expected, strict=True):
        assert other.abs().max() > 0, what
        assert (one - other).abs().max() <= BOUND * max(1.0, other.abs().max()), what


def test_the_size_of_chunks_changes_nothing():
    layer, x = layer_of(CONFIGS["two groups"]), activations(21)
    with torch.no_grad():
        expected = layer(x)[0]
        for layer.chunk in (1, 3, 64):
            assert (layer(x)[0] - expected).abs().max() <= BOUND * expected.abs().max()


def test_the_state_has_a_row_per_feature_of_the_inner_width():
    layer = layer_of(CONFIGS["published"])
    _, state = layer(activations(7))
    assert state.weight.shape == (BATCH, 4, 8, 12)
    assert state.history.shape == (BATCH, 3, 32 + 2 * 12)
    assert state.nbytes() == layer.start(BATCH).nbytes() == 8 * BATCH * (4 * 8 * 12 + 3 * 56)


def test_bf16_keeps_its_memory_in_fp32():
    layer, x = layer_of(CONFIGS["published"]), activations(21)
    with torch.no_grad():
        expected = layer(x)[0]
        y, state = layer.bfloat16()(x.bfloat16())
    assert (y.dtype, state.weight.dtype) == (torch.bfloat16, torch.float32)
    assert (y.double() - expected).norm() < 0.05 * expected.norm()


def test_initial_values_are_the_published_ones():
    """A uniform from 1 to 16; steps log-uniform from 0.001 to 0.1; convolutions as torch's own; D and norms 1."""
    layer = model(Mamba2Config(state=128), width=512, heads=256).blocks["0"].mixer.requires_grad_(False)
    rate = layer.decay_rate.exp()
    assert 1 <= rate.min() < 1.2 < 15.8 < rate.max() <= 16
    assert rate.mean() == pytest.approx(8.5, abs=0.8)
    step = torch.nn.functional.softplus(layer.step_bias).log10()
    assert -3.0001 <= step.min() < -2.95 < -1.05 < step.max() <= -0.9999
    assert step.mean() == pytest.approx(-2, abs=0.12)
    for conv in (layer.conv_value, layer.conv_key, layer.conv_query):
        for parameter in (conv.weight, conv.bias):
            assert parameter.abs().max() <= 0.5
            assert parameter.std() == pytest.approx(1 / math.sqrt(12), rel=0.2)
    assert (layer.skip == 1).all()
    assert (layer.norm_weight == 1).all()


def test_what_is_declared():
    """One group is on every rank, several are cut like heads."""
    copies = {
        "key.weight",
        "query.weight",
        *(f"conv_{n}.{part}" for n in ("key", "query") for part in ("weight", "bias")),
    }
    for name, wanted in (("published", copies), ("two groups", set())):
        found = {n: d for n, _, d in declarations(layer_of(CONFIGS[name]))}
        assert {n for n, d in found.items() if d.used == "heads"} == wanted
        assert {n for n, d in found.items() if d.cut is None} == wanted


def test_flops():
    layer = layer_of(CONFIGS["two groups"])
    inner, keys, heads, rows, state = 32, 12, 4, 8, 6
    dense = 2 * 16 * (3 * inner + 2 * keys + heads) + 2 * 4 * (inner + 2 * keys)
    assert layer.flops(64).dense == dense + heads * (2 * rows * state + 8 * (rows + state))
    assert layer.flops(64).writes == heads * 2 * rows * state


def test_what_the_log_shows():
    made = model(CONFIGS["published"], layers=2)
    probe = MixerProbe([made])
    probe.arm(True)
    made(torch.randint(0, 32, (9, 2)))
    assert set(probe.scalars()) == {"memory_norm.0", "memory_norm.1"}
    shown = dict(probe.histograms())
    assert all(((t > 0) & (t < 1)).all() for name, t in shown.items() if name.startswith("decay"))


class TestSquares:
    """Keys that are cut into parts as wide as values: the form that the kernels take."""

    def inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64)
        return {
            "q": draw(11, 12), "k": draw(11, 12), "v": draw(11, 4), "log_decay": -draw(11, 1).exp(),
            "write": draw(11).exp(), "state": draw(4, 12),
        }  # fmt: skip

    def test_reads_and_states_are_those_of_wide_keys(self):
        given, found = self.inputs(), []
        for memory in (linear_memory, partial(in_squares, linear_memory)):
            leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
            y, state = memory(**leaves, erase=False, chunk=4)
            both = torch.cat([y.flatten(), state.flatten()])
            (both * torch.linspace(-1, 1, both.numel(), dtype=torch.float64)).sum().backward()
            found.append({"y": y, "state at the end": state, **{name: t.grad for name, t in leaves.items()}})
        for name, expected in found[0].items():
            assert (found[1][name] - expected).abs().max() <= BOUND * max(1.0, expected.abs().max()), name

    def test_erasing_is_refused(self):
        with pytest.raises(ValueError, match="all of a key"):
            in_squares(linear_memory, **self.inputs(), erase=True, chunk=4)


@pytest.mark.parametrize(
    ("keys", "head_dim", "name"),
    [(64, 64, "fused"), (128, 64, "fused"), (128, 128, "fused"), (64, 128, "plain (state 64)"),
     (96, 64, "plain (state 96)"), (32, 32, "plain (heads of 32)")],
)  # fmt: skip
def test_which_form_a_gpu_takes(keys, head_dim, name):
    choice = shared_keys_for("auto", 64, torch.device("cuda"), torch.bfloat16, head_dim, keys)
    assert str(choice) == name
    if (keys, head_dim) == (128, 64):
        assert choice.memory.func is in_squares
        assert choice.memory.args[0].func is fused_memory
    assert str(shared_keys_for("plain", 64, torch.device("cuda"), torch.bfloat16, 64, 64)) == "plain (as configured)"
    assert str(shared_keys_for("auto", 64, torch.device("cpu"), torch.float32, 64, 64)) == "plain (CPU)"


BAD = {
    "groups=3": ("groups", "3 groups do not divide 8 heads (expand 2 x model.heads 4)", "1, 2, 4, 8"),
    "groups=0": ("groups", "0 is less than 1", "1"),
    "expand=0": ("expand", "0 is less than 1", "2"),
    "state=0": ("state", "0 is less than 1", "128"),
    "conv_width=0": ("conv_width", "0 is less than 1", "4"),
    "chunk=0": ("chunk", "0 is less than 1", "64"),
}
WORDS = ["model.pattern=[mamba2]", "data.train=none", "data.heldout=none"]


def problems(*words: str, world_size: int | None = None) -> list:
    with pytest.raises(ConfigError) as caught:
        load("configs/quickstart.yaml", [*WORDS, *words], world_size=world_size)
    return [p for p in caught.value.problems if not p.path.startswith("data.")]


@pytest.mark.parametrize("word", list(BAD))
def test_what_cannot_work_is_a_problem_with_its_path(word):
    key, what, fix = BAD[word]
    assert problems(f"model.mixers.mamba2.{word}") == [(f"model.mixers.mamba2.{key}", what, fix)]


def test_groups_that_tensor_ranks_cannot_divide():
    [problem] = problems("model.mixers.mamba2.groups=2", "parallel.tensor=4", world_size=4)
    assert problem.path == "parallel.tensor"
    assert problem.what == "model.mixers.mamba2.groups 2 is not a multiple of tensor 4"
    assert problem.fix == "tensor 2, 1; or model.mixers.mamba2.groups 4"
    assert problems("model.mixers.mamba2.groups=4", "parallel.tensor=4", world_size=4) == []
    assert problems("model.mixers.mamba2.groups=1", "parallel.tensor=4", world_size=4) == []
