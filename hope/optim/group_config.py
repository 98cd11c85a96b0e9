"""One entry of `optim.groups`: how parameters with certain names are updated instead of as they declare."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hope.sections import Problem


@dataclass(kw_only=True)
class GroupConfig:
    """Parameters by the pattern of their names, and what is different for them."""

    match: str
    """Pattern of names of parameters on a single device, such as "blocks.*.mixer.query.*" (fnmatch: * ? [abc])."""
    rule: Literal["matrix", "elementwise"] | None = None
    """matrix: the matrix optimizer (muon, m3) takes them; elementwise: it does not. null: as they declare."""
    rate: float = 1.0
    """Factor on the learning rate that they would have. 0: frozen, they take no step and keep no optimizer states."""
    weight_decay: float | None = None
    """Decoupled decay, also of tensors with one dimension; null: as all others."""
    beta1: float | None = None
    """null: optim.beta1."""
    beta2: float | None = None
    """null: optim.beta2."""

    def problems(self, path: str, sums: bool = False, last: bool = True) -> Iterator[Problem]:
        """What cannot work whatever the model is. `sums`: momenta are sums, as `OptimConfig.sums` says. `last`: no
        entry comes after it."""
        if not self.match:
            yield Problem(f"{path}.match", "is empty", "a pattern such as blocks.*.mixer.query.*")
        if not 0 <= self.rate < float("inf"):
            yield Problem(f"{path}.rate", f"{self.rate} is not a factor", "1.0, or 0 to freeze them")
        elif self.rate == 0:
            for key in (key for key in _CHOICES if getattr(self, key) is not None):
                what = f"{getattr(self, key)} is not used: {path}.rate is 0, and what is frozen is not updated"
                yield Problem(f"{path}.{key}", what, "leave it out, or a positive rate")
        if self.weight_decay is not None and not 0 <= self.weight_decay < float("inf"):
            yield Problem(f"{path}.weight_decay", f"{self.weight_decay} is not a decay", "0.0")
        yield from beta_problems(path, self.beta1, self.beta2, sums)
        if self.changes_nothing and last:
            yield Problem(path, "changes nothing", "give rule, rate, weight_decay, beta1 or beta2, or leave it out")

    @property
    def changes_nothing(self) -> bool:
        """Whether it is there only to keep what it matches out of the entries after it."""
        return all(getattr(self, key) is None for key in _CHOICES) and self.rate == 1


_CHOICES = ("rule", "weight_decay", "beta1", "beta2")


def beta_problems(path: str, beta1: float | None, beta2: float | None, sums: bool) -> Iterator[Problem]:
    """Retentions, None where none is given. A sum may keep everything, an average could then take in nothing."""
    if beta1 is not None and not 0 <= beta1 < 1 and not (sums and beta1 == 1):
        fix = "0.9, or optim.dmgd.objective=dot" if beta1 == 1 else "0.9"
        yield Problem(f"{path}.beta1", f"{beta1} is not in [0, 1{']' if sums else ')'}", fix)
    if beta2 is not None and not 0 <= beta2 < 1:
        yield Problem(f"{path}.beta2", f"{beta2} is not in [0, 1)", "0.9")
