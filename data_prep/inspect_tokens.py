"""Show tokens as text: one document, or a window as training sees it, with document ends and state resets."""

import itertools
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.indexed import memmap_tokens
from data_prep.manifest import open_checked
from data_prep.tokenizer import Tokenizer


def checked_tokenizer(prefix: str | Path, model: str) -> Tokenizer:
    """The tokenizer that the set was made with: `model`, or tokenizer.model beside the set or one folder up.

    Raises:
        DataError: it is another one, or none is found.
    """
    _, manifest = open_checked(prefix)
    folder = Path(prefix).parent
    candidates = [Path(model)] if model else [folder / "tokenizer.model", folder.parent / "tokenizer.model"]
    path = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
    tokenizer = Tokenizer.load(path)
    if tokenizer.sha256 != manifest.sha256_tokenizer:
        raise DataError(
            f"{path}: sha256 {tokenizer.sha256[:12]}, but {prefix} was made with {manifest.sha256_tokenizer[:12]};"
            " give that model with --tokenizer"
        )
    return tokenizer


def show_document(prefix: str | Path, number: int, tokenizer: Tokenizer) -> str:
    """Document `number` (from 0): where it lies, and its text."""
    header, _ = open_checked(prefix)
    if not 0 <= number < header.documents:
        raise DataError(f"{prefix}: document {number} is outside the set; 0 to {header.documents - 1} works")
    lengths = header.document_lengths.astype(np.int64)
    start = int(lengths[:number].sum())
    ids = memmap_tokens(prefix, header)[start : start + int(lengths[number])].tolist()
    place = f"tokens {start}..{start + len(ids) - 1}, byte offset {start * header.dtype.itemsize} of .bin"
    return f"document {number} of {header.documents}: {len(ids)} tokens ({place})\n{_text(ids, tokenizer)}"


def show_window(prefix: str | Path, number: int, seq_len: int, documents: str, tokenizer: Tokenizer) -> str:
    """Window `number` in file order: tokens number * seq_len and the seq_len following ones."""
    header, _ = open_checked(prefix)
    count = (header.tokens - 1) // seq_len if seq_len > 0 else 0
    if not 0 <= number < count:
        raise DataError(
            f"{prefix}: window {number} of {seq_len} + 1 tokens is outside the set of {header.tokens} tokens;"
            f" windows 0 to {count - 1} work" + ("" if count else ", none with this length")
        )
    start = number * seq_len
    ids = memmap_tokens(prefix, header)[start : start + seq_len + 1].astype(np.int64)
    ends = np.cumsum(header.document_lengths.astype(np.int64))
    first = int(np.searchsorted(ends, start, side="right"))
    title = f"window {number} of {count}: tokens {start}..{start + seq_len} of {prefix}, from document {first}"
    return f"{title}\n{show_ids(ids, documents, tokenizer)}"


def show_ids(ids: np.ndarray, documents: str, tokenizer: Tokenizer) -> str:
    """A window int64 [T + 1] in pieces that end with a document.

    The state (memories, convolutions, attention) starts anew at an input that is the window's first token or,
    with documents = "reset", follows an EOS: those places say RESET. The last token is a target only.
    """
    ends = np.flatnonzero(ids == tokenizer.eos_id) + 1
    edges = sorted({0, len(ids), *ends.tolist()})
    lines = []
    for start, stop in itertools.pairwise(edges):
        if start == len(ids) - 1:
            state = "target only"
        elif start == 0:
            state = "RESET (window starts)"
        else:
            state = "RESET (document starts)" if documents == "reset" else "state carried over a document's end"
        lines.append(f"--- {start}..{stop - 1}  {state}")
        lines.append(_text(ids[start:stop].tolist(), tokenizer))
    return "\n".join(lines)


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    end = " <EOS>" if ids and ids[-1] == tokenizer.eos_id else ""
    return tokenizer.decode(ids) + end
