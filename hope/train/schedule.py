"""Learning rate as a pure function of the step, so that a resumed run needs no state to continue it."""

import math
from typing import Literal

from hope.optim.config import OptimConfig

Decay = Literal["cosine", "linear", "constant"]


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, decay: Decay, final: float) -> float:
    """Learning rate of step number `step`, counted from 1: the optimizer step about to be made.

    Rises linearly to `peak` at step == warmup (0: no warm-up), then
      cosine    peak (final + (1 - final) (1 + cos(pi f)) / 2)
      linear    peak (1 - (1 - final) f)
      constant  peak
    with f = (step - warmup) / (steps - warmup), so that cosine and linear reach final * peak at step == steps
    and stay there after it. `final` is a fraction of the peak and is not used by constant.

    Raises ValueError for a step below 1, a peak that is not a positive number, a warm-up outside [0, steps),
    final outside [0, 1] and an unknown decay.
    """
    _check(step, peak, warmup, steps, decay, final)
    if step < warmup:
        return peak * step / warmup
    if decay == "constant":
        return peak
    done = min(1.0, (step - warmup) / (steps - warmup))
    remaining = 0.5 * (1.0 + math.cos(math.pi * done)) if decay == "cosine" else 1.0 - done
    return peak * (final + (1.0 - final) * remaining)


def rate_at(step: int, optim: OptimConfig, steps: int) -> float:
    """The configured learning rate of step number `step` of `steps`."""
    return learning_rate(step, peak=optim.lr, warmup=optim.warmup, steps=steps, decay=optim.decay, final=optim.final_lr)


def _check(step: int, peak: float, warmup: int, steps: int, decay: str, final: float) -> None:
    if step < 1:
        raise ValueError(f"step {step}: steps are counted from 1")
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"peak learning rate {peak} is not a positive number")
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup {warmup} is not in [0, steps {steps})")
    if not 0 <= final <= 1:
        raise ValueError(f"final {final} is not a fraction of the peak in [0, 1]")
    if decay not in ("cosine", "linear", "constant"):
        raise ValueError(f"decay {decay!r} is not one of cosine, linear, constant")
