"""The `launch` section of a run's configuration: how a run is watched, and when it is started again."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from hope.sections import Problem


@dataclass(kw_only=True)
class LimitsConfig:
    """Seconds that a rank may stay in one phase before the watchdog ends the job for a restart."""

    init: float = 1800
    """Imports, process groups, the model, the data, resuming."""
    first_step: float = 1800
    """Each phase of the first step of a process: compilation, autotuning, communicators that are made lazily."""
    data: float = 600
    """Waiting for a batch."""
    forward: float = 600
    """One micro-batch forward."""
    backward: float = 600
    """From the end of a forward pass to the next: its backward pass, and waiting for other pipeline stages."""
    optimizer: float = 600
    """Gradient sums, the update, logging. Under CUDA also waiting for kernels that earlier phases started."""
    save: float = 1800
    """Writing a checkpoint."""
    evaluate: float = 1800
    """One held-out batch."""


@dataclass(kw_only=True)
class LaunchConfig:
    """Restarts and supervision, under SLURM and `python -m launch local` alike."""

    attempts: int = 3
    """Starts in a row without a newer checkpoint after which the run is not started again; progress refills them."""
    checkpoint_s: int = 300
    """Seconds that one save takes at most; USR1 comes this long, and margin_s, before the time limit."""
    margin_s: int = 120
    """Seconds between the end of that save and the time limit: the step in hand, and leaving."""
    slow: float = 1.2
    """A rank whose own work takes this many times the median gets a SLOW event; 0: never."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Seconds per phase."""

    def problems(self, path: str = "launch") -> Iterator[Problem]:
        """What no run could start with, by key below `path`."""
        for name, low in (("attempts", 1), ("checkpoint_s", 1), ("margin_s", 0)):
            if getattr(self, name) < low:
                yield Problem(f"{path}.{name}", f"{getattr(self, name)} is less than {low}", f"{low} or more")
        if self.slow != 0 and self.slow <= 1:
            yield Problem(f"{path}.slow", f"{self.slow} would call the median slow", "1.2, or 0 for never")
        for item in fields(self.limits):
            if (value := getattr(self.limits, item.name)) <= 0:
                yield Problem(f"{path}.limits.{item.name}", f"{value} leaves no time", "600")
