"""The arithmetic of DMGD on a stretch of coordinates, all of one tensor where its numbers are needed.

Written in place and free of data-dependent control flow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope.optim import coordinate_memory as memory
from hope.optim.config import OptimConfig


@dataclass(frozen=True)
class Rule:
    """The discrete choices. width: hidden units of the network, 0 for a linear memory; match: whether its output is
    scaled to the linear memory's rms; whole: whether numbers of the whole tensor are needed."""

    l2: bool
    adam: bool
    at_value: bool
    width: int
    gradient_key: bool
    clip: float
    match: bool
    erase: float

    @staticmethod
    def of(config: OptimConfig, vectors: bool = False) -> Rule:
        dmgd = config.elementwise
        return Rule(
            l2=dmgd.objective == "l2",
            adam=dmgd.preconditioner == "adam",
            at_value=dmgd.preconditioner == "adam" and dmgd.normalise == "value",
            width=dmgd.mlp.width if dmgd.memory == "mlp" and not vectors else 0,
            gradient_key=dmgd.mlp.key == "gradient",
            clip=dmgd.output_bound if dmgd.output == "rms_clip" else 0.0,
            match=dmgd.output == "rms_match" and dmgd.memory == "mlp" and not vectors,
            erase=dmgd.erase,
        )

    @property
    def whole(self) -> bool:
        return bool(self.width or self.clip or self.erase)

    @property
    def features(self) -> int:
        if self.gradient_key:
            return 4
        return 3 if self.adam and not self.at_value else 2

    @property
    def size(self) -> int:
        """Weights of the network."""
        return memory.size(self.features, self.width) if self.width else 0

    @property
    def numbers(self) -> int:
        """How many `sums` gives."""
        return 3 + self.size + 2 * self.match if self.width else 2


class Rates(NamedTuple):
    """Numbers that change from step to step.

    correct1, correct2: bias corrections that multiply s and sqrt(v); `_before`: those of the update before.
    """

    scale: float
    lr: float
    keep: float
    beta1: float
    gain1: float
    beta2: float
    gain2: float
    correct1: float
    correct2: float
    correct1_before: float
    correct2_before: float
    eps: float

    @staticmethod
    def of(config: OptimConfig, group: dict[str, Any], scale: float) -> Rates:
        l2, updates = config.elementwise.objective == "l2", group["updates"]
        corrected = config.elementwise.bias_correction
        first = lambda t: 1 / (1 - config.beta1**t) if l2 and corrected and t else 1.0
        second = lambda t: (1 - config.beta2**t) ** -0.5 if corrected and t else 1.0
        numbers = (
            scale,
            group["lr"],
            1 - group["lr"] * group["weight_decay"],
            config.beta1,
            1 - config.beta1 if l2 else 1.0,
            config.beta2,
            1 - config.beta2,
            first(updates),
            second(updates),
            first(updates - 1),
            second(updates - 1),
            config.eps,
        )
        return Rates(*map(float, numbers))


class Stretch(NamedTuple):
    """Coordinates [N]: weights, linear memory, average of squares (or None), gradient."""

    p: Tensor
    s: Tensor
    v: Tensor | None
    g: Tensor


class Whole(NamedTuple):
    """Of the tensor that a stretch belongs to: weights of its network [P], the rms of w, a scalar tensor, and what
    scales the memory's output under `Rule.match`.

    Of all tensors of a parameter: [tensors, P], [tensors] and [tensors].
    """

    network: Tensor
    r: Tensor
    gain: Tensor | None = None

    def of(self, tensor: int | slice) -> Whole:
        return Whole(self.network[tensor], self.r[tensor], None if self.gain is None else self.gain[tensor])

    @property
    def inverse(self) -> Tensor:
        return _inverse(self.r)


def update(rule: Rule, x: Stretch, c: Rates, whole: Whole) -> None:
    """Write the gradient into the memory, read it, and move the weights. A rule without `whole` looks at none."""
    p, s, v, g = x
    w, root = _value(rule, v, g * c.scale, c)
    unit = whole.r if root is None else root
    keys = _gradient_key(w, s * c.correct1_before, unit) if rule.width and rule.gradient_key else None
    if rule.erase:
        forgotten = rule.erase * (w * whole.inverse).square()
        s.mul_(c.beta1 - forgotten / (1 + forgotten))
    else:
        s.mul_(c.beta1)
    s.add_(w * c.gain1)
    found = s * c.correct1
    if rule.width:
        if keys is None:
            keys = _memory_key(found, root, whole)
        found.add_(memory.read(whole.network, keys, rule.width) * unit)
    if rule.match and whole.gain is not None:
        found.mul_(whole.gain)
    if rule.clip:
        bound = rule.clip * whole.r
        found = torch.minimum(torch.maximum(found, -bound), bound)
    if root is not None:
        found.div_(root)
    p.mul_(c.keep).sub_(found.mul_(c.lr))


