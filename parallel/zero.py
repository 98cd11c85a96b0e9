"""ZeRO-1: DeepSpeed averages gradients and owns the partitions, our optimizer updates them.

Gradients are accumulated by `pipeline.forward_backward`; then per step: `reduce`, `grad_norms`, and either `step`
or `discard`. One reduction and one all-gather (per parameter group) of the model per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel import engine
from parallel.errors import CheckpointError
from parallel.groups import Ranks, data_group
from parallel.partitions import Slice, partitions_of, slices_of


class ShardedOptimizer:
    """A torch optimizer whose states and fp32 master weights are divided over the data-parallel ranks.

    After construction `optimizer.param_groups[i]["params"]` is ONE flat fp32 tensor: this rank's partition of the
    group. It crosses the boundaries of matrices; `slices[i]` says which piece of which parameter lies where, the
    rest is zero padding. All other keys of a group stay. `optimizer.step()` is called once per step with all groups
    and must multiply its gradients by `group["grad_scale"]`.

    Args:
        model: the plain model; moved to the device, cast to bf16 with precision "bf16" (buffers keep their
            dtype), and broadcast from data-parallel rank 0.
        optimizer: a fresh torch optimizer over parameters of `model`.
        precision: "fp32", or "bf16": bf16 parameters, fp32 masters, fp32 gradient accumulation.
        ranks: what `groups.start` gave.
        zero: the ZeRO stage; 1 is the only one in this version.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, precision: str, ranks: Ranks, zero: int = 1
    ) -> None:
        self.optimizer = optimizer
        self.ranks = ranks
        self._layout = _layout(model, optimizer)
        self._engine, wrapped = engine.initialize(model, optimizer, precision, zero)
        self._partitions = partitions_of(wrapped)
        self._gradients: list[torch.Tensor] | None = None
        self.slices: list[list[Slice]] = [
            slices_of(group, master.numel(), ranks.dp_rank)
            for group, master in zip(self._layout, self._partitions.masters, strict=True)
        ]

    @property
    def group_names(self) -> list[str]:
        """`group["name"]` of every parameter group, else its number."""
        return [str(g.get("name", f"group{i}")) for i, g in enumerate(self.optimizer.param_groups)]

    def reduce(self) -> None:
        """Average the accumulated gradients over the data-parallel ranks."""
        self._partitions.fill_missing()
        self._engine.allreduce_gradients()
        self._gradients = self._partitions.gradients()

    def grad_norms(self) -> dict[str, float]:
        """Global L2 norm of the reduced gradient per parameter group; each element counts once, padding not."""
        squares = [
            sum(
                (torch.linalg.vector_norm(piece, dtype=torch.float64) ** 2 for _, piece in self._pieces(index)),
                start=torch.zeros((), dtype=torch.float64, device=self.ranks.device),
            )
            for index in range(len(self._layout))
        ]
        total = torch.stack(squares)
        dist.all_reduce(total, group=data_group())
        return dict(zip(self.group_names, total.sqrt().tolist(), strict=True))

    def first_nonfinite(self) -> str | None:
        """Name of the first parameter (in the model's order) with an inf or NaN in its reduced gradient.

        Every rank gets the same answer. It looks at every slice and waits for the device: call it only when a
        norm is not finite.
        """
        names = {index: name for group in self._layout for index, name, _ in group}
        nobody = max(names) + 1
        bad = [
            piece.index
            for group in range(len(self._layout))
            for piece, values in self._pieces(group)
            if not bool(torch.isfinite(values).all())
        ]
        first = torch.tensor([min(bad, default=nobody)], device=self.ranks.device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=data_group())
        return names.get(int(first.item()))

    def step(self, clip_scale: float = 1.0) -> None:
        """Update the masters from the reduced gradients times `clip_scale`, then all-gather the parameters."""
        gradients = self._reduced()
        for group in self.optimizer.param_groups:
            group["grad_scale"] = clip_scale
        for master, gradient in zip(self._partitions.masters, gradients, strict=True):
            master.grad = gradient
        # Not engine.step(): it computes norms of its own (an all-reduce per group), silently skips a step whose
        # norm is not finite, and calls our optimizer once per group in fp32 but once in bf16.
        self.optimizer.step()
        self._partitions.publish()
        self.discard()

    def discard(self) -> None:
        """Forget the gradients; parameters and optimizer states stay as they are."""
        for master in self._partitions.masters:
            master.grad = None
        self._partitions.clear()
        self._gradients = None

    def set_lr(self, lr: float | Callable[[dict[str, Any]], float]) -> None:
        """Set every group's learning rate: one number, or a function of the group."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr(group) if callable(lr) else lr

    def state_dict(self) -> dict[str, Any]:
        """This rank's masters and optimizer states, by reference: save them before the next step.

        For a checkpoint, states and group keys must be tensors, numbers, strings, and lists, tuples and dicts
        of these; torch's safe loader takes nothing else.
        """
        states = self.optimizer.state_dict()
        return {
            "dp_size": self.ranks.dp_size,
            "dp_rank": self.ranks.dp_rank,
            "layout": [[(name, numel) for _, name, numel in group] for group in self._layout],
            "masters": [master.detach() for master in self._partitions.masters],
            "optimizer": states,
            "on_host": _on_host(states["state"], self.ranks.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave on this rank, bit for bit, and set the parameters from the masters.

        Collective: all ranks call it. Raises:
            CheckpointError: it was saved at another data-parallel size, by another rank, or for other parameters.
        """
        self._check_state(state)
        with torch.no_grad():
            for master, saved in zip(self._partitions.masters, state["masters"], strict=True):
                master.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        _restore_tensors(self.optimizer, state["optimizer"], {(n, key) for n, key in state["on_host"]})
        self._partitions.publish()
        self.discard()

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the model."""
        self._engine.destroy()

    def _reduced(self) -> list[torch.Tensor]:
        if self._gradients is None:
            raise RuntimeError("there are no reduced gradients: call reduce() after forward_backward()")
        return self._gradients

    def _pieces(self, group: int) -> Iterator[tuple[Slice, torch.Tensor]]:
        flat = self._reduced()[group]
        for piece in self.slices[group]:
            yield piece, flat[piece.start : piece.start + piece.numel]

    def _check_state(self, state: dict[str, Any]) -> None:
        if state["dp_size"] != self.ranks.dp_size:
            raise CheckpointError(
                f"the optimizer state was saved at data-parallel size {state['dp_size']}, and this run has "
                f"{self.ranks.dp_size}; resume on {state['dp_size']} data-parallel ranks"
            )
        if state["dp_rank"] != self.ranks.dp_rank:
            raise CheckpointError(f"this is the shard of rank {state['dp_rank']}, not of rank {self.ranks.dp_rank}")
        saved = [tuple(item) for group in state["layout"] for item in group]
        own = [(name, numel) for group in self._layout for _, name, numel in group]
        different = [(a, b) for a, b in zip(saved, own, strict=False) if a != b][:3]
        if different or len(saved) != len(own) or len(state["layout"]) != len(self._layout):
            raise CheckpointError(
                f"the optimizer state holds {len(saved)} parameters in {len(state['layout'])} groups, this run "
                f"{len(own)} in {len(self._layout)}; first differences (saved, now): {different}"
            )


def _layout(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[tuple[int, str, int]]]:
    """(position in the model, name, elements) of every parameter, per group; checks them on the way."""
    known = {parameter: (index, name) for index, (name, parameter) in enumerate(model.named_parameters())}
    layout = []
    for number, group in enumerate(optimizer.param_groups):
        if not group["params"]:
            raise ValueError(f"parameter group {group.get('name', number)!r} is empty")
        strangers = [p for p in group["params"] if p not in known]
        if strangers:
            raise ValueError(f"group {group.get('name', number)!r} has {len(strangers)} parameters not in the model")
        frozen = [known[p][1] for p in group["params"] if not p.requires_grad]
        if frozen:
            raise ValueError(f"group {group.get('name', number)!r} has frozen parameters: {frozen[:3]}")
        layout.append([(*known[p], p.numel()) for p in group["params"]])
    names = [group.get("name", f"group{number}") for number, group in enumerate(optimizer.param_groups)]
    if len(set(names)) != len(names):
        raise ValueError(f"parameter groups share a name: {names}")
    return layout


def _on_host(states: dict[int, Any], device: torch.device) -> list[tuple[int, str]]:
    """(parameter number, key) of the states that their optimizer keeps in host memory beside a GPU."""
    if device.type == "cpu":
        return []
    return [
        (number, key)
        for number, state in states.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.device.type == "cpu"
    ]


def _restore_tensors(optimizer: torch.optim.Optimizer, saved: dict[str, Any], on_host: set[tuple[int, str]]) -> None:
    """Undo torch's casts: `Optimizer.load_state_dict` gives every tensor its parameter's dtype and device."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in saved["param_groups"] for n in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in saved["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor):
                device = torch.device("cpu") if (number, key) in on_host else parameter.device
                optimizer.state[parameter][key] = value.detach().to(device, copy=True)
