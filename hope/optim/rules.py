"""The arithmetic of DMGD on a stretch of coordinates, belonging to a single tensor whenever per-tensor
quantities are used.

Written in place and free of data-dependent control flow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope.optim import coordinate_memory as memory
from hope.optim.config import NETWORKS, OptimConfig
from hope.optim.momentum import beta1_of, beta2_of, retained


@dataclass(frozen=True)
class UpdateRule:
    """The discrete choices of a parameter group's update. They do not change during a run."""

    l2: bool
    """Inner objective: 1/2 |m - w|^2 if true, else -<m, w>."""
    adam: bool
    """Whether there is a normaliser sqrt(v) + eps."""
    at_value: bool
    """Whether the normaliser divides what the memory learns (Eq. 47), not what it gives (Eq. 102, 105)."""
    width: int
    """Hidden units of the network, 0 for a linear memory."""
    gradient_key: bool
    """Whether the network sees this gradient (Eq. 50), not only the memory before it."""
    clip: float
    """Bound of every coordinate of the memory's output, in rms of its tensor. 0 means none."""
    match: bool
    """Whether the memory's output is scaled to the rms that the linear memory alone would have."""
    erase: float
    """Strength of delta momentum (Eq. 49). 0 means none."""
    scalar: bool = False
    """Whether one gain per tensor is learned in place of a network: m = s (1 + rho)."""
    alone: bool = False
    """Whether the network is the whole memory, and there is no s."""

    @staticmethod
    def of(config: OptimConfig, vectors: bool = False) -> UpdateRule:
        """The rule of a group. `vectors`: its tensors are one-dimensional and have a linear memory."""
        dmgd = config.elementwise
        network = dmgd.memory in NETWORKS and not vectors
        return UpdateRule(
            l2=dmgd.objective == "l2",
            adam=dmgd.preconditioner == "adam",
            at_value=dmgd.preconditioner == "adam" and dmgd.normalise == "value",
            width=dmgd.mlp.width if network else 0,
            gradient_key=dmgd.mlp.key == "gradient",
            clip=dmgd.output_bound if dmgd.output == "rms_clip" else 0.0,
            match=dmgd.output == "rms_match" and network,
            erase=dmgd.erase,
            scalar=dmgd.memory == "scalar" and not vectors,
            alone=dmgd.memory == "mlp_only" and not vectors,
        )

    @property
    def learns(self) -> bool:
        """Whether there are numbers of a whole tensor that are trained: a network's, or a gain."""
        return bool(self.width or self.scalar)

    @property
    def whole(self) -> bool:
        """Whether numbers of the whole tensor are needed."""
        return bool(self.learns or self.clip or self.erase)

    @property
    def features(self) -> int:
        """How many features of a coordinate the network sees."""
        if self.alone:
            return 2
        if self.gradient_key:
            return 4
        return 3 if self.adam and not self.at_value else 2

    @property
    def size(self) -> int:
        """Weights of the network, or the one gain."""
        if self.scalar:
            return 1
        return memory.size(self.features, self.width) if self.width else 0

    @property
    def numbers(self) -> int:
        """How many numbers per tensor `sums` gives."""
        return 3 + self.size + 2 * self.match if self.learns else 2


class Rates(NamedTuple):
    """Numbers of one update, which may change from step to step. t counts the updates of the group, this one included.

    The bias corrections are those of Adam (Kingma and Ba, 2015, Algorithm 1).
    """

    scale: float
    """Multiplies the gradient: u = scale g, for the mean over a period and for global clipping."""
    lr: float
    """Learning rate of this update."""
    keep: float
    """Multiplies the weights: 1 - lr x weight_decay."""
    beta1: float
    """Retention of the linear memory s."""
    gain1: float
    """Multiplies what s takes in: 1 - beta1 with the l2 objective, 1 with dot."""
    beta2: float
    """Retention of the average of squares v."""
    gain2: float
    """Multiplies what v takes in: 1 - beta2."""
    correct1: float
    """Multiplies s: 1 / (1 - beta1^t) with l2 and bias correction, else 1. The product of beta1's if they change."""
    correct2: float
    """Multiplies sqrt(v): 1 / sqrt(1 - beta2^t) with bias correction, else 1."""
    correct1_before: float
    """`correct1` of the update before, 1 at the first."""
    correct2_before: float
    """`correct2` of the update before, 1 at the first."""
    eps: float
    """Added to the corrected sqrt(v)."""

    @staticmethod
    def of(config: OptimConfig, group: dict[str, Any], scale: float) -> Rates:
        """The rates of a parameter group's coming update, from its `lr`, `weight_decay` and `updates`."""
        l2, updates = config.elementwise.objective == "l2", group["updates"]
        corrected = config.elementwise.bias_correction
        beta1, beta2 = beta1_of(config, group), beta2_of(config, group)
        first = lambda t: 1 / (1 - retained(config, group, t)) if l2 and corrected and t else 1.0
        second = lambda t: (1 - beta2**t) ** -0.5 if corrected and t else 1.0
        numbers = (
            scale,
            group["lr"],
            1 - group["lr"] * group["weight_decay"],
            beta1,
            1 - beta1 if l2 else 1.0,
            beta2,
            1 - beta2,
            first(updates),
            second(updates),
            first(updates - 1),
            second(updates - 1),
            config.eps,
        )
        return Rates(*map(float, numbers))


