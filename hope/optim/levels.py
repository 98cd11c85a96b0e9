"""Parameter groups: one per CMS level, and within it one for decayed and one for undecayed tensors.

A level is a group with a clock (`period` in optimizer steps). Embedding, mixers, norms and head are level "base" with
period 1; block i's l-th MLP belongs to level "cms<l>".
"""

import re
from collections.abc import Sequence

from hope.model import Model

_LEVEL = re.compile(r"\.cms\.levels\.(\d+)\.")


def parameter_groups(models: Model | Sequence[Model], weight_decay: float) -> list[dict]:
    """Groups with keys name, period, weight_decay, params, names; every parameter in exactly one.

    `models`: the model, or several slices of it. Order and membership are a pure function of them, so that every
    data-parallel rank cuts the same flat buffers.
    """
    parts = [models] if isinstance(models, Model) else list(models)
    groups: dict[str, dict] = {}
    for model, name, parameter in ((m, n, p) for m in parts for n, p in m.named_parameters()):
        found = _LEVEL.search(name)
        level = "base" if found is None else f"cms{found[1]}"
        decayed = parameter.ndim >= 2
        key = level if decayed else f"{level}.undecayed"
        if key not in groups:
            period = 1 if found is None else model.config.periods[int(found[1])]
            decay = weight_decay if decayed else 0.0
            groups[key] = {"name": key, "period": period, "weight_decay": decay, "params": [], "names": []}
        groups[key]["params"].append(parameter)
        groups[key]["names"].append(name)
    return [groups[key] for key in sorted(groups)]
