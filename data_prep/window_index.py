"""megatron-core's GPTDataset for exactly one epoch, with an index cache that is whole or absent.

megatron-core writes its cache file by file and keys it by path, not by data: a killed or concurrent job
leaves half a cache, and re-tokenised data loads the old indices (58 of 60 reads then failed). Here rank 0
builds in a private folder, renames it, and the folder's name holds the data's fingerprint.
"""

import os
import shutil
import socket
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch.distributed as dist

from data_prep.errors import DataError
from data_prep.manifest import Manifest


def build_window_dataset(prefix: str, manifest: Manifest, seq_len: int, seed: int, cache_dir: str) -> Any:
    """GPTDataset of one epoch over all documents; collective if torch.distributed is initialised.

    Raises:
        DataError: on every rank, if the index cannot be built on rank 0 or read on any rank.
    """
    name = f"{manifest.fingerprint[:16]}-len{seq_len}-seed{seed}-megatron{version('megatron-core')}"
    final = Path(cache_dir or f"{prefix}.cache", name)
    error = ""
    if _rank() == 0 and not final.is_dir():
        error = _publish(prefix, manifest, seq_len, seed, final)
    agree(error)
    dataset = None
    if not final.is_dir():
        error = f"{final} was written by rank 0 and is not visible here; set data.cache to a shared file system"
    else:
        try:
            dataset = _gpt_dataset(prefix, manifest, seq_len, seed, final)
        except (OSError, ValueError, AssertionError) as problem:
            error = f"{final} cannot be read ({problem}); remove this folder, it will be built again"
    agree(error)
    return dataset


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


def _publish(prefix: str, manifest: Manifest, seq_len: int, seed: int, final: Path) -> str:
    """Build the index in a private folder and rename it to `final`; returns an error message or ""."""
    private = final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        _gpt_dataset(prefix, manifest, seq_len, seed, private)
        os.rename(private, final)
    except (OSError, ValueError, AssertionError) as problem:
        if not final.is_dir():  # else another job has published the same index in the meantime
            return f"cannot build the index {final} ({problem}); set data.cache to a folder that can be written"
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return ""


def _gpt_dataset(prefix: str, manifest: Manifest, seq_len: int, seed: int, cache: Path) -> Any:
    with warnings.catch_warnings():  # four notices that optional packages are absent
        warnings.simplefilter("ignore")
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split

    # pad = -1 is no token, so megatron-core rewrites nothing in our windows. It asks no more of a tokenizer.
    tokenizer = SimpleNamespace(
        unique_identifiers={},
        vocab_size=manifest.vocab_size,
        eod=manifest.eos_id,
        eos=manifest.eos_id,
        pad=-1,
    )
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_len,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # a mask per window costs 1100 times the reading
    )
    documents = np.arange(manifest.documents, dtype=np.int32)
    # num_samples=None is one epoch: with a number, crossing an epoch reshuffles what came before. The path
    # in the cache key is the fingerprint, so that data which is moved keeps its cache.
    return GPTDataset(IndexedDataset(prefix), manifest.fingerprint, documents, None, Split.train, config)
