"""The plan: every parameter's layout over tensor-parallel ranks, and how its gradient is combined.

It is derived from what each parameter declares where it is made (`hope.parameters`), never guessed from names. What a
wrong declaration does is silent: a partial gradient looks like a gradient. `python -m parallel.parity` therefore
compares every parameter against one device. `python -m parallel.plan CONFIG` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from hope.config import ModelConfig
from hope.model import Model
from hope.parameters import declaration_of, declarations


class GradientRule(Enum):
    """How the gradient of a tensor is combined over the tensor-parallel ranks."""

    LOCAL = "local"
    """Each rank has its own shard, and its own gradient."""
    PARTIAL = "partial"
    """Replicated, but used on the rank's own heads only: sum over ranks."""
    PARTIAL_UNDER_SEQUENCE = "partial under sequence parallelism"
    """Replicated, used on all of the trunk: identical on every rank, but if the trunk's tokens are divided, sum."""


@dataclass(frozen=True)
class Layout:
    """`dim`: the dimension that is cut over tensor-parallel ranks, or None for a replicated parameter."""

    dim: int | None
    rule: GradientRule

    def cut(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """This rank's part of the whole tensor (a view). Raises ValueError: the dimension does not divide."""
        if self.dim is None:
            return whole
        if whole.shape[self.dim] % size:
            raise ValueError(f"dimension {self.dim} of {tuple(whole.shape)} is not a multiple of {size} ranks")
        return whole.chunk(size, self.dim)[rank]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The whole tensor from the parts of all ranks."""
        return parts[0] if self.dim is None else torch.cat(parts, self.dim)


Plan = dict[str, Layout]
"""By single-device name."""


def layout_of(parameter: Tensor, name: str = "a parameter") -> Layout:
    """The layout that a parameter declares. Raises UndeclaredParameter."""
    declared = declaration_of(parameter, name)
    if declared.cut is not None:
        return Layout(declared.cut, GradientRule.LOCAL)
    partial = declared.used == "heads"
    return Layout(None, GradientRule.PARTIAL if partial else GradientRule.PARTIAL_UNDER_SEQUENCE)


def plan_of(models: nn.Module | Iterable[nn.Module]) -> Plan:
    """The plan of a model, or of several slices of one."""
    parts = [models] if isinstance(models, nn.Module) else list(models)
    return {name: layout_of(p, name) for model in parts for name, p in model.named_parameters()}


def plan_of_config(config: ModelConfig) -> Plan:
    """The plan of the whole model, allocating nothing."""
    with torch.device("meta"):
        return plan_of(Model(config))


def plan_table(config: ModelConfig) -> str:
    """The plan as text: name (blocks that are alike together), shape, division, gradient rule, update."""
    with torch.device("meta"):
        model = Model(config)
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, parameter, declared in declarations(model):
        layout = layout_of(parameter, name)
        shape = " x ".join(map(str, parameter.shape))
        update = declared.update + (f", {declared.head_rows} rows a head" if declared.head_rows else "")
        row = (_anywhere(name), shape, _division(parameter, layout), layout.rule.value, update)
        rows.setdefault(row, []).append(_block(name))
    titles = ("parameter", "shape", "over tensor ranks", "gradient", "update", "blocks")
    cells = [titles, *((*row, _ranges(blocks)) for row, blocks in rows.items())]
    widths = [max(len(line[column]) for line in cells) for column in range(len(titles))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _anywhere(name: str) -> str:
    head, dot, rest = name.partition("blocks.")
    return f"blocks.*.{rest.partition('.')[2]}" if dot and not head else name


def _block(name: str) -> str:
    return name.split(".")[1] if name.startswith("blocks.") else ""


def _division(parameter: Tensor, layout: Layout) -> str:
    if layout.dim is None:
        return "replicated"
    linear = parameter.ndim == 2 and declaration_of(parameter).update == "matrix"
    names = {0: "column-parallel", 1: "row-parallel"} if linear else {}
    return names.get(layout.dim, f"dimension {layout.dim}")


def _ranges(blocks: list[str]) -> str:
    """`0-2, 5` of block numbers."""
    numbers = [int(b) for b in blocks if b]
    stretches: list[list[int]] = []
    for number in numbers:
        if stretches and number == stretches[-1][-1] + 1:
            stretches[-1].append(number)
        else:
            stretches.append([number])
    return ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in stretches)
