"""When a step is thrown away: non-finite gradients, and losses far above the recent ones."""

from __future__ import annotations

import math
from collections import deque
from typing import Any


class SkipPolicy:
    """Judges every step before it is taken; a skipped one moves no weight, moment or clock, only the data position.

    Args:
        max_skips: this many in a row end the run.
        spike_sigma: skip a step whose loss is more than this many standard deviations above the mean of the last
            `spike_window` accepted losses, once there are that many; 0: never.

    A loss that is skipped does not enter the window: a jump that stays ends the run instead of becoming the rule.
    """

    def __init__(self, max_skips: int, spike_sigma: float = 0.0, spike_window: int = 64) -> None:
        self.max_skips, self.sigma = max_skips, spike_sigma
        self.in_a_row = 0
        self._reason = ""
        self._loss: float | None = None
        self._losses: deque[float] = deque(maxlen=spike_window)

    @property
    def needs_loss(self) -> bool:
        """Whether `judge` must be given the loss of every step."""
        return self.sigma > 0

    @property
    def bound(self) -> float:
        """The largest loss that is no spike; infinite while the window is not full."""
        if not self.sigma or len(self._losses) < (self._losses.maxlen or 0):
            return math.inf
        mean = sum(self._losses) / len(self._losses)
        variance = sum((loss - mean) ** 2 for loss in self._losses) / len(self._losses)
        return mean + self.sigma * math.sqrt(variance)

    def judge(self, grad_norm: float, loss: float | None = None) -> dict[str, Any] | None:
        """None to take the step; else what to log: `reason`, and for a spike `loss` and `bound`.

        All ranks must give the same numbers, and then come to the same verdict.
        """
        found: dict[str, Any] | None = None
        self._loss = loss
        if not math.isfinite(grad_norm):
            found = {"reason": "nonfinite_gradient"}
        elif loss is not None and self.needs_loss and not loss <= self.bound:
            found = {"reason": "loss_spike", "loss": loss, "bound": self.bound}
        if found is None:
            self.in_a_row = 0
            if loss is not None and self.needs_loss:
                self._losses.append(loss)
        else:
            self.in_a_row += 1
            self._reason = found["reason"] + "s"
        return found

    @property
    def stop(self) -> str | None:
        """Why the run must end, or None."""
        return self._reason if self.in_a_row >= self.max_skips else None

    @property
    def doubt(self) -> str:
        """Why what the last step left is neither a good end nor a good place to go on from; empty if it is."""
        if self.in_a_row:
            steps = "step was" if self.in_a_row == 1 else f"{self.in_a_row} steps were"
            return f"the last {steps} skipped" + (f": {self._reason}" if self._reason else "")
        return "" if self._loss is None or math.isfinite(self._loss) else f"the last loss is {self._loss}"

    def state(self) -> dict[str, Any]:
        """Plain JSON, for a checkpoint."""
        return {"in_a_row": self.in_a_row, "losses": list(self._losses)}

    def restore(self, state: dict[str, Any]) -> None:
        self.in_a_row = state["in_a_row"]
        self._losses.clear()
        self._losses.extend(state["losses"])
