"""The `data` section of a run's configuration."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from data_prep.errors import DataError
from data_prep.training.index_key import BUILD_INDEX, IndexKey, too_short_for
from data_prep.training.index_store import TokenStore, open_store
from hope.sections import Problem

MAKE_QUICKSTART = "`python -m data_prep quickstart --out data/quickstart` makes data/quickstart/train and .../heldout"
DOCUMENTS = ("carry", "reset", "doc", "stream")


@dataclass
class SourceConfig:
    """One source of a blend."""

    name: str = ""
    """Key of its metrics (`heldout_loss.NAME`) and of its order: a renamed source is read in another order."""
    train: str = ""
    """Prefix of the training .bin/.idx, or a folder of raw uint16 files."""
    heldout: str = ""
    """The same for the held-out set."""
    weight: float = 1.0
    """Share of the training samples, relative to the other sources' weights."""
    eos_id: int = -1
    """For raw folders: the token that ends documents; -1: as FOLDER/raw.json says."""
    vocab_size: int = 0
    """For raw folders: number of token ids; 0: as FOLDER/raw.json says."""


@dataclass
class DataConfig:
    """Token files to train and evaluate on, and how documents inside a window are treated."""

    train: str = ""
    """Prefix of the training .bin/.idx, for example "data/quickstart/train", or a folder of raw uint16 files."""
    heldout: str = ""
    """The same for the held-out set."""
    sources: list[SourceConfig] = field(default_factory=list)
    """A blend: [{name, train, heldout, weight}, ...] instead of `train` and `heldout`."""
    documents: Literal["carry", "reset", "doc", "stream"] = "carry"
    """carry: memories run on over document boundaries inside a window; reset: they start anew at every document's
    first token; doc: one document, or a piece of one, per row, padded; stream: rows follow one another in the text, and
    each goes on with the state that the row before it left, from step to step (docs/data_training.md)."""
    seed: int = 1234
    """Order of the training windows; with documents=stream, where in the text the first row begins."""
    cache: str = ""
    """Folder for index files, on a file system that all nodes share; empty: PREFIX.cache/ beside the data."""
    index: Literal["auto", "require"] = "auto"
    """auto: rank 0 builds a missing index; require: a missing index is an error, build it before the job."""

    def entries(self) -> list[tuple[str, SourceConfig]]:
        """(YAML path, source) of every source; the single form is one source without a name."""
        if self.sources:
            return [(f"data.sources[{number}]", source) for number, source in enumerate(self.sources)]
        return [("data", SourceConfig(train=self.train, heldout=self.heldout))]

    def problems(self, vocab_size: int, seq_len: int) -> Iterator[Problem]:
        """Yield (path, what is wrong, what would work) for this section and its fit to the model.

        Args:
            vocab_size: rows of the model's embedding.
            seq_len: T, tokens per window.
        """
        if self.documents not in DOCUMENTS:
            yield Problem("data.documents", f"{self.documents!r} is not a way to treat documents", ", ".join(DOCUMENTS))
        if self.seed < 0:
            yield Problem("data.seed", f"{self.seed} is negative", "0 or more")
        if self.sources:
            yield from self._blend_problems()
        if self.documents == "stream" and len(self.sources) > 1:
            what = f"stream follows one text, and data.sources names {len(self.sources)}"
            yield Problem("data.documents", what, "carry; or one source, of all texts put together")
        found: dict[str, TokenStore] = {}
        for path, source in self.entries():
            for key, prefix in (("train", source.train), ("heldout", source.heldout)):
                if not prefix:
                    yield Problem(f"{path}.{key}", "is not set", f"the prefix of a token set; {MAKE_QUICKSTART}")
                    continue
                try:
                    found[f"{path}.{key}"] = open_store(prefix, source.eos_id, source.vocab_size)
                except DataError as error:
                    yield Problem(f"{path}.{key}", str(error), MAKE_QUICKSTART)
        yield from _window_problems(found, seq_len, self.documents)
        yield from _vocabulary_problems(found, vocab_size)
        yield from _together_problems(found)
        if self.index == "require":
            yield from self._index_problems(found, seq_len)

    def _blend_problems(self) -> Iterator[Problem]:
        for path, value in (("data.train", self.train), ("data.heldout", self.heldout)):
            if value:
                yield Problem(
                    path, "is set beside data.sources, which replaces it", f"{path}= (empty), or no data.sources"
                )
        names = [source.name for source in self.sources]
        for (path, source), place in zip(self.entries(), range(len(names)), strict=True):
            if not re.fullmatch(r"[\w.-]+", source.name):
                yield Problem(f"{path}.name", f"{source.name!r} is not a name", "letters, digits, _ - and .")
            elif source.name in names[:place]:
                yield Problem(f"{path}.name", f"{source.name!r} is taken by an earlier source", "another name")
            if not (math.isfinite(source.weight) and source.weight > 0):
                yield Problem(
                    f"{path}.weight", f"{source.weight} is not a share", "a positive number, or leave the source out"
                )

    def _index_problems(self, found: dict[str, TokenStore], seq_len: int) -> Iterator[Problem]:
        for path, store in found.items():
            folder = IndexKey(seq_len, self.seed, self.documents).folder(store, self.cache)
            if path.endswith(".train") and folder and not folder.is_dir():
                what = f"has no index {folder}, and data.index is require"
                yield Problem(path, what, BUILD_INDEX)


def _window_problems(found: dict[str, TokenStore], seq_len: int, documents: str) -> Iterator[Problem]:
    for path, store in found.items():
        too_short = too_short_for(store.tokens, seq_len, documents)
        if too_short:
            yield Problem(path, too_short[0].replace("seq_len", "train.seq_len"), f"more text, or {too_short[1]}")


def _vocabulary_problems(found: dict[str, TokenStore], vocab_size: int) -> Iterator[Problem]:
    needed = max((store.vocab_size for store in found.values()), default=0)
    if needed > vocab_size:
        what = f"{vocab_size} is smaller than the data's vocabulary of {needed}"
        yield Problem("model.vocab_size", what, f"model.vocab_size={needed} or more")


def _together_problems(found: dict[str, TokenStore]) -> Iterator[Problem]:
    """All sets must speak of the same tokens, and no held-out set may be a training set."""
    if not found:
        return
    first_path, first = next(iter(found.items()))
    trained = {store.fingerprint: path for path, store in found.items() if path.endswith(".train")}
    for path, store in found.items():
        if store.tokenizer and first.tokenizer and store.tokenizer != first.tokenizer:
            what = (
                f"its tokenizer ({store.tokenizer[:12]}) is not that of {first_path} ({first.tokenizer[:12]}),"
                " so token ids mean different text"
            )
            yield Problem(path, what, "a set made with the same tokenizer.model")
        elif store.eos_id != first.eos_id:
            what = f"its end of document is token {store.eos_id}, that of {first_path} is {first.eos_id}"
            yield Problem(path, what, f"data that ends documents with {first.eos_id}")
        if path.endswith(".heldout") and store.fingerprint in trained:
            yield Problem(path, f"holds the same tokens as {trained[store.fingerprint]}", "text that is not trained on")
