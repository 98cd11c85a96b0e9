"""THE table: every parameter's layout over tensor-parallel ranks, and how its gradient is combined.

A pattern matches a single-device name, `*` standing for one part between dots. A parameter that matches no row, or two,
is an error: a layout is declared, never guessed. What a wrong row does is silent (a partial gradient looks like a
gradient), so `python -m parallel.parity` compares every parameter against one device.
"""

import re
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Rule(Enum):
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
    rule: Rule

    def cut(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """This rank's part of the whole tensor (a view)."""
        if self.dim is None:
            return whole
        if whole.shape[self.dim] % size:
            raise ValueError(f"dimension {self.dim} of {tuple(whole.shape)} is not a multiple of {size} ranks")
        return whole.chunk(size, self.dim)[rank]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The whole tensor from the parts of all ranks."""
        return parts[0] if self.dim is None else torch.cat(parts, self.dim)


ROWS = Layout(0, Rule.LOCAL)  # output features (column-parallel product), heads, channels, or vocabulary
COLUMNS = Layout(1, Rule.LOCAL)  # input features (row-parallel product)
PER_HEAD = Layout(None, Rule.PARTIAL)
TRUNK = Layout(None, Rule.PARTIAL_UNDER_SEQUENCE)

PLAN: dict[str, Layout] = {
    "embedding.weight": ROWS,
    "head.weight": ROWS,
    "norm.weight": TRUNK,
    "blocks.*.norm.weight": TRUNK,
    # self-modifying Titans: heads over ranks, nothing crosses ranks inside the memory loop
    "blocks.*.mixer.input.weight": ROWS,
    "blocks.*.mixer.query.weight": ROWS,
    "blocks.*.mixer.gate.weight": ROWS,
    "blocks.*.mixer.conv_input.weight": ROWS,
    "blocks.*.mixer.conv_query.weight": ROWS,
    "blocks.*.mixer.static_k": ROWS,
    "blocks.*.mixer.static_v": ROWS,
    "blocks.*.mixer.eta_weight": ROWS,
    "blocks.*.mixer.eta_bias": ROWS,
    "blocks.*.mixer.alpha_weight": ROWS,
    "blocks.*.mixer.alpha_bias": ROWS,
    "blocks.*.mixer.memories.initial.*": ROWS,
    "blocks.*.mixer.norm.weight": PER_HEAD,
    "blocks.*.mixer.output.weight": COLUMNS,
    # softmax attention (query and output as above)
    "blocks.*.mixer.key.weight": ROWS,
    "blocks.*.mixer.value.weight": ROWS,
    # continuum memory system
    "blocks.*.cms.levels.*.norm.weight": TRUNK,
    "blocks.*.cms.levels.*.mlp.gate.weight": ROWS,
    "blocks.*.cms.levels.*.mlp.up.weight": ROWS,
    "blocks.*.cms.levels.*.mlp.down.weight": COLUMNS,
    "blocks.*.cms.aggregate": TRUNK,
}


class PlanError(Exception):
    """A parameter without exactly one row in the table."""


def layout_of(name: str, plan: dict[str, Layout] = PLAN) -> Layout:
    """The row of a parameter.

    Raises:
        PlanError: no pattern matches, or more than one does.
    """
    found = [pattern for pattern in plan if re.fullmatch(_regex(pattern), name)]
    if len(found) != 1:
        matched = "no row of the plan" if not found else "rows " + " and ".join(found)
        raise PlanError(f"parameter {name} matches {matched}; give it exactly one in parallel/layout/plan.py")
    return plan[found[0]]


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", r"[^.]+")
