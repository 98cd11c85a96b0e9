"""CMS levels that learn from a stream while a model reads it.

The stream is cut into windows of `Settings.every` tokens. A window's next-token loss is taken with the weights that
the windows before it have left, and only then learned from, so that no score depends on its own token or a later one
(prequential evaluation: Dawid, 1984, *Present position and potential developments*). A level with period C moves at
every C-th window, by the mean gradient of C windows (Eq. 71, Section 7.2): the clocks are those of training, with
windows as steps. The gradient ends where a call to the model begins: what a memory holds from before is a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hope.adapt.settings import AdaptError, Settings
from hope.mixers.base import map_tensors
from hope.model import Model, States
from hope.optim.build import build_optimizer
from hope.optim.levels import level_of_group, levels_of, parameter_groups
from hope.parameters import declarations


@dataclass(frozen=True)
class Learned:
    """All that a learner holds, as a state file keeps it: tensors by name, and a record of plain JSON."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


class Learner:
    """The levels of `model` that learn, as `settings` say. All other parameters are frozen: they need no gradient.

    The model's levels get storage of their own, for that of a checkpoint may be its file.

    Attributes:
        gathered: tokens of the window that is not complete; their gradient waits for the others.

    Raises:
        AdaptError: the weights have fewer bits than fp32.
    """

    def __init__(self, model: Model, settings: Settings) -> None:
        dtype = next(model.parameters()).dtype
        if dtype not in (torch.float32, torch.float64):
            short = str(dtype).removeprefix("torch.")
            raise AdaptError(f"--adapt: steps are lost in the rounding of {short} weights; give --dtype float32")
        self.settings, self.gathered = settings, 0
        optim = settings.optim
        groups = parameter_groups(model, optim.weight_decay, optim, settings.every)
        level_of = levels_of(model)
        self._learning = {n: p for n, p, _ in declarations(model) if level_of.get(p) in settings.levels}
        model.requires_grad_(False)
        self._initial = {name: p.data for name, p in self._learning.items()}
        for p in self._learning.values():
            p.data, p.grad = p.data.clone(), None
            p.requires_grad_(True)
        self._optimizer = build_optimizer(groups, optim)
        self._optimizer.allocate_states()

    @property
    def room(self) -> int:
        """Tokens until the window is complete, at least 1."""
        return self.settings.every - self.gathered

    @property
    def parameters(self) -> int:
        """Weights that learn."""
        return sum(p.numel() for p in self._learning.values())

    @property
    def updates(self) -> dict[str, int]:
        """Updates of every level that learns, by its name."""
        found = {level_of_group(g["name"]): g["updates"] for g in self._optimizer.learning()}
        return {f"level{name.removeprefix('cms')}": count for name, count in sorted(found.items())}

    def learn(self, nats: Tensor, tokens: int) -> None:
        """Take in the loss of tokens that were scored; after the last one of a window, every level that is due moves.

        Args:
            nats: sum of minus log probability of these tokens, scalar, with its graph.
            tokens: how many these are, at most `room`.

        Raises:
            ValueError: there are more than `room`.
            AdaptError: the loss is not finite.
        """
        if not 1 <= tokens <= self.room:
            raise ValueError(f"{tokens} tokens in a window that has room for {self.room}")
        if not torch.isfinite(nats):
            made = ", ".join(f"{count} of {name}" for name, count in self.updates.items())
            raise AdaptError(f"the loss is {nats.item()} after updates: {made}; give a lower rate than {self.settings}")
        (nats / self.settings.every).backward()
        self.gathered += tokens
        if self.room == 0:
            self._optimizer.step()
            self._optimizer.discard()
            self.gathered = 0

    def restore(self) -> None:
        """Give the model the weights that it came with."""
        for name, p in self._learning.items():
            p.data, p.grad = self._initial[name], None

    def learned(self) -> Learned:
        """Weights of the levels, states and clocks of their optimizer, and the gradient that waits: no copies, so that
        what is learned later changes them."""
        tensors = {}
        for name, p in self._learning.items():
            tensors[f"weight/{name}"] = p.detach()
            tensors |= {f"state/{key}/{name}": value for key, value in self._optimizer.state[p].items()}
            if p.grad is not None:
                tensors[f"gradient/{name}"] = p.grad
        clocks = {g["name"]: {"clock": g["clock"], "updates": g["updates"]} for g in self._optimizer.learning()}
        return Learned(tensors, {"settings": _plain(self.settings), "clocks": clocks, "gathered": self.gathered})

    def load(self, learned: Learned) -> None:
        """Go on where another learner stood, to the bit.

        Raises:
            AdaptError: it had other settings.
            KeyError, TypeError, ValueError: this is not all that a learner of these settings holds.
        """
        theirs = settings_in(learned.record)
        if theirs != self.settings:
            raise AdaptError(f"was written with {theirs}, now {self.settings}; give those options again")
        clocks, gathered = learned.record["clocks"], int(learned.record["gathered"])
        if not 0 <= gathered < self.settings.every:
            raise ValueError(f"{gathered} tokens gathered of a window of {self.settings.every}")
        for group in self._optimizer.learning():
            group["clock"], group["updates"] = (int(clocks[group["name"]][key]) for key in ("clock", "updates"))
        for name, p in self._learning.items():
            p.data.copy_(_fitting(learned.tensors, f"weight/{name}", p))
            for key, value in self._optimizer.state[p].items():
                value.copy_(_fitting(learned.tensors, f"state/{key}/{name}", value))
            p.grad = _fitting(learned.tensors, f"gradient/{name}", p).to(p.device).clone() if gathered else None
        self.gathered = gathered


def settings_in(record: Mapping[str, Any]) -> Settings:
    """The settings of what `Learner.learned` recorded. Raises KeyError or TypeError for another record."""
    found = record["settings"]
    return Settings(tuple(found["levels"]), found["rate"], found["every"])


def detached(states: States) -> States:
    """The same memories, which no gradient leaves: the graph of one call is let go before the next."""
    return {number: map_tensors(state, lambda t: t.detach()) for number, state in states.items()}


def _plain(settings: Settings) -> dict[str, Any]:
    return {"levels": list(settings.levels), "rate": settings.rate, "every": settings.every}


def _fitting(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    found = tensors[name]
    if found.shape != like.shape or found.dtype != like.dtype:
        raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, not {like.dtype} {list(like.shape)}")
    return found
