"""Retention of the moving averages of a parameter group's coming update: its own, and a warm-up of beta1.

A warm-up counts steps, as the learning rate's does: a level of period C has its n-th update at step n C.
"""

from functools import cache
from typing import Any

from hope.optim.config import OptimConfig


def beta1_at(step: int, *, final: float, start: float, warmup: int) -> float:
    """beta1 of step number `step`, counted from 1: `start` in the first, linear, `final` from step warmup + 1 on."""
    if step > warmup:
        return final
    return start + (final - start) * (step - 1) / warmup


def beta1_of(config: OptimConfig, group: dict[str, Any]) -> float:
    """beta1 of the update that `group`, whose `clock` has reached it, is about to make."""
    final = config.beta1 if group.get("beta1") is None else group["beta1"]
    if not config.momentum_warmup:
        return float(final)
    return beta1_at(group["clock"], final=final, start=config.beta1_start, warmup=config.momentum_warmup)


def beta2_of(config: OptimConfig, group: dict[str, Any]) -> float:
    """beta2 of a group."""
    return float(config.beta2 if group.get("beta2") is None else group["beta2"])


def retained(config: OptimConfig, group: dict[str, Any], updates: int) -> float:
    """What an average with `beta1_of` keeps of its start after a number of updates: the product of their beta1."""
    final = float(config.beta1 if group.get("beta1") is None else group["beta1"])
    if not config.momentum_warmup:
        return final**updates
    warm = _products(final, config.beta1_start, config.momentum_warmup, group["period"])
    inside = min(updates, len(warm) - 1)
    return float(warm[inside] * final ** (updates - inside))


@cache
def _products(final: float, start: float, warmup: int, period: int) -> tuple[float, ...]:
    """Products of beta1 over the first 0, 1, ... updates of a period that lie in the warm-up."""
    found = [1.0]
    for step in range(period, warmup + 1, period):
        found.append(found[-1] * beta1_at(step, final=final, start=start, warmup=warmup))
    return tuple(found)
