"""A mixer in one file (tests/gated_delta.py): everybody who asks about it gets the truth."""

import gated_delta
import pytest
import torch

from hope.config import CmsConfig, ModelConfig
from hope.mixers import MIXERS, mixer
from hope.model import Model, Slice, next_token_loss
from hope.optim.config import OptimConfig
from hope.optim.levels import parameter_groups
from hope.train.diagnostics import MixerProbe
from parallel.layout.memory import StepShape, activation_bytes, build_part, part_activations, rank_memory
from parallel.layout.plan import plan_of_config
from parallel.layout.report import pattern_of

NAME = "gated_delta_of_a_test"


def config(pattern: list[str] | None = None, layers: int = 4, **settings) -> ModelConfig:
    cms = CmsConfig(periods=[1, 2], hidden=16)
    return ModelConfig(pattern or [NAME], 64, 32, layers, 2, cms=cms, imports=["gated_delta"], **settings)


def token_loop(layer: gated_delta.GatedDelta, x_TBD: torch.Tensor) -> torch.Tensor:
    """Its definition, one token, sequence and head at a time."""
    out = torch.zeros_like(x_TBD)
    split = lambda m, x: m(x).unflatten(-1, (-1, layer.head_dim))
    for b in range(x_TBD.shape[1]):
        heads = layer.beta_weight.shape[0]
        weight = x_TBD.new_zeros(heads, layer.head_dim, layer.head_dim)
        for t in range(x_TBD.shape[0]):
            x = x_TBD[t, b]
            q, k, v = split(layer.query, x), split(layer.key, x), split(layer.value, x)
            q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
            rows = []
            for h in range(heads):
                beta = torch.sigmoid(x @ layer.beta_weight[h])
                alpha = torch.sigmoid(x @ layer.alpha_weight[h] + layer.alpha_bias[h])
                kept = alpha * (weight[h] - beta * torch.outer(weight[h] @ k[h], k[h]))
                weight[h] = kept + beta * torch.outer(v[h], k[h])
                y = weight[h] @ q[h]
                rows.append(y / (y.square().mean() + 1e-6).sqrt() * layer.norm.weight)
            out[t, b] = layer.output(torch.cat(rows) * torch.nn.functional.silu(layer.gate(x)))
    return out


def test_it_is_what_it_says():
    model = Model(config(layers=1)).double().initialise(3)
    layer = model.blocks["0"].mixer
    x = torch.randn(21, 2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(layer(x)[0], token_loop(layer, x), rtol=0, atol=1e-13)
        first, state = layer(x[:5])
        assert torch.allclose(torch.cat([first, layer(x[5:], state)[0]]), layer(x)[0], rtol=0, atol=1e-13)


def test_memory_prediction_counts_it_in_a_hybrid_too():
    settings = config([NAME, "attention", NAME])
    shape = StepShape(256, 2, False)
    for part in (Slice(0, 4), Slice(1, 3)):
        assert part_activations(settings, part, shape) == activation_bytes(build_part(settings, part, shape), shape)
    predicted = rank_memory(settings, [Slice(0, 4)], 1, shape, OptimConfig())
    assert predicted.fast_weights == 3 * 2 * (2 * 16 * 16) * 4  # layers x sequences x (heads x K x K) x bytes


def test_its_plan_and_its_groups_are_what_it_declares():
    settings = config()
    plan = plan_of_config(settings)
    assert plan["blocks.0.mixer.beta_weight"].dim == 0
    assert plan["blocks.0.mixer.norm.weight"].rule.value == "partial"
    groups = parameter_groups(Model(settings), 0.1, OptimConfig(name="muon"))
    of = {name: group["name"] for group in groups for name in group["names"]}
    assert of["blocks.0.mixer.beta_weight"] == "base"  # by its name and shape it would be a matrix
    assert of["blocks.0.mixer.query.weight"] == "base.matrices"


def test_the_log_shows_what_it_reports():
    model = Model(config([NAME, "attention"])).initialise(0)
    probe = MixerProbe([model])
    probe.arm(True)
    ids = torch.randint(0, 64, (9, 2))
    next_token_loss(model(ids[:-1])[0], ids[1:])
    assert set(probe.scalars()) == {"memory_norm.0", "memory_norm.2"}
    assert all(value > 0 for value in probe.scalars().values())
    assert [name for name, _ in probe.histograms()] == ["beta.0", "beta.2"]


def test_the_pattern_is_repeated_and_its_last_repetition_may_be_cut():
    settings = config(["hope", "hope", "hope", "attention"], layers=7)
    assert settings.mixer_of_layer == ["hope", "hope", "hope", "attention", "hope", "hope", "hope"]
    assert pattern_of(settings) == "6 hope + 1 attention"
    assert list(settings.problems()) == []
    [problem] = config(["hope", "attention"], layers=1).problems()
    assert problem.path == "model.pattern"
    assert "2 mixers for 1 layers" in problem.what
    [problem] = config(["hop"]).problems()
    assert "no mixer is called hop" in problem.what
    assert NAME in problem.fix


def test_a_parameter_that_declares_nothing_is_a_problem_of_the_configuration(monkeypatch):
    class Careless(gated_delta.GatedDelta):
        def __init__(self, trunk, section):
            super().__init__(trunk, section)
            self.A_log = torch.nn.Parameter(torch.zeros(2, 16))

    monkeypatch.setitem(MIXERS, NAME, MIXERS[NAME]._replace(build=Careless))
    [problem] = config().problems()
    assert problem.path == "model.pattern"
    assert "A_log declares nothing; create it with hope.parameters.new_parameter" in problem.what


def test_two_mixers_cannot_share_a_name():
    with pytest.raises(ValueError, match="a mixer is called 'attention' already"):
        mixer("attention", section=gated_delta.GatedDeltaConfig)(gated_delta.GatedDelta)
