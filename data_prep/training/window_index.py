"""Indices that training maps into memory: built once, whole or absent, named after the data that they belong to.

megatron-core writes its cache file by file and keys it by path, not by data: a killed or concurrent job leaves half a
cache, and re-tokenised data loads the old indices (58 of 60 reads then failed). Here rank 0 builds in a private
folder, renames it, and the folder's name holds the data's fingerprint. For .bin/.idx pairs the index is that of
megatron-core's GPTDataset for exactly one epoch, or, with one document per row, where the rows begin. Raw folders
read in file order need none.
"""

import os
import shutil
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch.distributed as dist

from data_prep.errors import DataError
from data_prep.files import sha256_file, write_json
from data_prep.training.index_key import BUILD_INDEX, IndexKey
from data_prep.training.index_rows import DocumentRows, StreamWindows, Windows
from data_prep.training.index_store import MegatronStore, TokenStore
from hope.nesting import json_of

STAMP = "checked.json"
WRITTEN = "written.json"
"""sha256 of every file of an index: a damaged one would give other windows, or none far into the run."""
MOST_DOCUMENTS = 2**31 - 1  # megatron-core numbers documents in int32
# numpy raises ValueError for a truncated .npy, EOFError for an empty one, and takes others for pickles; megatron-core
# AssertionError for sizes that do not fit
_UNREADABLE = (OSError, ValueError, AssertionError, EOFError, UnpicklingError)


@dataclass(frozen=True)
class _MegatronWindows:
    """One epoch of GPTDataset: documents shuffled once by its seed, then cut into windows."""

    dataset: Any
    seq_len: int

    def __len__(self) -> int:
        return len(self.dataset)

    def window(self, index: int) -> np.ndarray:
        item = self.dataset[index]
        return np.append(item["tokens"].numpy(), item["labels"][-1].item())

    def real_targets(self, index: int) -> int:
        return self.seq_len


def open_windows(store: TokenStore, key: IndexKey, cache: str = "", *, build: bool = True) -> Windows:
    """The windows of `store`; collective if torch.distributed is initialised.

    Rank 0 first makes sure that the bytes are those of the manifest. `build` False: a missing index is an error.

    Raises:
        DataError: on every rank, if the data has changed or the index is missing, cannot be built or cannot be read.
    """
    final = key.folder(store, cache)
    if final is None:
        return StreamWindows(store, key.seq_len)
    error = ""
    if _rank() == 0:
        error = _prepare(store, key, final, build=build)
    agree(error)
    windows: Windows | None = None
    if not final.is_dir():
        error = f"{final} was written by rank 0 and is not visible here; set data.cache to a shared file system"
    else:
        try:
            windows = _read(store, key, final)
        except _UNREADABLE as problem:
            error = f"{final} cannot be read ({problem}); remove this folder, it will be built again"
    agree(error)
    assert windows is not None
    return windows


def agree(error: str) -> None:
    """Raise DataError on every rank if any rank has an error, so that no rank waits for one that is gone.

    With NCCL the current CUDA device must be set before.
    """
    errors = [error]
    if dist.is_available() and dist.is_initialized():
        errors = [""] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for rank, message in enumerate(errors):
        if message:
            raise DataError(message if len(errors) == 1 else f"rank {rank}: {message}")


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _prepare(store: TokenStore, key: IndexKey, final: Path, *, build: bool) -> str:
    """Check the data and build what is missing; returns an error message or ""."""
    try:
        if final.is_dir():
            store.check_unchanged(final / STAMP)
            return _damaged(final)
        if isinstance(store, MegatronStore) and store.manifest.documents > MOST_DOCUMENTS:
            what = f"{store.manifest.documents} documents, an index of megatron-core holds {MOST_DOCUMENTS}"
            return f"{store.name}.idx: {what}; make several sets of it and name them in data.sources"
        if not build:
            return f"{store.name}: no index {final}, and data.index is require; {BUILD_INDEX}"
        return _publish(store, key, final)
    except DataError as error:
        return str(error)


def _publish(store: TokenStore, key: IndexKey, final: Path) -> str:
    """Build the index in a private folder and rename it to `final`; returns an error message or ""."""
    private = final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        private.mkdir(parents=True, exist_ok=True)
        store.check_unchanged(private / STAMP)
        _write(store, key, private)
        if digests := {path.name: sha256_file(path) for path in private.glob("*.npy")}:
            write_json(private / WRITTEN, digests)
        os.rename(private, final)
    except _UNREADABLE as problem:
        if not final.is_dir():  # else another job has published the same index in the meantime
            return f"cannot build the index {final} ({problem}); set data.cache to a folder that can be written"
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return ""


def _damaged(folder: Path) -> str:
    """What of an index is not as it was written, or "". One without a record is as old as its version of this file."""
    try:
        recorded = json_of((folder / WRITTEN).read_bytes())
        wrong = [name for name, digest in recorded.items() if sha256_file(folder / name) != digest]
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, AttributeError) as problem:
        wrong = [str(problem)]
    return f"{folder} is not what was written ({wrong[0]}); remove this folder, it will be built again" if wrong else ""


def _write(store: TokenStore, key: IndexKey, folder: Path) -> None:
    if key.documents == "doc":
        rows = DocumentRows.of(store, key.seq_len)
        for name in ("bounds", "first_row"):
            with open(folder / f"{name}.npy", "wb") as stream:
                np.save(stream, getattr(rows, name))
                stream.flush()
                os.fsync(stream.fileno())
    elif key.documents != "stream":
        _gpt_dataset(store, key, folder)


def _read(store: TokenStore, key: IndexKey, folder: Path) -> Windows:
    if key.documents == "doc":
        bounds, first_row = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("bounds", "first_row"))
        return DocumentRows(store, key.seq_len, bounds, first_row)
    if key.documents == "stream":
        return StreamWindows(store, key.seq_len)
    return _MegatronWindows(_gpt_dataset(store, key, folder), key.seq_len)


def _gpt_dataset(store: TokenStore, key: IndexKey, cache: Path) -> Any:
    with warnings.catch_warnings():  # four notices that optional packages are absent
        warnings.simplefilter("ignore")
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split

    assert isinstance(store, MegatronStore)
    # pad = -1 is no token, so megatron-core rewrites nothing in our windows. It asks no more of a tokenizer.
    tokenizer = SimpleNamespace(
        unique_identifiers={},
        vocab_size=store.vocab_size,
        eod=store.eos_id,
        eos=store.eos_id,
        pad=-1,
    )
    config = GPTDatasetConfig(
        random_seed=key.seed,
        sequence_length=key.seq_len,
        blend=([store.name], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # a mask per window costs 1100 times the reading
    )
    documents = np.arange(store.manifest.documents, dtype=np.int32)
    # num_samples=None is one epoch: with a number, crossing an epoch reshuffles what came before. The path
    # in the cache key is the fingerprint, so that data which is moved keeps its cache.
    return GPTDataset(IndexedDataset(store.name), store.fingerprint, documents, None, Split.train, config)
