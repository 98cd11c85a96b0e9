"""Parameter groups: one per CMS level, and within it one for each way of being updated.

A level is a group with a clock (`period` in optimizer steps). Embedding, mixers, norms and head are level "base" with
period 1; block i's l-th MLP belongs to level "cms<l>". One-dimensional tensors are "<level>.undecayed"; with a matrix
optimizer, linear maps and memories' initial states are "<level>.matrices".
"""

import re
from collections.abc import Sequence

from torch import nn

from hope.config import ModelConfig
from hope.model import Model
from hope.optim.config import OptimConfig

_LEVEL = re.compile(r"\.cms\.levels\.(\d+)\.")
# Look-up tables, gates' read-outs and convolutions are not maps between spaces that an orthogonal matrix could be.
_ELEMENT_WISE = re.compile(r"^(embedding|head)\.|\.(eta|alpha)_weight$|\.conv_\w+\.")
MATRIX_OPTIMIZERS = ("muon", "m3")


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a matrix optimizer treats it as a matrix [n, m], or a stack of them [H, n, m]."""
    return parameter.ndim >= 2 and _ELEMENT_WISE.search(name) is None


def period_in_steps(config: ModelConfig, level: int, tokens_per_step: int | None) -> int:
    """The clock of a level in optimizer steps; `tokens_per_step` is needed when periods count tokens."""
    period = config.periods[level]
    if config.kind == "transformer" or config.cms.unit == "steps":
        return period
    if tokens_per_step is None or period % tokens_per_step:
        raise ValueError(f"a period of {period} tokens needs steps of a divisor of it, not of {tokens_per_step}")
    return period // tokens_per_step


def parameter_groups(
    models: Model | Sequence[Model],
    weight_decay: float,
    optim: OptimConfig | None = None,
    tokens_per_step: int | None = None,
) -> list[dict]:
    """Groups with keys name, period, weight_decay, vectors, matrices, params, names; every parameter in exactly one.

    `models`: the model, or several slices of it. Order and membership are a pure function of them, so that every
    data-parallel rank cuts the same flat buffers.
    """
    parts = [models] if isinstance(models, Model) else list(models)
    apart = optim is not None and optim.name in MATRIX_OPTIMIZERS
    groups: dict[str, dict] = {}
    for model, name, parameter in ((m, n, p) for m in parts for n, p in m.named_parameters()):
        found = _LEVEL.search(name)
        level = "base" if found is None else f"cms{found[1]}"
        decayed, matrix = parameter.ndim >= 2, apart and is_matrix(name, parameter)
        key = f"{level}.matrices" if matrix else level if decayed else f"{level}.undecayed"
        if key not in groups:
            period = 1 if found is None else period_in_steps(model.config, int(found[1]), tokens_per_step)
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
