"""This rank's share of the master weights and gradients, whichever class DeepSpeed keeps them in.

DeepSpeed 0.19.8 ends in `DeepSpeedZeroOptimizer` for fp32 and in `BF16_Optimizer` for bf16 parameters with fp32
gradient accumulation. Both flatten a parameter group in order, pad it to a multiple of 2 × dp, and cut it into dp
equal partitions; they differ in where gradients lie and in how they step (one call per group, or one for all).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Slice:
    """The piece of one parameter that lies in this rank's flat partition of a parameter group.

    `partition[start : start + numel]` is `parameter.view(-1)[offset : offset + numel]`; `index` is the
    parameter's position in `model.named_parameters()` and `name` its name there.
    """

    name: str
    index: int
    start: int
    offset: int
    numel: int


class Partitions(Protocol):
    """One flat fp32 tensor per parameter group, masters and gradients alike."""

    masters: list[torch.Tensor]

    def fill_missing(self) -> None:
        """Give a zero gradient to parameters that took no part in the backward pass."""

    def accumulated(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """The fp32 gradient of a parameter before the reduction, zeros if there was none; None if not optimized."""

    def gradients(self) -> list[torch.Tensor]:
        """The reduced gradients of `masters`, fp32, padding zero. Call it after the reduction."""

    def publish(self) -> None:
        """Copy the masters into the parameters and all-gather them."""

    def clear(self) -> None:
        """Forget every gradient."""


class Fp32Partitions:
    """Partitions held by `DeepSpeedZeroOptimizer` (runtime/zero/stage_1_and_2.py)."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.masters = optimizer.single_partition_of_fp32_groups
        self._known = {parameter for group in optimizer.bit16_groups for parameter in group}
        if any(padding for group in optimizer.round_robin_bit16_padding for padding in group):
            raise AssertionError("DeepSpeed padded between parameters although parameter_alignment is off")

    def fill_missing(self) -> None:
        for group in self._optimizer.bit16_groups:
            for parameter in group:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def accumulated(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        if parameter not in self._known:
            return None
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def gradients(self) -> list[torch.Tensor]:
        flat = []
        for index, master in enumerate(self.masters):
            pieces = self._optimizer.averaged_gradients[index]
            flat.append(torch.cat([piece.reshape(-1) for piece in pieces]))
            # The pieces keep whole parameters' gradients alive; the flat copy is all that is needed.
            self._optimizer.averaged_gradients[index] = None
            if flat[-1].numel() != master.numel():
                raise AssertionError(f"gradient partition {flat[-1].numel()} != master {master.numel()} elements")
        return flat

    def publish(self) -> None:
        self._optimizer.update_lp_params()

    def clear(self) -> None:
        for index in range(len(self.masters)):
            self._optimizer.averaged_gradients[index] = None
            self._optimizer.all_grad_tensors[index] = None
        self._optimizer.zero_grad(set_to_none=True)


class Bf16Partitions:
    """Partitions held by `BF16_Optimizer` (runtime/bf16_optimizer.py).

    Its hooks add every bf16 gradient to an fp32 buffer at once and free it, so a missing gradient is zero.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.masters = optimizer.fp32_groups_flat_partition
        pairs = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
        self._buffers = {p: grad for group, grads in pairs for p, grad in zip(group, grads, strict=True)}

    def fill_missing(self) -> None:
        """Nothing to do: the fp32 buffers start at zero."""

    def accumulated(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        gradient = self._buffers.get(parameter)
        return None if gradient is None else gradient.view_as(parameter)

    def gradients(self) -> list[torch.Tensor]:
        return list(self._optimizer.fp32_groups_gradient_flat_partition)

    def publish(self) -> None:
        self._optimizer.update_lp_params()

    def clear(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)


def partitions_of(optimizer: Any) -> Partitions:
    """The adapter for what `deepspeed.initialize` returned as its optimizer."""
    known: dict[str, Callable[[Any], Partitions]] = {
        "DeepSpeedZeroOptimizer": Fp32Partitions,
        "BF16_Optimizer": Bf16Partitions,
    }
    name = type(optimizer).__name__
    if name not in known:
        raise AssertionError(f"DeepSpeed chose {name}; this code knows {', '.join(known)} (deepspeed 0.19.8)")
    return known[name](optimizer)


def slices_of(group: list[tuple[int, str, int]], partition_numel: int, rank: int) -> list[Slice]:
    """What of a group lies in partition `rank`; `group` holds (index, name, numel) of its parameters in order."""
    first, last = rank * partition_numel, (rank + 1) * partition_numel
    slices, begin = [], 0
    for index, name, numel in group:
        low, high = max(begin, first), min(begin + numel, last)
        if low < high:
            slices.append(Slice(name, index, low - first, low - begin, high - low))
        begin += numel
    return slices
