"""What a mixer is: the one thing in a block that mixes tokens over time, and the registry that knows mixers by name.

A mixer of your own is one file: a section, a class, a name (docs/extending.md). The program asks the protocol below for
everything else: memory prediction, FLOPs, the log, checkpoints and the referee know no mixer by type.

Shapes: T time, B batch, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from hope.dense import Dense
from hope.documents import Documents
from hope.flops import Flops
from hope.sections import MixerSection


@dataclass(frozen=True)
class Trunk:
    """What a mixer is told of the model around it."""

    width: int
    heads: int
    layers: int

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads


@dataclass(frozen=True)
class State:
    """What a mixer carries from one call to the next. Subclass it as a frozen dataclass of tensors, or of tuples and
    dataclasses of tensors; every tensor has the sequences on its first dimension. Other values are left alone.

    One call of a mixer equals any cutting of it into calls that hand the state on.
    """

    def detach(self) -> Self:
        """The same values with no gradient to the past (truncated backpropagation between calls)."""
        return map_tensors(self, lambda t: t.detach())

    def reset(self, rows: Tensor, initial: Self) -> Self:
        """Where rows [B] is true, a sequence starts anew from `initial` (from `Mixer.start`)."""
        chosen = lambda new, old: new.where(rows.view(-1, *[1] * (old.ndim - 1)), old)
        return map_tensors(self, chosen, initial)

    def nbytes(self) -> int:
        """Bytes of all tensors, each once."""
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors_of(self)}.values())

    def compared(self) -> dict[str, Tensor]:
        """The tensors that a referee compares between layouts, by name; {}: nothing is compared, and it says so."""
        return {}


S = TypeVar("S")


def map_tensors(value: S, change: Callable[..., Tensor], *others: Any) -> S:
    """`value` with every tensor in it replaced by change(tensor of others[0], ..., tensor).

    Dataclasses and tuples are walked through, other values stay. `others` have the structure of `value`.
    """
    if isinstance(value, Tensor):
        return change(*others, value)  # type: ignore[return-value]
    if isinstance(value, tuple):
        return tuple(map_tensors(v, change, *o) for v, *o in zip(value, *others, strict=True))  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {
            item.name: map_tensors(getattr(value, item.name), change, *(getattr(o, item.name) for o in others))
            for item in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **parts)
    return value


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in a dataclass or tuple, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_of(part)
    elif dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from tensors_of(getattr(value, item.name))


@dataclass
class Report:
    """What a mixer tells the log of its last pass, detached.

    scalars: one number each, `NAME` in the log becomes `NAME.LAYER`. histograms: tensors of any shape.
    """

    scalars: dict[str, Tensor] = field(default_factory=dict)
    histograms: dict[str, Tensor] = field(default_factory=dict)


class Mixer(Dense):
    """Base of all mixers; `name` is filled in by `mixer`.

    A constructor takes (trunk, section). Make every parameter with `hope.parameters.new_parameter`, or of modules that
    do. Pass the input through `enter` before the first product with a cut parameter, and the output through `leave`
    after the last. What needs a sum over all heads in between passes the sum over its own through `total`. All three
    are the identity until a tensor-parallel layout replaces them.

    Attributes:
        chunk: tokens between two writes of the state; memory use is linear in whole chunks. 1: no chunks.
        period: chunks after which what is kept for the backward has grown by as much again.
        first_head: of the heads that are here, its number among those of the model; a tensor-parallel layout sets it.
        watched: whether the next forward passes put what `report` tells into `collected`.
        collected: of the last forward pass while `watched`. A pass that is a CUDA graph has its own, with new numbers.
        form: what its dense parts go through, see `hope.dense`.
        compiles_whole: whether `train.compile=block` makes one graph of a block around it, or takes its dense parts.
    """

    name = ""
    chunk = 1
    period = 1
    compiles_whole = True
    first_head = 0
    watched = False

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Identity(), nn.Identity()
        self.total: nn.Module = nn.Identity()
        self.collected = Report()

    def forward(
        self, x_TBD: Tensor, state: State | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, State | None]:
        """Mix over time.

        Args:
            x_TBD: normed activations [T, B, D].
            state: what the call before returned, or None to start every sequence anew.
            documents: where documents begin; they do not see each other. None: one document per row, continued.

        Returns: y [T, B, D] to be added to the trunk, and the state for the next call.
        """
        raise NotImplementedError

    def start(self, batch: int) -> State | None:
        """The state of `batch` sequences before their first token; None for a mixer without any."""
        return None

    def flops(self, length: int) -> Flops:
        """FLOPs per token, forward, at this sequence length."""
        raise NotImplementedError

    def report(self) -> Report:
        """What the last forward pass collected while `watched`."""
        return self.collected

    def kernels(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Which kernel would run on `device` with weights of `dtype`, and why, such as `plain (CPU)`; None for a mixer
        that has one form."""
        return None


class MixerKind(NamedTuple):
    """A registered mixer: what makes one from (trunk, section), and the dataclass of its section."""

    build: Callable[[Trunk, Any], Mixer]
    section: type[MixerSection]


MIXERS: dict[str, MixerKind] = {}
"""By the name that `model.pattern` uses. `mixer` is the only one that writes here."""


def mixer(name: str, section: type[MixerSection]) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator: register a mixer, `model.mixers.NAME` being its section.

    Raises:
        ValueError: another class has the name.
    """

    def register(cls: type[Mixer]) -> type[Mixer]:
        known = MIXERS.get(name)
        if known is not None and known.section.__qualname__ != section.__qualname__:
            raise ValueError(f"a mixer is called {name!r} already; {cls.__qualname__} needs another name")
        cls.name = name
        MIXERS[name] = MixerKind(cls, section)
        return cls

    return register
