"""Parameter groups: one per CMS level, and within it one for each way of being updated.

A level is a group with a clock (`period` in optimizer steps). Embedding, mixers, norms and head are level "base" with
period 1; block i's l-th MLP belongs to level "cms<l>". One-dimensional tensors are "<level>.undecayed"; with a matrix
optimizer, what declares to be a matrix, or one per head, is "<level>.matrices" (`hope.parameters.Declaration.update`).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hope.block import Block
from hope.config import ModelConfig
from hope.model import Model
from hope.optim.config import OptimConfig
from hope.parameters import declarations

MATRIX_OPTIMIZERS = ("muon", "m3")


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
    """Groups with keys name, period, weight_decay, vectors, matrices, params, names; every parameter in exactly one.

    `models`: the model, or several slices of it. Order and membership are a pure function of them, so that every
    data-parallel rank cuts the same flat buffers.
    """
    parts = [models] if isinstance(models, Model) else list(models)
    apart = optim is not None and optim.name in MATRIX_OPTIMIZERS
    groups: dict[str, dict[str, Any]] = {}
    level_of = {parameter: level for model in parts for parameter, level in levels_of(model).items()}
    for model, name, parameter, declared in ((m, *found) for m in parts for found in declarations(m)):
        found = level_of.get(parameter)
        level = "base" if found is None else f"cms{found}"
        decayed, matrix = parameter.ndim >= 2, apart and declared.update != "elementwise"
        key = f"{level}.matrices" if matrix else level if decayed else f"{level}.undecayed"
        if key not in groups:
            period = 1 if found is None else period_in_steps(model.config, found, tokens_per_step)
            groups[key] = {
                "name": key,
                "period": period,
                "weight_decay": weight_decay if decayed else 0.0,
                "vectors": not decayed,
                "matrices": matrix,
                "params": [],
                "names": [],
            }
        groups[key]["params"].append(parameter)
        groups[key]["names"].append(name)
    return [groups[key] for key in sorted(groups)]
