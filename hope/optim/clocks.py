"""A level is a parameter group with a clock (Eq. 71): between its due steps nothing of it moves.

Gradients accumulate over `period` steps. At the due step the update rule sees their mean (or sum) once: weights, decay,
moments, the schedule's rate and the DMGD memory move together, or not at all. A group with rate 0 is frozen: it is
never due, accumulates nothing and has no states, and its clock goes on with its level's.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hope.optim.config import OptimConfig
from hope.optim.segments import Segments

Due = list[tuple[dict[str, Any], list[Tensor]]]
Sums = Callable[[Tensor], Tensor]
Watched = bool | Callable[[dict[str, Any]], bool]


def frozen(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group takes no step at all: a factor of 0 on its learning rate."""
    return bool(group["rate"] == 0)


class ClockedOptimizer(torch.optim.Optimizer):
    """Base of all optimizers here; a subclass writes `update`.

    Keys of a group: `period`, its clock in steps; `clock`, steps seen; `updates`, due steps seen; `gathered`, whether
    gradients already arrive summed over the period, at due steps only; `rate`, a factor on the learning rate;
    `beta1` and `beta2`, None as configured; `head_rows`, see `hope.optim.matrix`. The caller may set before `step`:
    `lr`, or all of them by `set_lr`, and `grad_scale`, a factor on this step's gradient (global clipping).

    Attributes:
        measured: what its group's last due step did to a parameter, if that step was watched: [tensors, 6], float64,
            the numbers of `hope.optim.rules.measure`.
    """

    per_tensor_keys: frozenset[str] = frozenset()
    """States that belong to a tensor as a whole: [tensors of the group, numbers], everything else is element-wise."""

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimConfig) -> None:
        self.config = config
        self.measured: dict[Tensor, Tensor] = {}
        self._completed = False
        self._watched: Watched = False
        defaults = {
            "lr": config.lr,
            "grad_scale": 1.0,
            "weight_decay": 0.0,
            "period": 1,
            "clock": 0,
            "updates": 0,
            "gathered": False,
            "vectors": False,
            "matrices": False,
            "rate": 1.0,
            "beta1": None,
            "beta2": None,
            "head_rows": 0,
        }
        whole = [{"lr": config.lr * group.get("rate", 1.0), **group} for group in groups]
        super().__init__(whole or [{"params": []}], defaults)
        if not whole:  # as on a pipeline stage without matrices
            self.param_groups.clear()

    def set_lr(self, lr: float | Callable[[dict[str, Any]], float]) -> None:
        """Set every group's learning rate: one number times the group's `rate`, or a function of the group."""
        for group in self.param_groups:
            group["lr"] = lr(group) if callable(lr) else lr * group["rate"]

    def attach(self, sums: Sums, segments: Mapping[Tensor, Segments]) -> None:
        """Parameters are pieces of tensors; an optimizer that is purely element-wise need not know it.

        Args:
            sums: adds up a buffer [tensors, numbers], float64, of all parameters of all groups in order, over
                everything that holds parts of these tensors.
            segments: which tensors lie where in a parameter. One that is not in here is a whole tensor.
        """

    def watch(self, which: Watched) -> None:
        """Whether the next step fills `measured`, where the optimizer can: for all groups that move, or for which."""
        self._watched = which

    def watching(self, group: dict[str, Any]) -> bool:
        """Whether the next step of this group is watched."""
        return self._watched(group) if callable(self._watched) else self._watched

    def due(self, group: dict[str, Any]) -> bool:
        """Whether the coming step is a due one of this group; never, if it is frozen."""
        return not frozen(group) and bool((group["clock"] + 1) % group["period"] == 0)

    def learning(self) -> list[dict[str, Any]]:
        """The groups that are not frozen."""
        return [group for group in self.param_groups if not frozen(group)]

    def gradient_factor(self, group: dict[str, Any]) -> float:
        """What makes a period's summed gradient the one that the update sees, clipping apart."""
        return 1.0 / group["period"] if self.config.period_gradient == "mean" else 1.0

    @torch.no_grad()
    def complete(self) -> None:
        """Add to `p.grad` of every due group what its period has accumulated before this step; once per step.

        `step` does it itself; whoever needs the norm of a period's gradient first calls it before.
        """
        if self._completed:
            return
        for group in self.param_groups:
            if group["period"] > 1 and self.due(group):
                for p in group["params"]:
                    if p.grad is not None and "accumulator" in self.state[p]:
                        p.grad.add_(self.state[p]["accumulator"])
        self._completed = True

    def norm(self) -> float:
        """L2 norm of the gradient that the coming step will use, over all due groups, when parameters are whole."""
        self.complete()
        squares = [
            p.grad.double().square().sum() * self.gradient_factor(group) ** 2
            for group in self.param_groups
            if self.due(group)
            for p in group["params"]
            if p.grad is not None
        ]
        return torch.stack(squares).sum().sqrt().item() if squares else 0.0  # one wait for the device

    def clip(self, largest: float) -> None:
        """Let the coming step use a gradient whose `norm` is at most `largest`."""
        scale = min(1.0, largest / (self.norm() + 1e-6))
        for group in self.param_groups:
            group["grad_scale"] = scale

    def discard(self) -> None:
        """Forget this step's gradients: no clock advances, and the accumulators stay as they were."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
        self._completed = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures: gradients are given
        """Advance every clock by one step and update the groups that are due.

        A group without any gradient is left alone, unless it has no parameters here: others may, and keep its time.
        """
        self.complete()
        due: Due = []
        for group in self.param_groups:
            if frozen(group):
                group["clock"] += 1
                continue
            present = [p for p in group["params"] if p.grad is not None]
            if group["params"] and not present and not group["gathered"]:
                continue
            reached = self.due(group)
            group["clock"] += 1
            if reached:
                group["updates"] += 1
                due.append((group, present))
            elif present:
                torch._foreach_add_(self.states(present, "accumulator"), [p.grad for p in present])
        for p in (p for group, _ in due for p in group["params"]):
            self.measured.pop(p, None)
        self.update(due)
        for _, present in due:
            for p in present:
                if "accumulator" in self.state[p]:
                    self.state[p]["accumulator"].zero_()
        self._completed = False

    def update(self, due: Due) -> None:
        """Move the weights and states of the due groups; `p.grad` holds the sum over the period."""
        raise NotImplementedError

    def states(self, params: list[Tensor], key: str) -> list[Tensor]:
        """An element-wise state of each parameter, zeros at first."""
        for p in params:
            if key not in self.state[p]:
                self.state[p][key] = torch.zeros_like(p, requires_grad=False)
        return [self.state[p][key] for p in params]

    def state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The element-wise states of a group, its accumulator apart."""
        raise NotImplementedError

    def numbers_per_tensor(self, group: dict[str, Any]) -> int:
        """How many numbers `per_tensor_keys` keep for each tensor of a group."""
        return 0

    def allocate_states(self) -> None:
        """Create every state that later steps would create, so that a checkpoint finds them all."""
        for group in self.learning():
            keys = self.state_keys(group) + (("accumulator",) if group["period"] > 1 else ())
            for key in keys:
                self.states(group["params"], key)
