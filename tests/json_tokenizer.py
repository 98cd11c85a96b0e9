"""Small tokenizer.json files, trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def byte_level(path: Path, texts: Sequence[str], special: Sequence[str] = ("<|endoftext|>",), spare: int = 0) -> Path:
    """GPT-2's kind: BPE over bytes, exact for every text. spare: so many ids are left out before the merged tokens."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    described = json.loads(made.to_str())
    vocab = described["model"]["vocab"]
    described["model"]["vocab"] = {piece: number + (number > 256) * spare for piece, number in vocab.items()}
    path.write_text(json.dumps(described), encoding="utf-8")
    return path
