"""CMS blocks and clocks (hope-math invariants 12-14)."""

import copy

import pytest
import torch
from models import named

from hope.cms import IndependentCms, SequentialCms, without_level
from hope.config import CmsConfig, ModelConfig
from hope.memory.config import MemoryConfig
from hope.model import Model, next_token_loss
from hope.optim.config import OptimConfig
from hope.optim.dmgd import Dmgd
from hope.optim.levels import parameter_groups
from hope.parameters import initialise


def config(periods: list[int], variant: str = "sequential", **changes) -> ModelConfig:
    memory = MemoryConfig(projection_chunk=8, main_chunk=8)
    return named(vocab_size=32, width=16, layers=1, heads=1, memory=memory, cms=CmsConfig(variant, periods), **changes)


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 32, (17, 4), generator=torch.Generator().manual_seed(step))


def train(model: Model, optimizer: Dmgd, steps: range) -> list[dict[str, torch.Tensor]]:
    history = []
    for step in steps:
        ids = batch(step)
        model.zero_grad()
        next_token_loss(model(ids[:-1])[0], ids[1:]).backward()
        optimizer.step()
        history.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return history


def start(periods: list[int], **optim) -> tuple[Model, Dmgd]:
    model = Model(config(periods)).initialise(0)
    settings = OptimConfig(lr=1e-2, **optim)
    return model, Dmgd(parameter_groups(model, settings.weight_decay), settings)


def test_all_periods_one_is_the_ordinary_chain():
    """Bit-equal to torch-style training with no levels at all: one group, no accumulator."""
    model, optimizer = start([1, 1])
    plain = copy.deepcopy(model)
    decayed = [p for p in plain.parameters() if p.ndim >= 2]
    flat = [p for p in plain.parameters() if p.ndim < 2]
    settings = OptimConfig(lr=1e-2)
    ordinary = Dmgd([{"params": decayed, "weight_decay": 0.1}, {"params": flat}], settings)
    with_levels, without = train(model, optimizer, range(3)), train(plain, ordinary, range(3))
    for name in without[-1]:
        assert torch.equal(with_levels[-1][name], without[-1][name]), name


def test_a_level_moves_only_when_due():
    """Weights, moments and decay of the slow level stand still between steps n, 2n, ...; the fast level never does."""
    model, optimizer = start([1, 3])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    slow_state = {}
    for step, now in enumerate(train(model, optimizer, range(7)), start=1):
        for name in now:
            moved = not torch.equal(now[name], before[name])
            assert moved == ("levels.1" not in name or step % 3 == 0), f"{name} at step {step}"
        before = now
    for name, p in model.named_parameters():
        if "levels.1" in name:
            slow_state[name] = optimizer.state[p]
            assert optimizer.state[p]["accumulator"].abs().max() > 0  # step 7 is on its way to step 9
    assert slow_state
    clocks = {g["name"]: (g["clock"], g["updates"]) for g in optimizer.param_groups}
    assert clocks == {"base": (7, 7), "base.undecayed": (7, 7), "cms0": (7, 7), "cms0.undecayed": (7, 7),
                      "cms1": (7, 2), "cms1.undecayed": (7, 2)}  # fmt: skip


def test_the_due_step_is_one_step_on_the_mean_gradient():
    """With frozen other levels, period 3 on g1, g2, g3 equals period 1 on their mean."""
    p, q = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    settings = OptimConfig(lr=0.1)
    slow, plain = (
        Dmgd([{"params": [p], "period": 3, "weight_decay": 0.1}], settings),
        Dmgd([{"params": [q], "weight_decay": 0.1}], settings),
    )
    grads = [torch.randn(4) for _ in range(6)]
    for i, g in enumerate(grads):
        p.grad = g.clone()
        slow.step()
        if i % 3 == 2:
            q.grad = sum(grads[i - 2 : i + 1]) / 3
            plain.step()
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_resume_in_the_middle_of_a_period():
    """Saved after 4 of 7 steps with period 3 (one gradient accumulated) and reloaded: bit-equal to the whole run."""
    model, optimizer = start([1, 3])
    whole = train(model, optimizer, range(7))
    model, optimizer = start([1, 3])
    train(model, optimizer, range(4))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    model, optimizer = start([1, 3])
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    resumed = train(model, optimizer, range(4, 7))
    for name in whole[-1]:
        assert torch.equal(resumed[-1][name], whole[-1][name]), name


def test_one_level_is_a_transformer_feed_forward():
    chain, single = SequentialCms(config([1])), SequentialCms(named("transformer", width=16, heads=1))
    initialise(chain, 0)
    initialise(single, 0)
    x = torch.randn(5, 2, 16)
    assert torch.equal(chain(x), single(x))


def test_independent_variant_with_one_weight_is_the_single_block():
    """Weights (1, 0, 0): x + f_1(norm_1 x); and it differs from the chain of the same blocks."""
    settings = config([1, 2, 4], "independent")
    cms = IndependentCms(settings)
    initialise(cms, 0)
    x = torch.randn(5, 2, 16)
    with torch.no_grad():
        summed = x + sum(level(x) for level in cms.levels)
        torch.testing.assert_close(cms(x), summed)
        cms.aggregate.copy_(torch.tensor([1.0, 0.0, 0.0]))
        torch.testing.assert_close(cms(x), x + cms.levels[0](x))


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_any_number_of_levels_costs_about_the_same(levels):
    counted = sum(
        p.numel() for p in SequentialCms(ModelConfig(width=384, cms=CmsConfig(periods=[1] * levels))).parameters()
    )
    assert counted == pytest.approx(8 * 384**2, rel=0.09)


@pytest.mark.parametrize("variant", ["sequential", "independent"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_level_that_is_switched_off_is_one_whose_output_is_zero(variant, number):
    model, ids = Model(config([1, 2], variant)).initialise(0), batch(0)
    whole = model(ids)[0]
    with without_level([model], number):
        off = model(ids)[0]
    assert torch.equal(model(ids)[0], whole)
    with torch.no_grad():
        model.blocks["0"].cms.levels[number].mlp.down.weight.zero_()
    assert torch.equal(model(ids)[0], off)
    assert not torch.equal(off, whole)