def sums(rule: Rule, x: Stretch, c: Rates, whole: Whole) -> Tensor:
    """[3 + P], float64: number of elements, sum of w^2, and `coordinate_memory.read_and_gradient`; 2 without a network.
    With `match` two more: sums of squares, in the network's unit, of the linear memory and of the whole one.

    Nothing is written. s, v and r are those of the update before, but the unit of the network is the one that this
    gradient leaves, so that no coordinate that was silent before weighs more than the others.
    """
    w, root = _value(rule, None if x.v is None else x.v.clone(), x.g * c.scale, c)
    head = torch.stack([w.new_tensor(float(w.numel())), w.square().sum()])
    if not rule.width:
        return head.double()
    unit = whole.r if root is None else root
    held = x.s * c.correct1_before
    keys = _gradient_key(w, held, unit) if rule.gradient_key else _memory_key(held, _root_before(rule, x.v, c), whole)
    value, known = w * _inverse(unit), held * _inverse(unit)
    error = (lambda y: known + y - value) if rule.l2 else (lambda y: -value)
    found = [head, memory.read_and_gradient(whole.network, keys, rule.width, error)]
    if rule.match:
        deep = known + memory.read(whole.network, keys, rule.width)
        found.append(torch.stack([known.square().sum(), deep.square().sum()]))
    return torch.cat(found).double()


def measure(rule: Rule, before: Stretch, after: Stretch, c: Rates, network_before: Tensor, whole: Whole) -> Tensor:
    """[6], float64: sums of s^2, update^2, weight^2 and w^2, and the inner loss before and after the write.

    The loss is that of m at the key that this gradient was learned with; sum(loss) / sum(w^2) has no unit.
    """
    w, root = _value(rule, None if before.v is None else before.v.clone(), after.g * c.scale, c)
    held = before.s * c.correct1_before
    guess = [held, after.s * c.correct1]
    if rule.width:
        unit = whole.r if root is None else root
        root_before = _root_before(rule, before.v, c)
        keys = _gradient_key(w, held, unit) if rule.gradient_key else _memory_key(held, root_before, whole)
        networks = (network_before, whole.network)
        guess = [m + memory.read(net, keys, rule.width) * unit for m, net in zip(guess, networks, strict=True)]
    losses = [(m - w).square().sum() / 2 if rule.l2 else -(m * w).sum() for m in guess]
    squares = [t.square().sum() for t in (after.s, after.p - before.p, after.p, w)]
    return torch.stack([*squares, *losses]).double()


def _value(rule: Rule, v: Tensor | None, u: Tensor, c: Rates) -> tuple[Tensor, Tensor | None]:
    """(what the memory learns, sqrt(v) + eps if it divides the memory's output); v is updated in place."""
    if v is None:
        return u, None
    v.mul_(c.beta2).add_(u * u * c.gain2)
    root = v.sqrt().mul_(c.correct2).add_(c.eps)
    return (u / root, None) if rule.at_value else (u, root)


def _root_before(rule: Rule, v: Tensor | None, c: Rates) -> Tensor | None:
    """sqrt(v) + eps as the update before left it, where it divides the memory's output."""
    return None if v is None or rule.at_value else v.sqrt().mul_(c.correct2_before).add_(c.eps)


def _gradient_key(w: Tensor, held: Tensor, unit: Tensor) -> memory.Key:
    """Features of gradient and memory [N]."""
    value, held = w * _inverse(unit), held * _inverse(unit)
    return memory.key(value, memory.signed_log(value), held, memory.signed_log(held))


def _memory_key(held: Tensor, root: Tensor | None, whole: Whole) -> memory.Key:
    """Features of the memory alone, in units of its tensor's rms and, with a normaliser, of its own gradients'."""
    inside = held * whole.inverse
    if root is None:
        return memory.key(inside, memory.signed_log(inside))
    own = held / root
    return memory.key(own, memory.signed_log(own), inside)


def _inverse(unit: Tensor) -> Tensor:
    """1 / unit, and 0 for a tensor that never had a gradient."""
    return torch.where(unit > 0, 1 / unit, torch.zeros_like(unit))
