"""Titans with attention, MAG, MAL and MAC: against a token loop, in float64, with all gradients."""

import pytest
import torch
from test_titans import QUICKSTART, activations, assert_same, shaken
from titans_reference import context_of_a_document, gated_of_a_document, layered_of_a_document

from configs.errors import ConfigError
from configs.schema import load
from hope.mixers import Mixer, Trunk
from hope.mixers.titans_attention import GateConfig, LayerConfig, MemoryAsGate, MemoryAsLayer
from hope.mixers.titans_context import ContextConfig, MemoryAsContext
from hope.parameters import initialise

CASES = {
    "mag": (MemoryAsGate, GateConfig(chunk=4, theta_max=0.3, window=5, persistent=3), gated_of_a_document),
    "mag silu": (MemoryAsGate, GateConfig(depth=1, chunk=8, window=64, persistent=2, gate="silu"), gated_of_a_document),
    "mag alone": (MemoryAsGate, GateConfig(chunk=1, theta_max=0.1, window=2, persistent=0), gated_of_a_document),
    "mal": (MemoryAsLayer, LayerConfig(chunk=4, theta_max=0.3, window=5, persistent=3), layered_of_a_document),
    "mal ttt": (MemoryAsLayer, LayerConfig(rule="ttt_linear", chunk=3, window=64, persistent=0), layered_of_a_document),
    "mac": (MemoryAsContext, ContextConfig(chunk=2, segment=6, theta_max=0.3, persistent=3), context_of_a_document),
    "mac matrix": (
        MemoryAsContext,
        ContextConfig(depth=1, chunk=5, segment=5, theta_max=0.5, persistent=0, gate="silu", decay_bias=-1.0),
        context_of_a_document,
    ),
    "mac ttt": (
        MemoryAsContext,
        ContextConfig(rule="ttt_mlp", chunk=3, segment=9, persistent=1),
        context_of_a_document,
    ),
    "mac by token": (MemoryAsContext, ContextConfig(chunk=1, segment=1, theta_max=0.1), context_of_a_document),
}


def layer_of(name: str) -> Mixer:
    build, config, _ = CASES[name]
    layer = build(Trunk(8, 2, 1), config)
    initialise(layer, 3)
    return shaken(layer.double())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_outputs_and_gradients_are_those_of_the_papers(name, packed):
    assert_same(layer_of(name), CASES[name][2], packed)


def test_persistent_keys_are_seen_by_every_token():
    layer, x = layer_of("mag"), activations()
    with torch.no_grad():
        before = layer(x)[0]
        layer.attention.persistent_values.add_(1.0)
        assert ((layer(x)[0] - before).abs().amax(-1) > 1e-3).all()


BAD = {
    "mac": [
        ("conv_width=4", "conv_width", "is not used"),
        ("segment=20", "segment", "20 is not a multiple of chunk 16"),
    ],
    "mag": [("window=0", "window", "0 is less than 1"), ("persistent=-1", "persistent", "-1 is negative")],
    "mal": [("rope_base=0", "rope_base", "0.0 is not positive"), ("depth=9", "depth", "9 is not in 1 to 4")],
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_cannot_work_is_a_problem_with_its_path(name):
    for word, key, what in BAD[name]:
        with pytest.raises(ConfigError) as caught:
            load(str(QUICKSTART), [f"model.pattern=[titans_{name}]", f"model.mixers.titans_{name}.{word}"])
        [problem] = [p for p in caught.value.problems if not p.path.startswith("data.")]
        assert problem.path == f"model.mixers.titans_{name}.{key}"
        assert problem.what.startswith(what)
        assert problem.fix


@pytest.mark.parametrize("name", ["mag", "mal", "mac"])
def test_what_the_log_shows_and_the_referee_compares(name):
    layer = layer_of(name)
    layer.watched = True
    _, state = layer(activations())
    assert set(layer.report().scalars) == {"memory_norm"}
    assert set(layer.report().histograms) == {"theta", "alpha", "eta"}
    attention = set() if name == "mac" else {"keys", "values"}
    assert set(state.compared()) == {"memory.0", "memory.1"} | attention
    assert layer.chunk == (6 if name == "mac" else 20)  # whole chunks of 4 and windows of 5
    assert layer.flops(64).dense > layer.flops(3).dense  # more tokens see a whole window


@pytest.mark.parametrize("persistent", [0, 3])
def test_flops_of_a_segment_by_hand(persistent):
    """Two heads of width 4, a matrix with momentum as memory. Persistent keys make queries and keys twice as wide."""
    config = ContextConfig(depth=1, chunk=2, segment=6, persistent=persistent)
    layer, heads, width = MemoryAsContext(Trunk(8, 2, 1), config), 2, 4
    trunk, maps, rates = 5 * 2 * 8 * 8, 5 * 2 * width * width, 3 * 2 * width
    matrix, inside = 2 * width * width, 2 * (width + width)
    for length, seen in ((100, 6), (6, 6), (4, 4)):
        # half of the square of two keys per token, which is one square
        attention = (6 if persistent else 4) * width * (seen + persistent)
        found = layer.flops(length)
        assert found.dense == trunk + heads * (maps + rates + attention + matrix + 2 * matrix + inside)
        assert found.writes == heads * 3 * matrix
