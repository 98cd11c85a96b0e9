"""What tests of evaluation share: a tokenizer of a few letters, stand-ins for models, and rows."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import named
from stored import store
from torch import Tensor

from data_prep.tokenizing.tokenizer import Tokenizer, train_tokenizer
from hope.evaluate.rows import Row
from hope.evaluate.scorer import Scores
from hope.memory.config import MemoryConfig
from hope.model import Model

TEXT = "the cat sat on the mat.\n\nA café, naïve — 猫 and 🐈.\n  Two  spaces,\ttabs and more of the cats.\n" * 5


@functools.cache
def model_bytes(folder: Path) -> bytes:
    return train_tokenizer([TEXT] * 3, 300, folder / "tokenizer.model").model_bytes


def tokenizer_in(folder: Path) -> Tokenizer:
    """A BPE of 300 pieces, 256 of them bytes."""
    return Tokenizer(model_bytes(folder), str(folder / "tokenizer.model"))


def tiny(kind: str = "hope", seed: int = 0, vocab_size: int = 64) -> Model:
    """Two layers of width 16 in float64, with weights large enough that context matters."""
    memory = MemoryConfig(projection_chunk=4, main_chunk=8) if kind == "hope" else None
    model = Model(named(kind, memory=memory, vocab_size=vocab_size, width=16, layers=2, heads=2)).initialise(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model.double()


def random_rows(lengths: Sequence[int], vocab_size: int = 64, seed: int = 0) -> list[Row]:
    generator = np.random.default_rng(seed)
    return [Row(generator.integers(0, vocab_size, n + 1), int(generator.integers(0, n))) for n in lengths]


class Counting:
    """Scores by a rule that knows the number of calls and of tokens before: target t costs t + (tokens before) / 1000.

    Anything that shifts a target, loses a state or counts a token twice changes its sums.
    """

    def __call__(self, tokens_TB: Tensor, targets_TB: Tensor, state: Any, keep_state: bool) -> Scores:
        before = 0 if state is None else state
        place = before + torch.arange(tokens_TB.shape[0], dtype=torch.float64).unsqueeze(1)
        nats = targets_TB.double() + place / 1000
        return Scores(nats, targets_TB % 2 == 0, before + tokens_TB.shape[0] if keep_state else None)


class Uniform:
    """Every token has probability 1 / vocab_size."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, tokens_TB: Tensor, targets_TB: Tensor, state: Any, keep_state: bool) -> Scores:
        nats = torch.full(targets_TB.shape, float(np.log(self.vocab_size)), dtype=torch.float64)
        return Scores(nats, targets_TB == 0, None)


def stored_model(folder: Path, seed: int = 0, documents: str = "carry") -> Path:
    """A run whose checkpoint has a tokenizer beside its data, and held-out tokens of TEXT at folder/data/heldout."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    tokenizer = tokenizer_in(data)
    (data / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    manifest = {"sha256_tokenizer": tokenizer.sha256, "tokenizer": str(data / "tokenizer.model")}
    (data / "train.manifest.json").write_text(json.dumps(manifest))
    config = {"train": {"seq_len": 32}, "data": {"train": str(data / "train"), "documents": documents}}
    run = folder / f"run{seed}{documents}"
    store(run, tiny("transformer", seed, tokenizer.vocab_size).float(), 7, config)
    return run
