"""The `data` section of a run's configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from data_prep.errors import DataError
from data_prep.manifest import Manifest, open_checked

MAKE_QUICKSTART = "`python -m data_prep quickstart --out data/quickstart` makes data/quickstart/train and .../heldout"

Problem = tuple[str, str, str]


@dataclass
class DataConfig:
    """Token files to train and evaluate on, and how documents inside a window are treated.

    Attributes:
        train: prefix of the training .bin/.idx, for example "data/quickstart/train".
        heldout: prefix of the held-out .bin/.idx.
        documents: "carry" lets memories run on over document boundaries inside a window, "reset"
            starts them anew at every document's first token.
        seed: order of the training windows.
        cache: folder for megatron-core's index files; empty means PREFIX.cache/ next to the data. It
            must be on a file system that all nodes share.
    """

    train: str = ""
    heldout: str = ""
    documents: Literal["carry", "reset"] = "carry"
    seed: int = 1234
    cache: str = ""

    def problems(self, vocab_size: int, seq_len: int) -> Iterator[Problem]:
        """Yield (path, what is wrong, what would work) for this section and its fit to the model.

        Args:
            vocab_size: rows of the model's embedding.
            seq_len: T, tokens per window.
        """
        if self.documents not in ("carry", "reset"):
            yield "data.documents", f"{self.documents!r} is not a way to treat documents", "carry or reset"
        if self.seed < 0:
            yield "data.seed", f"{self.seed} is negative", "0 or more"
        found: dict[str, Manifest] = {}
        for path, prefix in (("data.train", self.train), ("data.heldout", self.heldout)):
            if not prefix:
                yield path, "is not set", f"the prefix of a token set; {MAKE_QUICKSTART}"
                continue
            try:
                _, found[path] = open_checked(prefix)
            except DataError as error:
                yield path, str(error), MAKE_QUICKSTART
        yield from _window_problems(found, seq_len)
        yield from _vocabulary_problems(found, vocab_size)
        yield from _pair_problems(found)


def _window_problems(found: dict[str, Manifest], seq_len: int) -> Iterator[Problem]:
    for path, manifest in found.items():
        if manifest.tokens < seq_len + 1:
            what = f"{manifest.tokens} tokens are fewer than one window of train.seq_len {seq_len} + 1"
            yield path, what, f"more text, or train.seq_len at most {manifest.tokens - 1}"


def _vocabulary_problems(found: dict[str, Manifest], vocab_size: int) -> Iterator[Problem]:
    needed = max((manifest.vocab_size for manifest in found.values()), default=0)
    if needed > vocab_size:
        what = f"{vocab_size} is smaller than the data's vocabulary of {needed}"
        yield "model.vocab_size", what, f"model.vocab_size={needed} or more"


def _pair_problems(found: dict[str, Manifest]) -> Iterator[Problem]:
    if len(found) < 2:
        return
    train, heldout = found["data.train"], found["data.heldout"]
    if train.sha256_tokenizer != heldout.sha256_tokenizer:
        what = (
            f"its tokenizer ({heldout.sha256_tokenizer[:12]}) is not that of data.train"
            f" ({train.sha256_tokenizer[:12]}), so token ids mean different text"
        )
        yield "data.heldout", what, "a set made with the same tokenizer.model"
    if train.sha256_bin == heldout.sha256_bin:
        yield "data.heldout", "holds the same tokens as data.train", "text that is not trained on"
