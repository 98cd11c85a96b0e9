"""What the mixers of a model are doing, for the log: whatever they report, per layer."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from hope.block import Block
from hope.mixers import Mixer
from hope.model import Model


class MixerProbe:
    """Reads the reports of the last forward pass out of every mixer and level in context of a model, or of slices of
    it.

    Collecting may cost copies, so it is off until `arm(True)`.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self._mixers: list[tuple[str, Mixer]] = []
        for model in models:
            for name, block in model.blocks.items():
                assert isinstance(block, Block)
                self._mixers += [(name, mixer) for mixer in block.mixing().values()]

    def arm(self, on: bool) -> None:
        """Whether the next forward passes collect."""
        for _, mixer in self._mixers:
            mixer.watched = on

    def scalars(self) -> dict[str, float]:
        """`NAME.LAYER` of every number that a mixer reports, such as `memory_norm.3`."""
        return {
            f"{name}.{layer}": value.item()
            for layer, mixer in self._mixers
            for name, value in mixer.report().scalars.items()
        }

    def histograms(self) -> Iterator[tuple[str, Tensor]]:
        """(`NAME.LAYER`, values) of every tensor that a mixer reports, such as `eta.3`."""
        for layer, mixer in self._mixers:
            for name, values in mixer.report().histograms.items():
                yield f"{name}.{layer}", values
