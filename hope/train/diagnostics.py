"""What the memories of a HOPE are doing, for the log: state norms per layer, distributions of eta and alpha."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from hope.model import Model
from hope.self_modifying import SelfModifyingTitans


class MemoryProbe:
    """Reads statistics of the last forward pass out of every self-modifying mixer of a model, or of slices of it.

    Collecting costs a copy of the gates, so it is off until `arm(True)`; models without memories report nothing.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self._mixers = {
            int(name): block.mixer
            for model in models
            for name, block in model.blocks.items()
            if isinstance(block.mixer, SelfModifyingTitans)
        }

    def arm(self, on: bool) -> None:
        """Whether the next forward passes collect."""
        for mixer in self._mixers.values():
            mixer.collect_statistics = on

    def scalars(self) -> dict[str, float]:
        """`memory_norm.<layer>`: mean over sequences and heads of the end state's Frobenius norm."""
        return {
            f"memory_norm.{layer}": mixer.statistics.state_norm.mean().item()
            for layer, mixer in self._mixers.items()
            if mixer.statistics is not None
        }

    def histograms(self) -> Iterator[tuple[str, Tensor]]:
        """(`eta.<layer>` or `alpha.<layer>`, values [B, H, T]) of the last pass."""
        for layer, mixer in self._mixers.items():
            if mixer.statistics is not None:
                yield f"eta.{layer}", mixer.statistics.eta
                yield f"alpha.{layer}", mixer.statistics.alpha
