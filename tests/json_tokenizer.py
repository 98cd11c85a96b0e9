"""Small tokenizer.json files, trained on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def byte_level(path: Path, texts: Sequence[str], special: Sequence[str] = ("<|endoftext|>",), spare: int = 0) -> Path:
    """GPT-2's kind: BPE over bytes, exact for every text. spare: so many unused tokens are added."""
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
    made.add_tokens([f"unused{number}" for number in range(spare)])
    made.save(str(path))
    return path
