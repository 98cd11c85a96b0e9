"""Perplexity of texts, in windows or in one pass, with every token and every byte counted once.

A text is one or more segments: a file, the documents of a file, or a whole token set. Before each segment stands the
end-of-document token, as before a document in training, so that its first token is predicted too. Target i of a
segment is its token i, and no token is without a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hope.evaluate.measures import ratio
from hope.evaluate.rows import Row, Values


@dataclass(frozen=True)
class Text:
    """Tokens of a text and what they stand for.

    Attributes:
        read: tokens [start, stop) of all segments, one after the other, int64.
        bounds: where segments begin, int64 [segments + 1]; the last entry is the number of tokens.
        eos_id: the token that stands before every segment.
        bytes_of: UTF-8 bytes of the text of the first so many tokens; None if that cannot be known.
        words: of all segments; None where that is not defined (a token set).
    """

    read: Callable[[int, int], np.ndarray]
    bounds: np.ndarray
    eos_id: int
    bytes_of: Callable[[int], int | None]
    words: int | None = None

    @property
    def tokens(self) -> int:
        return int(self.bounds[-1])


class Windows:
    """Rows of a text: windows of at most `window` targets, each `stride` after the last; every target counts once.

    The first window of a segment counts whole. A later one counts its last `stride` targets (fewer at the end), the
    others are their context. `window` None: a segment is one row.

    Attributes: lengths, int64 [rows]; begins, int64 [rows], each row's first target in the text.

    Raises:
        ValueError: not 1 <= stride <= window.
    """

    def __init__(self, text: Text, window: int | None, stride: int | None = None) -> None:
        self._text = text
        if window is None:
            window = stride = max(1, int(np.diff(text.bounds).max(initial=1)))
        stride = window if stride is None else stride
        if not 1 <= stride <= window:
            raise ValueError(f"stride {stride} is not between 1 and the window of {window} tokens")
        sizes = np.diff(text.bounds)
        counts = np.where(sizes > 0, 1 + np.maximum(0, -(-(sizes - window) // stride)), 0)
        segment = np.repeat(np.arange(len(sizes)), counts)
        number = np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
        end = np.minimum(window + number * stride, sizes[segment])
        begin = number * stride
        self.lengths = end - begin
        self.begins = text.bounds[segment] + begin
        self._firsts = np.where(number > 0, window - stride, 0)
        self._opens = number == 0

    def __getitem__(self, index: int) -> Row:
        begin, length = int(self.begins[index]), int(self.lengths[index])
        if self._opens[index]:
            ids = np.concatenate([[self._text.eos_id], self._text.read(begin, begin + length)])
        else:
            ids = self._text.read(begin - 1, begin + length)
        return Row(ids, int(self._firsts[index]))

    def __len__(self) -> int:
        return len(self.lengths)

    def counted(self, index: int) -> int:
        """Targets of a row that count."""
        return int(self.lengths[index] - self._firsts[index])

    def first(self, count: int) -> FirstWindows:
        """The first `count` rows."""
        return FirstWindows(self, count)

    def positions(self, index: int) -> np.ndarray:
        """Of the targets that count: how many tokens of the row, without its first input, stand before each."""
        return np.arange(self._firsts[index], self.lengths[index])


class FirstWindows:
    """The first rows of `Windows`."""

    def __init__(self, windows: Windows, count: int) -> None:
        self._windows = windows
        self.lengths = windows.lengths[:count]

    def __getitem__(self, index: int) -> Row:
        return self._windows[index]


def bucket_of(position: np.ndarray) -> np.ndarray:
    """Bucket k has the positions 2^k - 1 to 2^(k+1) - 2: one, two, four, ... of them."""
    found: np.ndarray = np.floor(np.log2(position + 1.0)).astype(np.int64)
    return found


def repeats(ids: np.ndarray) -> np.ndarray:
    """Of tokens [n + 1] the targets [n], from the second token on, that a look back could have copied: bool, whether
    the same token has followed the same token before in this row. (The AR hits of Zoology, Arora et al., 2023.)"""
    pairs = np.stack([ids[:-1], ids[1:]], 1)
    _, first, inverse = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
    found: np.ndarray = first[inverse.reshape(-1)] < np.arange(len(pairs))
    return found


class TextSums:
    """What is kept of a row: nats per block of `block` targets that count, then nats per bucket of positions, then
    those of them whose target repeats a bigram of its row, and how many these are."""

    def __init__(self, windows: Windows, block: int) -> None:
        self._windows, self._block = windows, block

    def reduce(self, index: int, nats: np.ndarray, best: np.ndarray) -> Values:
        """[blocks, then three times buckets] of a row; as `hope.evaluate.rows.score_rows` wants it."""
        row, buckets = self._windows[index], bucket_of(self._windows.positions(index))
        again = repeats(row.ids)[row.first :]
        blocks = np.add.reduceat(nats, np.arange(0, len(nats), self._block))
        sums = [np.bincount(buckets, weights=of) for of in (nats, nats * again, again.astype(np.float64))]
        return [*blocks.tolist(), *np.concatenate(sums).tolist()]

    def result(self, values: Mapping[int, Values], text_bytes: int | None, words: int | None) -> dict[str, Any]:
        """Measures of these rows; `text_bytes` and `words` are theirs, None if unknown."""
        nats: list[float] = []
        tokens: list[int] = []
        sums, counts = np.zeros((3, 64)), np.zeros(64, np.int64)
        repeated: list[tuple[float, int]] = []
        new: list[tuple[float, int]] = []
        for index, kept in sorted(values.items()):
            count = self._windows.counted(index)
            blocks = -(-count // self._block)
            nats += kept[:blocks]
            tokens += [min(self._block, count - begin) for begin in range(0, count, self._block)]
            own = np.reshape(kept[blocks:], (3, -1))
            sums[:, : own.shape[1]] += own
            repeated.append((float(own[1].sum()), round(own[2].sum())))
            new.append((math.fsum(kept[:blocks]) - repeated[-1][0], count - repeated[-1][1]))
            counts += np.bincount(bucket_of(self._windows.positions(index)), minlength=64)
        per_token = ratio(nats, tokens)
        total, scored = math.fsum(nats), sum(tokens)
        found: dict[str, Any] = {"tokens": scored, "bytes": text_bytes, "words": words, "nats": total}
        found["nats_per_token"] = per_token.json()
        found["perplexity"] = per_token.exp().json()
        if text_bytes:
            found["bits_per_byte"] = per_token.times(scored / (text_bytes * math.log(2))).json()
            found["bytes_per_token"] = text_bytes / scored
        if words:
            found["perplexity_per_word"] = per_token.times(scored / words).exp().json()
        found["repeated_bigrams"] = sum(count for _, count in repeated)
        for name, rows in (("nats_per_repeated_bigram", repeated), ("nats_per_new_bigram", new)):
            if sum(count for _, count in rows):
                found[name] = ratio([of for of, _ in rows], [count for _, count in rows]).json()
        found["by_position"] = [
            {"from": 2**k - 1, "to": 2 ** (k + 1) - 2, "tokens": int(n), "nats_per_token": sums[0, k] / int(n),
             "repeated": {"tokens": round(sums[2, k]),
                          "nats_per_token": sums[1, k] / sums[2, k] if sums[2, k] else None}}
            for k, n in enumerate(counts)
            if n
        ]  # fmt: skip
        return found
