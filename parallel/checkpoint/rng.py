"""The states of a rank's random generators: torch's on the CPU and the GPU, Python's, NumPy's.

No step of training draws from them: weights are filled from (seed, name) and the order of the data is a pure function.
They are kept so that code which does draw resumes alike in the layout that saved it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hope.stored.manifest import TensorEntry
from parallel.checkpoint.format.planner import Part
from parallel.start.groups import Ranks


def states(ranks: Ranks) -> dict[str, Tensor]:
    """rng/KIND/RANK -> bytes."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    host = json.dumps({"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]})
    found = {"torch": torch.get_rng_state(), "host": torch.tensor(list(host.encode()), dtype=torch.uint8)}
    if ranks.device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return {f"rng/{kind}/{ranks.rank:05d}": state for kind, state in found.items()}


def places(tensors: Mapping[str, TensorEntry], ranks: Ranks) -> dict[str, Tensor]:
    """Tensors to read this rank's states into."""
    mine = [name for name in tensors if name.startswith("rng/") and name.endswith(f"/{ranks.rank:05d}")]
    return {name: torch.empty(tensors[name].shape, dtype=torch.uint8) for name in mine}


def parts(states: Mapping[str, Tensor]) -> list[Part]:
    """The states as parts of a checkpoint: a tensor of its own each."""
    return [Part(name, tuple(state.shape), (0,), state) for name, state in states.items()]


def restore(states: Mapping[str, Tensor]) -> None:
    """Put the generators into `states`."""
    for name, state in states.items():
        kind = name.split("/")[1]
        if kind == "torch":
            torch.set_rng_state(state)
        elif kind == "cuda" and torch.cuda.is_available():
            torch.cuda.set_rng_state(state)
        elif kind == "host":
            host = json.loads(bytes(state.tolist()))
            version, internal, gauss = host["python"]
            random.setstate((version, tuple(internal), gauss))
            name_of_generator, keys, *rest = host["numpy"]
            np.random.set_state((name_of_generator, np.array(keys, dtype=np.uint32), *rest))
