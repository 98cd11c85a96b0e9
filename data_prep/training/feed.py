"""What a run reads: batches by step number, held-out batches, and where in the data a checkpoint stands."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from data_prep.config import DataConfig
from data_prep.training.batches import Batch, BatchLoader
from data_prep.training.blend import open_blend, open_heldout


class Sizes(Protocol):
    """Of steps and evaluations; `hope.train.config.TrainConfig` has them. Batches count sequences."""

    @property
    def seq_len(self) -> int:
        """Tokens of a window, the longest row."""

    @property
    def global_batch(self) -> int:
        """Sequences of a step, over all ranks."""

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward pass of one rank."""

    @property
    def eval_windows(self) -> int:
        """Held-out windows of an evaluation, over all ranks."""

    def seq_len_at(self, step: int) -> int:
        """Tokens of a row in this step."""


class Feed:
    """The data of one data-parallel rank. Positions are steps: sample `step * global_batch` follows step `step`."""

    def __init__(self, data: DataConfig, sizes: Sizes, dp_rank: int, dp_size: int) -> None:
        """Open every source; with torch.distributed, all ranks call this. Raises DataError on every rank."""
        self._data, self._sizes, self._dp = data, sizes, (dp_rank, dp_size)
        self._training = open_blend(data, sizes.seq_len)
        self._heldout = open_heldout(data, sizes.seq_len, sizes.eval_windows, sizes.micro_batch * dp_size)
        batch = (sizes.global_batch, sizes.micro_batch)
        self._loader = BatchLoader(self._training, *batch, dp_rank, dp_size, documents=data.documents)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of step number `step`, counted from 1."""
        return self._loader.batches((step - 1) * self._sizes.global_batch, self._sizes.seq_len_at(step))

    def heldout(self) -> Iterator[tuple[str, Iterator[Batch]]]:
        """(source, this rank's batches of its held-out set) for every source; equally many on every rank."""
        for name in self._heldout.sets:
            yield name, self._heldout.batches(name, self._sizes.micro_batch, *self._dp, self._data.documents)

    def summary(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Metrics from the held-out loss of every source."""
        return self._heldout.summary(losses)

    def order(self) -> dict[str, Any]:
        """What decides which tokens come next; a resumed run must agree."""
        return {
            "train.seq_len": self._sizes.seq_len,
            "train.global_batch": self._sizes.global_batch,
            "data.seed": self._data.seed,
            **self._training.identity(),
        }

    def next_batch(self, step: int) -> str:
        """Hash of the token ids of the global batch after `step`."""
        batch = self._sizes.global_batch
        return self._training.fingerprint(step * batch, batch)

    def position(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` records of the data, plain JSON."""
        consumed = self._training.consumed_by_source(step * self._sizes.global_batch)
        return {"order": self.order(), "next_batch": self.next_batch(step), "consumed": consumed}

    def describe(self) -> str:
        """One line for the start of a run."""
        return f"{self._training.describe()}, {self._heldout.describe()}"

    def close(self) -> None:
        """Stop the thread that reads ahead."""
        self._loader.close()
