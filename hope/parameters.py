"""Parameters that say what they are where they are made.

A parameter declares its initial value, how it is divided over tensor-parallel ranks, which part of the activations
it acts on, and how an optimizer updates it. The tensor-parallel plan, the gradient rules and the optimizer groups are
derived from these declarations (parallel/layout/plan.py, hope/optim/levels.py), so a new module needs no other entry.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

Init = Callable[[torch.Size, torch.Generator], Tensor]
Used = Literal["heads", "trunk"]
Update = Literal["matrix", "matrix_per_head", "elementwise"]


class UndeclaredParameter(TypeError):
    """A parameter that was not made by `new_parameter`; the message names it."""


@dataclass(frozen=True)
class Declaration:
    """What a parameter said of itself.

    init: fills a tensor of the whole shape.
    cut: the dimension that is divided over tensor-parallel ranks (heads, features, vocabulary); None: every rank has
        a copy.
    used: of a copy: "heads", on the rank's own heads or features only, so that each rank has a part of the gradient;
        or "trunk", on activations that all ranks hold, so that each has the whole gradient (of its own tokens, if the
        trunk's tokens are divided). None where the parameter is cut.
    update: "matrix", one map [out, in] that a matrix optimizer may orthogonalise; "matrix_per_head", a stack of them
        [heads, out, in]; "elementwise", anything else: look-up tables, gates, convolutions, norms.
    head_rows: of a map [out, in] whose output features belong to heads: how many consecutive rows one head has, so
        that a matrix optimizer may take each head's map by itself. None: the map is one.
    """

    init: Init
    cut: int | None
    used: Used | None
    update: Update
    head_rows: int | None = None


def normal(std: float) -> Init:
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def uniform(bound: float) -> Init:
    """Between -bound and bound."""
    return lambda shape, generator: bound * (2 * torch.rand(shape, generator=generator) - 1)


def constant(value: float) -> Init:
    return lambda shape, generator: torch.full(shape, value)


def spread(low: float, high: float) -> Init:
    """From low to high in even steps along the first dimension; their middle where there is one entry only."""

    def filled(shape: torch.Size, generator: torch.Generator) -> Tensor:
        values = torch.linspace(low, high, shape[0]) if shape[0] > 1 else torch.tensor([(low + high) / 2])
        return values.view(-1, *[1] * (len(shape) - 1)).expand(shape)

    return filled


def last_tap(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A convolution [channels, taps] that starts as the identity: only the newest tap is 1."""
    return torch.cat([torch.zeros(shape[0], shape[1] - 1), torch.ones(shape[0], 1)], -1)


def new_parameter(
    *shape: int,
    init: Init,
    cut: int | None = None,
    used: Used | None = None,
    update: Update,
    head_rows: int | None = None,
) -> nn.Parameter:
    """An unfilled parameter of the whole `shape`, with its declaration; the arguments are `Declaration`'s.

    Raises:
        ValueError: neither or both of `cut` and `used` are given, `update` does not fit the number of dimensions, or
            `head_rows` does not divide the rows of a map.
    """
    if (cut is None) == (used is None):
        raise ValueError(f"a parameter {shape} is either cut over ranks, or a copy that is used on heads or trunk")
    if update != "elementwise" and len(shape) != {"matrix": 2, "matrix_per_head": 3}[update]:
        raise ValueError(f"a parameter {shape} cannot be updated as {update}")
    if head_rows is not None and (update != "matrix" or cut == 1 or head_rows < 1 or shape[0] % head_rows):
        raise ValueError(f"a parameter {shape}, updated as {update} and cut at {cut}, has no heads of {head_rows} rows")
    parameter = nn.Parameter(torch.zeros(*shape))
    parameter.declaration = Declaration(init, cut, used, update, head_rows)  # type: ignore[attr-defined]
    return parameter


def scale_outputs(module: nn.Module, factor: float) -> None:
    """Multiply the initial values of every map whose input features are divided over ranks ("row" in `hope.layers`):
    what such a module adds to the trunk."""

    def scaled(init: Init) -> Init:
        return lambda shape, generator: init(shape, generator) * factor

    for _, parameter, declared in declarations(module):
        if declared.update == "matrix" and declared.cut == 1:
            parameter.declaration = replace(declared, init=scaled(declared.init))  # type: ignore[attr-defined]


def declaration_of(parameter: Tensor, name: str = "a parameter") -> Declaration:
    """What `parameter` declares.

    Raises:
        UndeclaredParameter: it was not made by `new_parameter`.
    """
    found: Declaration | None = getattr(parameter, "declaration", None)
    if found is None:
        raise UndeclaredParameter(f"{name} declares nothing; create it with hope.parameters.new_parameter")
    return found


def declarations(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Declaration]]:
    """(name, parameter, declaration) of every parameter. Raises UndeclaredParameter."""
    for name, parameter in model.named_parameters():
        yield name, parameter, declaration_of(parameter, name)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter from (seed, its name) alone, drawn in fp32 on the CPU.

    The draw of a tensor depends neither on the order of construction nor on which other blocks are present, so a
    pipeline stage, or a tensor-parallel shard cut from the full draw, starts from the weights of the whole model.

    Raises:
        UndeclaredParameter: a parameter was not made by `new_parameter`.
    """
    for name, parameter, declared in declarations(model):
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        parameter.copy_(declared.init(parameter.shape, generator))