class Stretch(NamedTuple):
    """N coordinates of a parameter, all tensors of shape [N]."""

    p: Tensor
    """Weights."""
    s: Tensor | None
    """Linear memory, in units of the gradient. None where a network is the whole memory."""
    v: Tensor | None
    """Moving average of squared gradients, None without a normaliser."""
    g: Tensor
    """Gradient, summed over the period and not yet scaled."""


class Whole(NamedTuple):
    """Numbers of the tensor that a stretch belongs to.

    They may also stand for all tensors of a parameter, then every shape has a first dimension [tensors].
    """

    network: Tensor
    """Weights of its network [P], as `coordinate_memory` lays them out, or its gain [1]. P is 0 for a linear memory."""
    r: Tensor
    """Root mean square over the tensor of what the memory learns (w), []. The mean square is a moving average."""
    gain: Tensor | None = None
    """What scales the memory's output under `UpdateRule.match`, []. None before the first update, and without it."""

    def of(self, tensor: int | slice) -> Whole:
        """Those of one tensor, or of a slice of tensors, from those of all."""
        return Whole(self.network[tensor], self.r[tensor], None if self.gain is None else self.gain[tensor])

    @property
    def inverse(self) -> Tensor:
        """1 / r, and 0 for a tensor that never had a gradient."""
        return _inverse(self.r)


def update(rule: UpdateRule, x: Stretch, c: Rates, whole: Whole) -> None:
    """Write the gradient into the memory, read it, and move the weights. A rule without `whole` looks at none."""
    found, root = answer(rule, x, c, whole)
    if rule.match and whole.gain is not None:
        found.mul_(whole.gain)
    if rule.clip:
        bound = rule.clip * whole.r
        found = torch.minimum(torch.maximum(found, -bound), bound)
    if root is not None:
        found.div_(root)
    x.p.mul_(c.keep).sub_(found.mul_(c.lr))


def answer(rule: UpdateRule, x: Stretch, c: Rates, whole: Whole) -> tuple[Tensor, Tensor | None]:
    """Write the gradient into the memory, whose network has learned from it already, and read it.

    Returns m [N], of its own, and what divides it afterwards, if anything does. Weights stay as they are.
    """
    w, root = _value(rule, x.v, x.g * c.scale, c)
    unit = whole.r if root is None else root
    if rule.alone:
        assert x.s is None
        return _read(rule, whole.network, _gradient_key(w, None, unit)).mul_(unit), root
    assert x.s is not None
    s, keys = x.s, None
    if rule.width and rule.gradient_key:
        keys = _gradient_key(w, s * c.correct1_before, unit)
    if rule.erase:
        forgotten = rule.erase * (w * whole.inverse).square()
        s.mul_(c.beta1 - forgotten / (1 + forgotten))
    else:
        s.mul_(c.beta1)
    s.add_(w * c.gain1)
    found = s * c.correct1
    if rule.learns:
        if keys is None:
            keys = _gain_key(found, unit) if rule.scalar else _memory_key(found, root, whole)
        found.add_(_read(rule, whole.network, keys) * unit)
    return found, root


