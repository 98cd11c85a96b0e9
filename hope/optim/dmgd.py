"""Deep momentum gradient descent (Nested Learning, Eq. 33-52, 102, 105) for tensors that may be cut anywhere.

Momentum is an associative memory of gradients, trained online by gradient descent on an inner objective:

    dot   min -<m, w>:             s <- beta1 s + w                  (Eq. 33-34: SGD with momentum)
    l2    min 1/2 |m - w|^2:       s <- beta1 s + (1 - beta1) w      (a moving average)

w is the gradient u, or P u with the preconditioner at the value (Eq. 47). A linear memory gives m = s. A deep one gives
m = s + r y(k), y the network of `coordinate_memory`, r the tensor's rms of w, and y is trained on the same objective,
on what s leaves. What a depth is worth can be told from two others:

    scalar      m = s (1 + rho): one gain per tensor, trained as the network is, towards sum (w - s) s / sum s^2
    mlp_only    m = a y(u): Eq. 50 with a network that replaces s. It is asked to answer a gradient with that gradient,
                in the unit a = sqrt(v) + eps (or r), and `output: rms_match` gives the answer the rms of w: a network
                that decays, and whose y is a tanh, would else move the weights by a small part of a step. (With
                value 1 instead of w it moves every weight the same way, whatever the sign of its gradient.) Shared by
                all coordinates, it remembers how gradients are answered, but not which were where.

W <- W - lr sigma(m), sigma: identity or a bound of a few r; the preconditioner at the output divides
by sqrt(v) + eps (Eq. 102, 105). With l2, that normaliser and bias correction, a linear memory is AdamW (tested against
torch). Signs: m is in gradient units and the learning rate stays outside, so that a schedule does not change what the
memory holds (the paper's m is -lr m).

Everything is element-wise but the numbers of a whole tensor, r and the network: a parameter may be a flat partition
that cuts across tensors (`segments`), and their sums may have parts on other ranks (`tensor_sums`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hope.optim import coordinate_memory as memory
from hope.optim.clocks import ClockedOptimizer, Due, Sums
from hope.optim.config import OptimConfig
from hope.optim.kernels import kernels_for, stretches
from hope.optim.momentum import beta1_of
from hope.optim.rules import Rates, Stretch, UpdateRule, Whole, measure
from hope.optim.segments import Segments

_LEAST_NORM = 1e-6  # of a network's gradient: one that sees nothing learns nothing
_LARGEST_GAIN = 10.0  # of `rms_match`: a network that takes back nearly all of the linear memory leaves noise


class Dmgd(ClockedOptimizer):
    """One group per level and decay setting, as `hope.optim.levels.parameter_groups` makes them.

    Groups with `vectors` true (one-dimensional tensors) have a linear memory whatever the configuration says.

    Attributes:
        segments: which tensors lie where in a parameter; one that is not in here is a tensor of its own.
        tensor_sums: adds up a buffer [tensors, numbers] (float64, all parameters of all groups in order) over
            everything that holds parts of these tensors. Called once per step if anything needs it.
    """

    per_tensor_keys = frozenset({"mlp", "gain", "mean_square"})

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(groups, config)
        self.segments: dict[Tensor, Segments] = {}
        self.tensor_sums: Sums = lambda parts: parts
        self._start: Tensor | None = None
        self._gains: dict[Tensor, Tensor] = {}

    def attach(self, sums: Sums, segments: Mapping[Tensor, Segments]) -> None:
        self.tensor_sums = sums
        self.segments.update(segments)

    def settings(self, group: dict[str, Any]) -> OptimConfig:
        """The configuration whose `elementwise` says what memory a group has."""
        return self.config

    def rule(self, group: dict[str, Any]) -> UpdateRule:
        return UpdateRule.of(self.settings(group), vectors=group["vectors"])

    def state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        rule = self.rule(group)
        return ("memory",) * (not rule.alone) + ("square",) * rule.adam

    def numbers_per_tensor(self, group: dict[str, Any]) -> int:
        rule = self.rule(group)
        return rule.size + 1 if rule.whole else 0

    def allocate_states(self) -> None:
        super().allocate_states()
        for group in self.learning():
            for p in group["params"]:
                self._of_tensors(p, self.rule(group))

    def update(self, due: Due) -> None:
        self._move(due, self._teach(due))

    def _teach(self, due: Due) -> dict[Tensor, Tensor]:
        """Let what belongs to whole tensors learn from the due gradients. Returns the networks before, if watched."""
        nets = self._networks() if any(self.watching(group) for group, _ in due) else {}
        if any(self.rule(group).whole for group in self.param_groups):
            self._learn(due)
        return nets

    def _move(self, due: Due, nets: dict[Tensor, Tensor]) -> None:
        """Write the due gradients into the element-wise states, and move the weights."""
        for group, params in due:
            rule, rates = self.rule(group), self._rates(group)
            for p in params:
                x, whole = self._stretch(p, rule), self._whole(p, rule)
                if self.watching(group):
                    self._watched_update(p, rule, x, rates, whole._replace(network=nets[p]), whole)
                else:
                    # All as one stretch if nothing asks which tensor a coordinate belongs to.
                    segments = self._layout(p) if rule.whole else Segments.single(p)
                    kernels_for(rule, x).kernels.update(rule, x, segments, rates, whole)

    def _watched_update(self, p: Tensor, rule: UpdateRule, x: Stretch, c: Rates, before: Whole, whole: Whole) -> None:
        """In chunks, so that what was before the update need never be copied as a whole."""
        self.measured[p] = torch.zeros(self._layout(p).tensors, 6, dtype=torch.float64, device=p.device)
        for row, part in stretches(x, self._layout(p)):
            old = part._replace(p=part.p.clone(), s=_copy(part.s), v=_copy(part.v))
            kernels = kernels_for(rule, part).kernels
            kernels.update(rule, part, Segments.single(part.p), c, whole.of(slice(row, row + 1)))
            self.measured[p][row] += measure(rule, old, part, c, before.network[row], whole.of(row))

    def _networks(self) -> dict[Tensor, Tensor]:
        """The networks as they are now, copied."""
        return {p: self._of_tensors(p, self.rule(g))[0].clone() for g in self.learning() for p in g["params"]}

    def _rates(self, group: dict[str, Any]) -> Rates:
        return Rates.of(self.settings(group), group, self.gradient_factor(group) * group["grad_scale"])

    def _stretch(self, p: Tensor, rule: UpdateRule) -> Stretch:
        """All coordinates of `p`."""
        assert p.grad is not None
        s = None if rule.alone else self.states([p], "memory")[0].view(-1)
        v = self.states([p], "square")[0].view(-1) if rule.adam else None
        return Stretch(p.view(-1), s, v, p.grad.view(-1))

    def _whole(self, p: Tensor, rule: UpdateRule) -> Whole:
        nets, squares = self._of_tensors(p, rule)
        return Whole(nets, squares[:, 0].sqrt(), self._gains.get(p))

    def _layout(self, p: Tensor) -> Segments:
        return self.segments.get(p) or Segments.single(p)

    def _of_tensors(self, p: Tensor, rule: UpdateRule) -> tuple[Tensor, Tensor]:
        """(networks [tensors, P], mean square of w [tensors, 1]) of a parameter; created if they are not there."""
        state, rows = self.state[p], self._layout(p).tensors
        if not rule.whole:
            return p.new_zeros(rows, 0), p.new_zeros(rows, 1)
        if "mean_square" not in state:
            state["mean_square"] = torch.zeros(rows, 1, device=p.device, dtype=p.dtype)
        if not rule.learns:
            return p.new_zeros(rows, 0), state["mean_square"]
        key = "gain" if rule.scalar else "mlp"
        if key not in state:
            state[key] = self._initial(rule, p).repeat(rows, 1)
        return state[key], state["mean_square"]

    def _initial(self, rule: UpdateRule, p: Tensor) -> Tensor:
        """Weights of a network, or the gain, that has learned nothing [P]."""
        if rule.scalar:
            return p.new_zeros(1)
        if self._start is None:
            self._start = memory.initial(rule.features, rule.width, p.device)
        return self._start.to(p.dtype)

    def _learn(self, due: Due) -> None:
        """Teach every due tensor's network, and follow its mean square: one reduction for all tensors together."""
        present = {p: group for group, params in due for p in params if self.rule(group).whole}
        width = max(self.rule(group).numbers for group in self.param_groups)
        parts = []
        for group in self.param_groups:
            rule = self.rule(group)
            for p in group["params"]:
                parts.append(torch.zeros(self._layout(p).tensors, width, dtype=torch.float64, device=p.device))
                if p in present:
                    x = self._stretch(p, rule)
                    found = kernels_for(rule, x).kernels.sums(
                        rule, x, self._layout(p), self._rates(group), self._whole(p, rule)
                    )
                    parts[-1][:, : found.shape[1]] = found
        total = self.tensor_sums(torch.cat(parts)).split([part.shape[0] for part in parts])
        for p, found in zip((p for group in self.param_groups for p in group["params"]), total, strict=True):
            if p in present:
                self._write(p, present[p], found)

    def _write(self, p: Tensor, group: dict[str, Any], found: Tensor) -> None:
        """Take one inner step per tensor from the sums over all its elements."""
        rule = self.rule(group)
        nets, squares = self._of_tensors(p, rule)
        mean = (found[:, 1:] / found[:, :1].clamp(min=1)).to(p.dtype)
        # The first update only sets the scale: without one the network could neither read nor learn.
        # A momentum that never forgets has the plain mean of all.
        beta1 = beta1_of(self.config, group)
        keep = 1 - 1 / group["updates"] if beta1 == 1 else beta1 if group["updates"] > 1 else 0.0
        squares.mul_(keep).add_(mean[:, :1], alpha=1 - keep)
        if rule.learns:
            gradient = mean[:, 2 : 2 + rule.size] / (mean[:, 1:2] + _LEAST_NORM)
            inner = self.settings(group).elementwise.learner
            nets.sub_(inner.lr * gradient + inner.decay * (nets - self._initial(rule, p)))
        if rule.match:
            linear, deep = mean[:, 2 + rule.size], mean[:, 3 + rule.size]
            gain = (linear / deep).sqrt().clamp(max=_LARGEST_GAIN)
            self._gains[p] = torch.where(linear * deep > 0, gain, torch.ones_like(gain))


def _copy(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.clone()
