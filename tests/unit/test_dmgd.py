"""DMGD's limits against torch's own optimizers (hope-math invariant 15), in float64 over 20 steps."""

import dataclasses

import pytest
import torch
from optims import with_dmgd

from hope.optim.config import OptimConfig
from hope.optim.dmgd import Dmgd
from hope.optim.rules import Rates, UpdateRule


def problem(seed: int = 0) -> tuple[list[torch.nn.Parameter], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    return [torch.nn.Parameter(draw(5, 3)), torch.nn.Parameter(draw(7))], [draw(5, 3), draw(7)]


def follow(make, steps: int = 20, scale: float = 1.0) -> list[torch.Tensor]:
    """Parameters after `steps` of gradient descent on a quartic around fixed targets."""
    params, targets = problem()
    optimizer = make(params)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (1 + step)  # a moving rate: the memory must not depend on it
        optimizer.zero_grad()
        loss = sum((p - t).square().square().sum() for p, t in zip(params, targets, strict=True))
        (loss * scale).backward()
        optimizer.step()
    return [p.detach() for p in params]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


def test_l2_with_adam_normaliser_is_adamw():
    config = OptimConfig(beta1=0.9, beta2=0.95, eps=1e-8)
    ours = follow(lambda p: Dmgd([{"params": p, "weight_decay": 0.1}], config))
    torchs = follow(lambda p: torch.optim.AdamW(p, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1))
    assert_same(ours, torchs)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_dot_is_sgd_with_momentum(decay):
    config = with_dmgd(objective="dot", preconditioner="none", beta1=0.9)

    def torchs(params):
        """torch couples decay into the gradient; ours is decoupled, so decay is applied to the weights beforehand."""
        optimizer = torch.optim.SGD(params, momentum=0.9)
        original = optimizer.step

        def step():
            with torch.no_grad():
                for p in params:
                    p.mul_(1 - optimizer.param_groups[0]["lr"] * decay)
            original()

        optimizer.step = step
        return optimizer

    assert_same(follow(lambda p: Dmgd([{"params": p, "weight_decay": decay}], config)), follow(torchs))


def test_l2_without_normaliser_is_a_moving_average():
    config = with_dmgd(preconditioner="none", bias_correction=False, beta1=0.8)
    torchs = lambda p: torch.optim.SGD(p, momentum=0.8, dampening=0.2)
    ours = follow(lambda p: Dmgd([{"params": p}], config))
    reference = follow(torchs)
    # torch's first buffer is the whole gradient, ours (1 - beta1) of it: equal only after correcting that start
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(ours, reference, strict=True))
    memory, (p, _), (t, _) = 0.0, *problem()
    p = p.detach().clone()
    for step in range(20):
        memory = 0.8 * memory + 0.2 * 4 * (p - t) ** 3
        p = p - 0.05 / (1 + step) * memory
    torch.testing.assert_close(ours[0], p, rtol=1e-13, atol=1e-13)


def test_grad_scale_multiplies_the_gradient():
    config = with_dmgd(objective="dot", preconditioner="none")
    scaled = follow(lambda p: Dmgd([{"params": p, "grad_scale": 0.25}], config))
    plain = follow(lambda p: Dmgd([{"params": p}], config), scale=0.25)
    assert_same(scaled, plain)


@pytest.mark.parametrize("name", ["adamw", "muon", "m3"])
def test_what_is_not_dmgd_has_the_setting_of_adamw_whatever_the_section_dmgd_says(name):
    other = with_dmgd(objective="dot", memory="mlp", mlp_key="gradient", output="rms_clip", erase=0.1)
    group = {"updates": 3, "lr": 0.1, "weight_decay": 0.1}
    plain, renamed = OptimConfig(), dataclasses.replace(other, name=name)
    assert UpdateRule.of(renamed) == UpdateRule.of(plain) != UpdateRule.of(other)
    assert Rates.of(renamed, group, 1.0) == Rates.of(plain, group, 1.0) != Rates.of(other, group, 1.0)
    assert list(renamed.problems()) == []


def test_absent_gradients_leave_clock_and_weights_alone():
    params, _ = problem()
    before = [p.detach().clone() for p in params]
    optimizer = Dmgd([{"params": params, "period": 2, "weight_decay": 0.1}], OptimConfig())
    optimizer.step()
    assert optimizer.param_groups[0]["clock"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
