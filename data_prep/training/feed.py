"""What a run reads: batches by step number, held-out batches, and where in the data a checkpoint stands."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from data_prep.config import DataConfig
from data_prep.training.batches import Batch, BatchLoader
from data_prep.training.blend import identity_of, open_blend, open_heldout
from data_prep.training.blend_preview import readings
from data_prep.training.order import LaneOrder
from data_prep.training.phase_order import Lengths, order_of, phases_of
from data_prep.training.reading import fingerprint_of_set


class Sizes(Lengths, Protocol):
    """Of steps and evaluations; `hope.train.config.TrainConfig` has them. Batches count sequences."""

    @property
    def seq_len(self) -> int:
        """Tokens of a window, the longest row."""

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
        self._training = open_blend(data, sizes.seq_len, sizes.global_batch, order_of(data, sizes))
        self._heldout = open_heldout(data, sizes.seq_len, sizes.eval_windows)
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
        return _order(self._data, self._sizes, self._training.identity())

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


def _order(data: DataConfig, sizes: Sizes, identity: Mapping[str, str]) -> dict[str, Any]:
    return {
        "train.seq_len": sizes.seq_len,
        "train.global_batch": sizes.global_batch,
        "data.seed": data.seed,
        **identity,
    }


class Foreseen:
    """What a run of `samples` samples would read, known before it starts: no index is needed, no file is changed."""

    def __init__(self, data: DataConfig, sizes: Sizes, samples: int) -> None:
        """Open every source and check the held-out sets. Raises DataError; not collective."""
        self._data, self._sizes = data, sizes
        self.sources = readings(data, sizes.seq_len, samples, order_of(data, sizes))
        if data.documents == "stream":
            LaneOrder(len(self.sources[0].windows), sizes.global_batch, data.seed)  # are there enough?
        self.heldout = open_heldout(data, sizes.seq_len, sizes.eval_windows).describe()
        phases = phases_of(data, sizes)
        self.phases = ", ".join(f"{phase.name} steps {phase.first:,} to {phase.last:,}" for phase in phases)

    def order(self) -> dict[str, Any]:
        """What `Feed.order` would say."""
        prints = {part.source.name: fingerprint_of_set(part.store, self._data.documents) for part in self.sources}
        return _order(self._data, self._sizes, identity_of(prints, order_of(self._data, self._sizes)))

    def epochs(self) -> str:
        """How often the run goes through each source."""
        if len(self.sources) == 1:
            return f"{self.sources[0].epochs:.2f} epochs of {len(self.sources[0].windows):,} windows"
        return "epochs: " + ", ".join(f"{part.name} {part.epochs:.2f}" for part in self.sources)