def sums(rule: UpdateRule, x: Stretch, c: Rates, whole: Whole) -> Tensor:
    """[3 + P], float64: number of elements, sum of w^2, and `coordinate_memory.read_and_gradient`; 2 without a network.
    With `match` two more: sums of squares, in the network's unit, of what m is matched to and of m: the linear memory
    and the whole one, or w and what a network alone gives.

    Nothing is written. s, v and r are those of the update before, but the unit of the network is the one that this
    gradient leaves, so that no coordinate that was silent before weighs more than the others.
    """
    w, root = _value(rule, None if x.v is None else x.v.clone(), x.g * c.scale, c)
    head = torch.stack([w.new_tensor(float(w.numel())), w.square().sum()])
    if not rule.learns:
        return head.double()
    unit = whole.r if root is None else root
    value, known = w * _inverse(unit), _held(x, c) * _inverse(unit)
    keys = _keys(rule, x, w, unit, c, whole)
    error = (lambda y: known + y - value) if rule.l2 else (lambda y: -value)
    if rule.scalar:
        gain, [key] = whole.network[0], keys
        found = [head, torch.stack([key.square().sum(), (error(gain * key) * key).sum()])]
    else:
        found = [head, memory.read_and_gradient(whole.network, keys, rule.width, error)]
    if rule.match:
        deep = known + memory.read(whole.network, keys, rule.width)
        found.append(torch.stack([(value if rule.alone else known).square().sum(), deep.square().sum()]))
    return torch.cat(found).double()


def measure(
    rule: UpdateRule, before: Stretch, after: Stretch, c: Rates, network_before: Tensor, whole: Whole
) -> Tensor:
    """[6], float64: sums of s^2, update^2, weight^2 and w^2, and the inner loss before and after the write.

    The loss is that of m at the key that this gradient was learned with; sum(loss) / sum(w^2) has no unit. Where a
    network is the whole memory, s^2 is 0.
    """
    w, root = _value(rule, None if before.v is None else before.v.clone(), after.g * c.scale, c)
    guess = [_held(before, c), _held(after, c, c.correct1)]
    if rule.learns:
        unit = whole.r if root is None else root
        keys = _keys(rule, before, w, unit, c, whole)
        networks = (network_before, whole.network)
        guess = [m + _read(rule, net, keys) * unit for m, net in zip(guess, networks, strict=True)]
    losses = [(m - w).square().sum() / 2 if rule.l2 else -(m * w).sum() for m in guess]
    s = w.new_zeros(1) if after.s is None else after.s
    squares = [t.square().sum() for t in (s, after.p - before.p, after.p, w)]
    return torch.stack([*squares, *losses]).double()


def _held(x: Stretch, c: Rates, correct: float | None = None) -> Tensor:
    """What the linear memory gives, 0 if there is none; by default as the update before corrected it."""
    if x.s is None:
        return x.g.new_zeros(())
    return x.s * (c.correct1_before if correct is None else correct)


def _read(rule: UpdateRule, network: Tensor, keys: memory.Key) -> Tensor:
    """y [N], in the network's unit."""
    return network[0] * keys[0] if rule.scalar else memory.read(network, keys, rule.width)


def _keys(rule: UpdateRule, before: Stretch, w: Tensor, unit: Tensor, c: Rates, whole: Whole) -> memory.Key:
    """What this gradient is learned with: features of the memory before it, or of itself."""
    if rule.alone:
        return _gradient_key(w, None, unit)
    held = _held(before, c)
    if rule.scalar:
        return _gain_key(held, unit)
    return (
        _gradient_key(w, held, unit) if rule.gradient_key else _memory_key(held, _root_before(rule, before.v, c), whole)
    )


def _value(rule: UpdateRule, v: Tensor | None, u: Tensor, c: Rates) -> tuple[Tensor, Tensor | None]:
    """(what the memory learns, sqrt(v) + eps if it divides the memory's output); v is updated in place."""
    if v is None:
        return u, None
    v.mul_(c.beta2).add_(u * u * c.gain2)
    root = v.sqrt().mul_(c.correct2).add_(c.eps)
    return (u / root, None) if rule.at_value else (u, root)


def _root_before(rule: UpdateRule, v: Tensor | None, c: Rates) -> Tensor | None:
    """sqrt(v) + eps as the update before left it, where it divides the memory's output."""
    return None if v is None or rule.at_value else v.sqrt().mul_(c.correct2_before).add_(c.eps)


def _gradient_key(w: Tensor, held: Tensor | None, unit: Tensor) -> memory.Key:
    """Features of gradient and memory [N], or of the gradient alone."""
    value = w * _inverse(unit)
    if held is None:
        return memory.key(value, memory.signed_log(value))
    held = held * _inverse(unit)
    return memory.key(value, memory.signed_log(value), held, memory.signed_log(held))


def _gain_key(held: Tensor, unit: Tensor) -> memory.Key:
    """The memory itself [N], without a bound: what it is multiplied by is learned."""
    return (held * _inverse(unit),)


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
