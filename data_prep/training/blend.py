"""The training data of a run: one source or a weighted blend of several; and their held-out sets."""

from collections.abc import Iterator, Mapping

import numpy as np

from data_prep.config import DataConfig
from data_prep.training.batches import Batch, heldout_batches
from data_prep.training.blend_order import BlendOrder
from data_prep.training.phase_order import SampleOrder
from data_prep.training.reading import HeldoutSet, TrainingSet, fingerprint_of


class Blend:
    """Sample k of the run is sample j of one source; both follow from (order, k), see BlendOrder and PhaseOrder.

    Each source goes through its own epochs in orders of its own, so that neither the length of the run nor another
    source's end changes what was seen.

    Attributes: sources, shares (their order), seq_len, eos_id.
    """

    def __init__(self, sources: list[TrainingSet], order: SampleOrder) -> None:
        self.sources = sources
        self.shares = order
        self.seq_len = sources[0].seq_len
        self.eos_id = sources[0].eos_id

    def sample(self, number: int) -> np.ndarray:
        """Tokens of sample `number` of the run, int64 [seq_len + 1]; see TrainingSet.window."""
        source, own = self.shares.locate(number)
        return self.sources[source].sample(own)

    def real_targets(self, number: int) -> int:
        """Targets of sample `number` that count."""
        source, own = self.shares.locate(number)
        return self.sources[source].real_targets(own)

    def fingerprint(self, consumed: int, global_batch: int) -> str:
        """Hex sha256 of the token ids of these samples; the same on every rank and for every layout."""
        return fingerprint_of(self, consumed, global_batch)

    def consumed_by_source(self, consumed: int) -> dict[str, int]:
        """Samples of each source among the first `consumed` of the run; the single source is called "train"."""
        counts = self.shares.counts(consumed)
        return {source.name or "train": count for source, count in zip(self.sources, counts, strict=True)}

    def identity(self) -> dict[str, str]:
        """What a checkpoint records of the data and its shares, by YAML path; it must not change on resume."""
        return identity_of({source.name: source.fingerprint_of_data for source in self.sources}, self.shares)

    def describe(self) -> str:
        """One line: windows per epoch of every source and its share of the samples."""
        if not self.sources[0].name:
            return f"{len(self.sources[0]):,} training windows per epoch"
        parts = zip(self.sources, self.shares.shares, strict=True)
        listed = ", ".join(f"{source.name} {len(source):,} ({share:.1%} of samples)" for source, share in parts)
        return f"training windows per epoch: {listed}"


def identity_of(fingerprints: Mapping[str, str], order: SampleOrder) -> dict[str, str]:
    """See Blend.identity; `fingerprints`: by source, that of a single one without a name by ""."""
    if "" in fingerprints:
        return {"data.train": fingerprints[""]}
    parts = zip(fingerprints.items(), order.words, strict=True)
    return {"data.sources": ", ".join(f"{name} {word} {data}" for (name, data), word in parts)}


class Heldout:
    """The held-out set of every source, each evaluated on equally many micro-batches by every rank (heldout_batches).

    The summary is the mean of the sources' losses weighted by their shares of the blend: the loss on the mixture that
    is trained on. (A plain mean would let a source of 1 % of the training count as much as one of 90 %.)
    """

    def __init__(self, sets: Mapping[str, HeldoutSet], shares: list[float], windows: int) -> None:
        """`windows` of each set at most; 0: all."""
        self.sets, self.shares = dict(sets), shares
        self.windows = {name: min(windows or len(heldout), len(heldout)) for name, heldout in sets.items()}

    def batches(self, name: str, micro_batch: int, dp_rank: int, dp_size: int, documents: str) -> Iterator[Batch]:
        """A rank's share of a set; see heldout_batches."""
        return heldout_batches(self.sets[name], self.windows[name], micro_batch, dp_rank, dp_size, documents)

    def summary(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Metrics from the loss of each set: `heldout_loss` and, in a blend, `heldout_loss.NAME`."""
        total = sum(share * losses[name] for name, share in zip(self.sets, self.shares, strict=True))
        if len(self.sets) == 1:
            return {"heldout_loss": total}
        return {"heldout_loss": total, **{f"heldout_loss.{name}": loss for name, loss in losses.items()}}

    def describe(self) -> str:
        """How many windows are evaluated."""
        listed = [
            f"{windows} of {len(self.sets[name])}{f' {name}' if len(self.sets) > 1 else ''}"
            for name, windows in self.windows.items()
        ]
        return f"{' + '.join(listed)} held-out windows per evaluation"


def open_blend(data: DataConfig, seq_len: int, lanes: int = 1, order: SampleOrder | None = None) -> Blend:
    """Open (and with data.index auto, index) every training source; with torch.distributed, all ranks call this.

    `lanes`: sequences of a step, over all ranks. `order`: of its samples; None: blended by weight.

    Raises DataError on every rank; see TrainingSet.
    """
    sources = [source for _, source in data.entries()]
    sets = [
        TrainingSet(
            source.train,
            seq_len,
            data.seed,
            data.cache,
            documents=data.documents,
            name=source.name,
            eos_id=source.eos_id,
            vocab_size=source.vocab_size,
            build=data.index == "auto",
            lanes=lanes,
        )
        for source in sources
    ]
    return Blend(sets, order or blended(data))


def blended(data: DataConfig) -> BlendOrder:
    """The order of a blend."""
    return BlendOrder([source.weight for _, source in data.entries()])


def open_heldout(data: DataConfig, seq_len: int, windows: int) -> Heldout:
    """Open every held-out set; see Heldout. A phase's share is its weight's too. Raises DataError."""
    sources = [source for _, source in data.entries()]
    sets = {
        source.name: HeldoutSet(source.heldout, seq_len, data.documents, source.eos_id, source.vocab_size)
        for source in sources
    }
    return Heldout(sets, blended(data).shares, windows)
