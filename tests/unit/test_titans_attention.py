"""Titans with attention, MAG and MAL: against a token loop, in float64, with all gradients."""

import pytest
import torch
from test_titans import activations, assert_same, shaken
from titans_reference import gated_of_a_document, layered_of_a_document

from hope.mixers import Mixer, Trunk
from hope.mixers.titans_attention import GateConfig, LayerConfig, MemoryAsGate, MemoryAsLayer
from hope.parameters import initialise

CASES = {
    "mag": (MemoryAsGate, GateConfig(chunk=4, theta_max=0.3, window=5, persistent=3), gated_of_a_document),
    "mag silu": (MemoryAsGate, GateConfig(depth=1, chunk=8, window=64, persistent=2, gate="silu"), gated_of_a_document),
    "mag alone": (MemoryAsGate, GateConfig(chunk=1, theta_max=0.1, window=2, persistent=0), gated_of_a_document),
    "mal": (MemoryAsLayer, LayerConfig(chunk=4, theta_max=0.3, window=5, persistent=3), layered_of_a_document),
    "mal ttt": (MemoryAsLayer, LayerConfig(rule="ttt_linear", chunk=3, window=64, persistent=0), layered_of_a_document),
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
