"""sentencepiece models, ours or others, read so that every text comes back exactly where the model allows it."""

import re
from collections.abc import Iterator

import numpy as np
import sentencepiece

from data_prep.errors import DataError

# sentencepiece writes a space as U+2581 inside, so a literal U+2581 would come back as a space.
SPACE_MARK = "\u2581"


class SentencePieceModel:
    """The content of a model file; `name` stands in messages. A `TokenizerModel`."""

    def __init__(self, model: bytes, name: str) -> None:
        if not model:  # of which sentencepiece makes a model without pieces, and complains to the terminal
            raise DataError(f"{name}: is empty; `tokenizer train` makes a model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"{name}: not a sentencepiece model ({error})") from None
        self.vocab_size: int = self._model.vocab_size()
        self.eos_id: int = self._model.eos_id()
        self.pad_id: int = self._model.pad_id()
        if self.eos_id < 0:
            raise DataError(f"{name}: the model has no end-of-sequence token; train it with eos_id >= 0")
        self._marks = self._find_marks()
        self._cut = re.compile(f"([{''.join(self._marks) or SPACE_MARK}])")

    def _find_marks(self) -> dict[str, list[int]]:
        """Characters at which text is cut, with their tokens; none in a model that adds a space before every text.

        U+2581, if there are byte pieces to spell it: sentencepiece would return it as a space. And, in a BPE model, the
        newline if no piece but its own holds one: the tokens are those of the whole text, and BPE's cost per byte grows
        with the length of what it is given (4 MB per CPU second by lines, 2 to 3 by long documents). Not in a unigram
        model: between equally probable tokens the rounding of a sum over the whole text decides.
        """
        if self._model.encode("a", out_type=str)[0].startswith(SPACE_MARK):
            return {}
        marks = {}
        ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        if all(self._model.is_byte(number) for number in ids):
            marks[SPACE_MARK] = ids
        ids = list(range(self.vocab_size))
        is_bpe = all(score.is_integer() for score in self._model.get_score(ids))  # minus the merge's rank
        if is_bpe and [piece for piece in self._model.id_to_piece(ids) if "\n" in piece] == ["\n"]:
            marks["\n"] = [self._model.piece_to_id("\n")]
        return marks

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        """Token ids of each text."""
        if not self._marks:
            return self._model.encode(texts, num_threads=num_threads)
        parts_of = [self._cut.split(text) for text in texts]  # text, mark, text, mark, ..., text
        flat = [part for parts in parts_of for part in parts[::2]]
        encoded = iter(self._model.encode(flat, num_threads=num_threads))
        return [self._join(parts, encoded) for parts in parts_of]

    def _join(self, parts: list[str], encoded: Iterator[list[int]]) -> list[int]:
        ids = list(next(encoded))
        for mark in parts[1::2]:
            ids += self._marks[mark]
            ids += next(encoded)
        return ids

    def character_starts(self) -> np.ndarray:
        """Bool [vocab_size]: False for byte pieces 0x80 to 0xBF."""
        starts = np.ones(self.vocab_size, dtype=bool)
        for byte in range(0x80, 0xC0):
            number = self._model.piece_to_id(f"<0x{byte:02X}>")
            if self._model.is_byte(number):
                starts[number] = False
        return starts

    def pieces(self) -> list[str]:
        """By id."""
        return self._model.id_to_piece(list(range(self.vocab_size)))

    def decode(self, ids: list[int]) -> str:
        """The text; control tokens give nothing."""
        return self._model.decode(ids)
