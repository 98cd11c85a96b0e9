"""Hugging Face's tokenizer.json, by the library `tokenizers` (the extra `hf`)."""

import re
from typing import Any

import numpy as np

from data_prep.errors import DataError
from hope.nesting import json_of

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|end|>", "<|im_end|>", "<|eot_id|>")
"""What ends a document, by the name of a special token: the first of these that the file has."""
PADS = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class JsonModel:
    """The content of a tokenizer.json; `name` stands in messages. A `TokenizerModel`.

    Special tokens in a text are text: `<|endoftext|>` in a document does not end it. The post-processor, which adds
    special tokens, is not used, as a document's end is added here.
    """

    def __init__(self, model: bytes, name: str) -> None:
        try:
            import tokenizers
        except ImportError:
            raise DataError(f"{name}: a tokenizer.json needs `pip install tokenizers` (the extra hf)") from None
        try:
            described = json_of(model)
            self._model = tokenizers.Tokenizer.from_str(model.decode("utf-8"))
        except Exception as error:  # the library raises the base class
            raise DataError(f"{name}: not a tokenizer.json ({error})") from None
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        self._ids: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values(), default=-1) + 1
        special = {entry["content"]: entry["id"] for entry in described.get("added_tokens", ()) if entry["special"]}
        self.eos_id = next((special[word] for word in ENDS if word in special), -1)
        self.pad_id = next((special[word] for word in PADS if word in special), -1)
        if self.eos_id < 0:
            shown = ", ".join(list(special)[:8]) or "none"
            raise DataError(
                f"{name}: no special token of it is known to end a text; it has {shown}, known are {', '.join(ENDS)}"
            )
        self._byte_level = "ByteLevel" in _types(described.get("decoder"))

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        """Token ids of each text. With more than one thread, as many as the library takes."""
        if num_threads > 1:
            return [found.ids for found in self._model.encode_batch_fast(texts, add_special_tokens=False)]
        return [self._model.encode(text, add_special_tokens=False).ids for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text; special tokens give nothing."""
        return self._model.decode(ids, skip_special_tokens=True)

    def pieces(self) -> list[str]:
        """By id; ids that the file leaves out have names that no text gives."""
        names = {number: piece for piece, number in self._ids.items()}
        return [names.get(number, f"<|unused {number}|>") for number in range(self.vocab_size)]

    def character_starts(self) -> np.ndarray:
        """Bool [vocab_size]: False for tokens that begin with a byte from 0x80 to 0xBF."""
        first = _byte_letters() if self._byte_level else {}
        starts = np.ones(self.vocab_size, dtype=bool)
        for piece, number in self._ids.items():
            found = _BYTE.fullmatch(piece)
            byte = int(found[1], 16) if found else first.get(piece[:1], 0)
            starts[number] = not 0x80 <= byte < 0xC0
        return starts


def _types(decoder: Any) -> set[str]:
    """The kinds of a decoder and of those in it."""
    if not isinstance(decoder, dict):
        return set()
    return {str(decoder.get("type"))}.union(*(_types(part) for part in decoder.get("decoders", ())))


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: the letter that stands for each byte. Printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
