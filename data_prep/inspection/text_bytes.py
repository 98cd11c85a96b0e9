"""Bytes of text in a stream of tokens, in bounded memory however long a document is."""

from collections.abc import Iterator

import numpy as np

from data_prep.tokenizing.tokenizer import Tokenizer

PIECE_TOKENS = 1 << 16  # 4 MB as a list of Python's numbers; a document of 10^9 tokens would take 20 GB


def count_text_bytes(tokens: np.ndarray, lengths: np.ndarray, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of all documents' texts; `tokens` [sum of lengths] may be mapped from a file."""
    starts = tokenizer.character_starts()
    anchor = _anchor(tokenizer)
    ahead = len(tokenizer.decode(anchor).encode())
    count = begin = 0
    for length in lengths.tolist():
        for start, stop in _pieces(tokens, begin, begin + length, starts):
            ids = tokens[start:stop].tolist()
            if start == begin:
                count += len(tokenizer.decode(ids).encode())
            else:  # some models drop a space at the beginning of a text, and here none begins
                count += len(tokenizer.decode(anchor + ids).encode()) - ahead
        begin += length
    return count


def _pieces(tokens: np.ndarray, begin: int, end: int, starts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of at most PIECE_TOKENS that cover a document and do not cut a character that is spelt in bytes."""
    while begin < end:
        stop = min(begin + PIECE_TOKENS, end)
        if stop < end:
            first = max(begin + 1, stop - 3)  # a character has four bytes at most
            good = np.flatnonzero(starts[tokens[first : stop + 1]])
            stop = first + int(good[-1]) if len(good) else stop
        yield begin, stop
        begin = stop


def _anchor(tokenizer: Tokenizer) -> list[int]:
    """A token with a text of its own, before which nothing is dropped."""
    return next(([number] for number in range(tokenizer.vocab_size) if tokenizer.decode([number]).strip()), [])
