"""A token set and a config small enough that a whole run takes a second."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data_prep.indexed import IndexedWriter
from data_prep.manifest import TokenSetManifest

VOCAB, EOS = 64, 1

CONFIG = """
run: {name: tiny, dir: RUNS}
model:
  vocab_size: 64
  width: 16
  layers: 2
  heads: 2
  MIXER
  cms: {periods: [1, 3]}
data: {train: DATA/train, heldout: DATA/heldout}
optim: {lr: 1e-2, warmup: 2}
train: {steps: 8, seq_len: 16, global_batch: 8, micro_batch: 2, eval_every: 4, eval_windows: 8}
checkpoint: {every: 0}
log: {every: 1, tensorboard: false}
launch: {slow: 0}
"""


def write_documents(prefix: str | Path, vocab_size: int, documents: Iterable[Sequence[int]]) -> IndexedWriter:
    """PREFIX.bin and PREFIX.idx of these token ids; the writer that has finished, with lengths and digests."""
    with IndexedWriter(prefix, vocab_size) as writer:
        for ids in documents:
            writer.add_encoded(np.array(ids, writer.dtype).tobytes(), np.array([len(ids)]))
    return writer


def token_set(prefix: Path, documents: int, seed: int, vocab_size: int = VOCAB) -> None:
    """Documents of a noisy counting language: learnable, so that a loss can fall."""
    generator = np.random.default_rng(seed)
    counted = []
    for _ in range(documents):
        length = int(generator.integers(10, 60))
        ids = (generator.integers(2, vocab_size) + np.arange(length)) % (vocab_size - 2) + 2
        counted.append([*ids.tolist(), EOS])
    writer = write_documents(prefix, vocab_size, counted)
    tokens = sum(writer.lengths)
    TokenSetManifest(
        documents=documents,
        tokens=tokens,
        text_bytes=tokens,
        bytes_per_token=1.0,
        vocab_size=vocab_size,
        eos_id=EOS,
        sha256_bin=writer.sha256_bin,
        sha256_idx=writer.sha256_idx,
        sha256_tokenizer=hashlib.sha256(b"counting").hexdigest(),
        sha256_source="",
    ).save(prefix)


def config_text(folder: Path, memory: str = "matrix") -> str:
    """The config with its runs and data in `folder`. memory: of the mixer hope, or "attention" for that mixer."""
    mixer = f"mixers: {{hope: {{memory: {memory}, projection_chunk: 4, main_chunk: 8}}}}"
    mixer = "pattern: [attention]" if memory == "attention" else mixer
    return CONFIG.replace("RUNS", str(folder / "runs")).replace("DATA", str(folder)).replace("MIXER", mixer)


def config_file(folder: Path, memory: str = "matrix", documents: tuple[int, int] = (60, 20)) -> str:
    """Token sets, of `documents` to train on and held out, and a config in `folder`; returns the config's path."""
    token_set(folder / "train", documents[0], 0)
    token_set(folder / "heldout", documents[1], 1)
    path = folder / "tiny.yaml"
    path.write_text(config_text(folder, memory))
    return str(path)
