"""What an index is built for, and where it is stored. No torch in here: configurations are checked with it."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from data_prep.paths import user_path
from data_prep.training.index_store import MegatronStore, TokenStore

BUILD_INDEX = "`python -m data_prep index CONFIG` (with the overrides of the run) builds it on one CPU"


@dataclass(frozen=True)
class IndexKey:
    """What an index depends on besides the data: T, the seed of megatron-core's document shuffle, one-document rows."""

    seq_len: int
    seed: int
    documents: str = "carry"

    def folder(self, store: TokenStore, cache: str) -> Path | None:
        """Where the index of `store` is stored; None if it needs none. `cache` empty: NAME.cache beside the data."""
        name = f"{store.fingerprint[:16]}-len{self.seq_len}"
        if self.documents == "doc":
            name += "-doc"
        elif isinstance(store, MegatronStore) and self.documents == "stream":
            name += "-stream"  # in file order: it holds no index, but the note that the bytes were checked
        elif isinstance(store, MegatronStore):
            name += f"-seed{self.seed}-megatron{version('megatron-core')}"
        else:
            return None
        return Path(user_path(cache) if cache else f"{store.name}.cache", name)


def too_short_for(tokens: int, seq_len: int, documents: str) -> tuple[str, str] | None:
    """(what is wrong, what would work) if not one window fits; rows of one document may be padded."""
    if documents == "doc" or tokens > seq_len:
        return None
    return f"{tokens} tokens are fewer than one window of seq_len {seq_len} + 1", f"train.seq_len at most {tokens - 1}"
