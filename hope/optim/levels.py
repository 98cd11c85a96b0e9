"""Parameter groups: one per CMS level, and within it one for each way of being updated.

A level is a group with a clock (`period` in optimizer steps). Embedding, mixers, norms and head are level "base" with
period 1; block i's l-th MLP belongs to level "cms<l>". One-dimensional tensors are "<level>.undecayed"; with a matrix
optimizer, what declares to be a matrix, or one per head, is "<level>.matrices" (`hope.parameters.Declaration.update`).
Whatever else is updated in a way of its own has a group of its own, which `hope.optim.policy.Policy` names.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hope.block import Block
from hope.config import ModelConfig
from hope.model import Model
from hope.optim.config import OptimConfig
from hope.optim.policy import policy_of
from hope.parameters import declarations


def period_in_steps(config: ModelConfig, level: int, tokens_per_step: int | None) -> int:
    """The clock of a level in optimizer steps; `tokens_per_step` is needed when periods count tokens."""
    period = config.periods[level]
    if config.cms.unit == "steps":
        return period
    if tokens_per_step is None or period % tokens_per_step:
        raise ValueError(f"a period of {period} tokens needs steps of a divisor of it, not of {tokens_per_step}")
    return period // tokens_per_step


def levels_of(model: Model) -> dict[Tensor, int]:
    """The CMS level of every parameter that belongs to one."""
    found: dict[Tensor, int] = {}
    for block in model.blocks.values():
        assert isinstance(block, Block)
        for number, level in enumerate(block.cms.levels):
            found |= dict.fromkeys(level.parameters(), number)
    return found


def parameter_groups(
    models: Model | Sequence[Model],
    weight_decay: float,
    optim: OptimConfig | None = None,
    tokens_per_step: int | None = None,
) -> list[dict[str, Any]]:
    """Groups with the keys of a `Policy`, params and names; every parameter in exactly one.

    `models`: the model, or several slices of it. Order and membership are a pure function of them, so that every
    data-parallel rank cuts the same flat buffers.
    """
    parts = [models] if isinstance(models, Model) else list(models)
    groups: dict[str, dict[str, Any]] = {}
    level_of = {parameter: level for model in parts for parameter, level in levels_of(model).items()}
    for model, name, parameter, declared in ((m, *found) for m in parts for found in declarations(m)):
        number = level_of.get(parameter)
        level = "base" if number is None else f"cms{number}"
        period = 1 if number is None else period_in_steps(model.config, number, tokens_per_step)
        policy = policy_of(name, parameter, declared, level, period, optim, weight_decay)
        group = groups.setdefault(policy.name, {**dataclasses.asdict(policy), "params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def level_of_group(name: str) -> str:
    """The level of a parameter group's name; all groups of a level have one clock."""
    return name.partition(".")[0]


def counters_of(name: str, saved: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """`clock` and `updates` of the group `name` from those that a checkpoint has by group name.

    Groups of a level keep one time, so that what was grouped otherwise, or had another name, finds its level's.

    Raises:
        KeyError: no group of its level is there.
    """
    if name in saved:
        return dict(saved[name])
    found = [counters for other, counters in saved.items() if level_of_group(other) == level_of_group(name)]
    if not found:
        raise KeyError(name)
    return dict(max(found, key=lambda counters: counters["clock"]))
