"""Learning rate as a pure function of the step, so that a resumed run needs no state to continue it."""

import math
from typing import Literal, get_args

from hope.optim.config import OptimConfig

Decay = Literal["cosine", "linear", "constant", "wsd"]
Shape = Literal["linear", "cosine", "sqrt"]


def in_steps(length: float, steps: int) -> int:
    """A length of the schedule in steps: itself, or in (0, 1) that fraction of the run, rounded, at least one step."""
    return max(1, round(length * steps)) if 0 < length < 1 else int(length)


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup: int,
    steps: int,
    decay: Decay,
    final: float,
    length: int = 0,
    shape: Shape = "linear",
) -> float:
    """Learning rate of step number `step`, counted from 1: the optimizer step about to be made.

    Rises linearly to `peak` at step == warmup (0: no warm-up), then
      cosine    peak (final + (1 - final) (1 + cos(pi f)) / 2)
      linear    peak (final + (1 - final) (1 - f))
      constant  peak
      wsd       peak until step == steps - length, then as `shape` says (warm-up, stable, decay; Hu et al., 2024):
                linear and cosine as above, sqrt peak (final + (1 - final) (1 - sqrt(f))) (Hägele et al., 2024)
    with f = (step - warmup) / (steps - warmup), for wsd (step - steps + length) / length, so that all but constant
    reach final * peak at step == steps and stay there after it. `final` is a fraction of the peak and is not used by
    constant, `length` (steps) and `shape` only by wsd.

    Raises ValueError for a step below 1, a peak that is not a positive number, a warm-up outside [0, steps), final
    outside [0, 1], a decay that does not fit behind the warm-up, and an unknown decay or shape.
    """
    _check(step, peak, warmup, steps, decay, final)
    begin = warmup
    if decay == "wsd":
        begin = steps - length
        _check_wsd(begin, warmup, length, steps, shape)
    if step < warmup:
        return peak * step / warmup
    if decay == "constant" or (decay == "wsd" and step <= begin):
        return peak
    done = min(1.0, (step - begin) / (steps - begin))
    return peak * (final + (1.0 - final) * _remaining(shape if decay == "wsd" else decay, done))


def _remaining(shape: str, done: float) -> float:
    """What is left of the way to the end after a fraction `done` of it."""
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0 - math.sqrt(done) if shape == "sqrt" else 1.0 - done


def rate_at(step: int, optim: OptimConfig, steps: int) -> float:
    """The configured learning rate of step number `step` of `steps`."""
    return learning_rate(
        step,
        peak=optim.lr,
        warmup=in_steps(optim.warmup, steps),
        steps=steps,
        decay=optim.decay,
        final=optim.final_lr,
        length=in_steps(optim.decay_length, steps),
        shape=optim.decay_shape,
    )


def same_until(step: int, a: OptimConfig, a_steps: int, b: OptimConfig, b_steps: int) -> bool:
    """Whether two runs of `a_steps` and `b_steps` have had the same learning rate, to the last bit, in every step up to
    `step`, which lies in both."""
    if step > min(a_steps, b_steps):
        return False
    return all(rate_at(s, a, a_steps) == rate_at(s, b, b_steps) for s in range(1, step + 1))


def _check(step: int, peak: float, warmup: int, steps: int, decay: str, final: float) -> None:
    if step < 1:
        raise ValueError(f"step {step}: steps are counted from 1")
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"peak learning rate {peak} is not a positive number")
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup {warmup} is not in [0, steps {steps})")
    if not 0 <= final <= 1:
        raise ValueError(f"final {final} is not a fraction of the peak in [0, 1]")
    if decay not in get_args(Decay):
        raise ValueError(f"decay {decay!r} is not one of {', '.join(get_args(Decay))}")


def _check_wsd(begin: int, warmup: int, length: int, steps: int, shape: str) -> None:
    if length < 1 or begin < warmup:
        raise ValueError(f"a decay of {length} steps does not fit behind {warmup} of warm-up in {steps} steps")
    if shape not in get_args(Shape):
        raise ValueError(f"shape {shape!r} is not one of {', '.join(get_args(Shape))}")
