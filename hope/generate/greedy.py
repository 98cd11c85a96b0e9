"""The most probable continuation of a text, for whoever asks one question after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hope.generate.loop import Forward, Sequences, write
from hope.generate.sampling import Sampling
from hope.generate.text import Decode, Stream, Writer


def greedy(
    forward: Forward,
    encode: Callable[[str], list[int]],
    decode: Decode,
    eos_id: int,
    *,
    vocabulary: int,
    device: torch.device,
) -> Callable[[str, Sequence[str], int], str]:
    """A function (prompt, stop strings, tokens at most) -> the text that follows, up to the first stop string or the
    end of the document. An empty prompt is the beginning of a document.

    Args:
        vocabulary: ids below this may be chosen.
    """

    def continued(prompt: str, stops: Sequence[str], tokens: int) -> str:
        ids = encode(prompt) or [eos_id]
        writer = Writer(Stream(decode, ids), stops, frozenset([eos_id]))
        sequences = Sequences(forward, [ids], Sampling(temperature=0), device, vocabulary=vocabulary)
        parts: list[str] = []
        write(sequences, [writer], tokens, len(ids), lambda row, text: parts.append(text))
        return "".join([*parts, writer.finish()])

    return continued
