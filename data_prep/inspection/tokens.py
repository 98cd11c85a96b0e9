"""Show tokens as text: one document, or a window as training sees it, with document ends and state resets."""

import itertools
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.tokenizing.tokenizer import Tokenizer
from data_prep.training.index_rows import PAD, StreamWindows
from data_prep.training.index_store import TokenStore, open_store


def checked_tokenizer(store: TokenStore, model: str) -> Tokenizer:
    """The tokenizer that the set was made with: `model`, or the one that its manifest names, or one near the set.

    Near the set is tokenizer.model, or tokenizer.json, beside it or one folder up.

    Raises:
        DataError: it is another one, or none is found.
    """
    if model:
        return _same(store, Tokenizer.load(model))
    folder = Path(store.name).parent
    recorded = [Path(store.tokenizer_path)] if store.tokenizer_path else []
    near = [place / name for place in (folder, folder.parent) for name in ("tokenizer.model", "tokenizer.json")]
    candidates = [*recorded, *near]
    found = [Tokenizer.load(path) for path in dict.fromkeys(candidates) if path.is_file()]
    same = next((tokenizer for tokenizer in found if tokenizer.sha256 == store.tokenizer), None)
    if same or found:
        return same or _same(store, found[0])
    made_with = f", sha256 {store.tokenizer[:12]}" if store.tokenizer else ""
    raise DataError(
        f"{store.name}: its tokenizer{made_with} is not there ({', '.join(map(str, candidates))});"
        " --tokenizer FILE names it"
    )


def _same(store: TokenStore, tokenizer: Tokenizer) -> Tokenizer:
    if store.tokenizer and tokenizer.sha256 != store.tokenizer:
        raise DataError(
            f"{tokenizer.path}: sha256 {tokenizer.sha256[:12]}, but {store.name} was made with"
            f" {store.tokenizer_path or 'a model of sha256'} {store.tokenizer[:12]};"
            " give that model with --tokenizer FILE"
        )
    return tokenizer


def show_document(prefix: str, number: int, model: str = "") -> str:
    """Document `number` (from 0): its place in the stream, and its text. Raises DataError, see `open_store`."""
    store = open_store(prefix)
    tokenizer = checked_tokenizer(store, model)
    bounds = store.bounds()
    count = len(bounds) - 1
    if not 0 <= number < count:
        raise DataError(f"{prefix}: document {number} is outside the set; 0 to {count - 1} works")
    start, stop = int(bounds[number]), int(bounds[number + 1])
    title = f"document {number} of {count}: {stop - start} tokens ({start}..{stop - 1} of {prefix})"
    return f"{title}\n{_text(store.read(start, stop), tokenizer)}"


def show_window(prefix: str, number: int, seq_len: int, documents: str, model: str = "") -> str:
    """Window `number` in file order: tokens number * seq_len and the seq_len following ones."""
    store = open_store(prefix)
    tokenizer = checked_tokenizer(store, model)
    if seq_len < 1:
        raise DataError(f"inspect: --seq-len {seq_len}; 1 or more works")
    windows = StreamWindows(store, seq_len)
    if not 0 <= number < len(windows):
        raise DataError(
            f"{prefix}: window {number} of {seq_len} + 1 tokens is outside the set of {store.tokens} tokens;"
            f" windows 0 to {len(windows) - 1} work" + ("" if len(windows) else ", none with this length")
        )
    start = number * seq_len
    first = int(np.searchsorted(store.bounds(), start, side="right")) - 1
    title = f"window {number} of {len(windows)}: tokens {start}..{start + seq_len} of {prefix}, from document {first}"
    return f"{title}\n{show_ids(windows.window(number), documents, tokenizer)}"


def show_ids(ids: np.ndarray, documents: str, tokenizer: Tokenizer) -> str:
    """A window int64 [T + 1] in pieces that end with a document; PAD at its end is left out.

    The state (memories, convolutions, attention) starts anew at an input that is the window's first token or,
    with documents = "reset", follows an EOS: those places say RESET. The last token is a target only.
    """
    ids = ids[ids != PAD]
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
        lines.append(_text(ids[start:stop], tokenizer))
    return "\n".join(lines)


def _text(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    end = " <EOS>" if len(ids) and ids[-1] == tokenizer.eos_id else ""
    return tokenizer.decode(ids.tolist()) + end
