"""Tokenizers with an exact round trip: decode(encode(text)) == text for every Unicode text.

Trained here are sentencepiece models. Settings: byte fallback for unseen characters, no normalisation, whitespace kept
as it is, newline and tab as symbols of their own (fed line by line, sentencepiece never sees a newline and would spell
it as a byte).
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import sentencepiece

from data_prep.errors import DataError
from data_prep.files import atomic_write
from data_prep.paths import naming
from data_prep.tokenizing.json_model import JsonModel
from data_prep.tokenizing.sentencepiece_model import SentencePieceModel

# The model file records the number of threads, so it is fixed: the same text gives the same sha256 anywhere.
TRAINING_THREADS = 4
# sentencepiece drops sentences above 4192 bytes; a character takes at most 4.
LONGEST_PIECE_OF_LINE = 1000
# What other tokenizers change: white space, accents, ligatures, and sentencepiece's own mark.
PROBES = (
    "tab\tand  two spaces",
    " a space first",
    "line\n\n  indented\r\n",
    "漢字 \U0001f600 e\u0301 \u00e9 \ufb01",
    "a\u2581b",
)


def replace_lone_surrogates(text: str) -> str:
    """Text that UTF-8 can hold: surrogate pairs joined, lone ones (valid in JSON) replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class TokenizerModel(Protocol):
    """What reads one kind of model file."""

    vocab_size: int
    eos_id: int
    pad_id: int

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        """Token ids of each text, none of them special; no text has a lone surrogate."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; special ones give nothing."""
        ...

    def character_starts(self) -> np.ndarray:
        """See `Tokenizer.character_starts`."""
        ...

    def pieces(self) -> list[str]:
        """The model's own name of every token, by id."""
        ...


class Tokenizer:
    """A trained model: sentencepiece's, ours or another, or a tokenizer.json; encoding adds no special tokens.

    Attributes: vocab_size, eos_id, pad_id (distinct from eos_id; -1 if the model has none, as Llama's),
        is_json (a tokenizer.json), sha256 (hex, of the model file), model_bytes, path (of the model file as given, ""
        if unknown).
    """

    def __init__(self, model: bytes, path: str = "") -> None:
        name = path or "tokenizer"
        self.path = path
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.model_bytes = model
        self.is_json = model.lstrip()[:1] == b"{"
        self._model: TokenizerModel = (JsonModel if self.is_json else SentencePieceModel)(model, name)
        self.vocab_size: int = self._model.vocab_size
        self.eos_id: int = self._model.eos_id
        self.pad_id: int = self._model.pad_id

    def failures(self, texts: Iterable[str]) -> list[str]:
        """Those of `texts` that decode(encode(text)) changes; none for models trained here."""
        return [text for text in texts if self.decode(self.encode(text)) != text]

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a model file; raises DataError if it is missing, unreadable or not a model."""
        # no advice to train one: it would have other ids than the sets that exist
        with naming(path, "no such file; --tokenizer FILE names the model, `tokenizer train` makes a first one"):
            model = Path(path).read_bytes()
        return cls(model, str(path))

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        """Token ids of each text; one call with threads is 1.9 times as fast on 2 cores as without."""
        return self._model.encode_batch([replace_lone_surrogates(text) for text in texts], num_threads)

    def character_starts(self) -> np.ndarray:
        """Bool [vocab_size]: False for the byte pieces that continue a character of UTF-8."""
        return self._model.character_starts()

    def pieces(self) -> list[str]:
        """The model's own name of every token, by id."""
        return self._model.pieces()

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; control tokens (EOS, padding) give nothing."""
        return self._model.decode(ids)


def refuse_lossy(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer.json that does not give every text back: losses per byte would be of another text.

    Other sentencepiece models are taken as they are, `tokenizer info` describes them.

    Raises:
        DataError: with a text that comes back changed, and how.
    """
    if tokenizer.is_json and (changed := tokenizer.failures(PROBES)):
        back = tokenizer.decode(tokenizer.encode(changed[0]))
        raise DataError(
            f"{tokenizer.path}: {len(changed)} of {len(PROBES)} probe texts do not come back exactly: {changed[0]!r} "
            f"becomes {back!r}; a tokenizer over bytes (ByteLevel) is exact, --lossy takes this one all the same"
        )


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """What sentencepiece learns from: non-empty lines, cut where it would silently drop them."""
    for text in texts:
        for line in replace_lone_surrogates(text).replace("\t", "\n").split("\n"):
            for start in range(0, len(line), LONGEST_PIECE_OF_LINE):
                yield line[start : start + LONGEST_PIECE_OF_LINE]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, out: str | Path, model_type: Literal["bpe", "unigram"] = "bpe"
) -> Tokenizer:
    """Train on texts and write the model file atomically. BPE trains faster, unigram encodes faster.

    Raises:
        DataError: the text is too small (or too varied) for `vocab_size`; the message has the largest
            (smallest) vocabulary that works.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a short corpus then gives a smaller model, whose size we can report
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            pad_id=2,  # megatron-core stops masking pads when pad and end of document are one token
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_training_failure(vocab_size, str(error))) from None
    tokenizer = Tokenizer(model.getvalue(), str(out))
    if tokenizer.vocab_size != vocab_size:
        raise DataError(
            f"vocabulary {vocab_size} is too large for this text; the largest that works is {tokenizer.vocab_size}"
        )
    with atomic_write(out) as stream:
        stream.write(model.getvalue())
    return tokenizer


def _training_failure(vocab_size: int, message: str) -> str:
    needed = re.search(r"smaller than required_chars. \d+ vs (\d+)", message)
    if needed:
        return f"vocabulary {vocab_size} is too small for this text; the smallest that works is {needed[1]}"
    return f"sentencepiece cannot train on this text: {message.strip() or 'no message'}"


def available_threads() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
