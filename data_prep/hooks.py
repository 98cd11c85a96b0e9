"""User functions on documents, and the hashes by which repeated documents are found.

A hook is `module:function` with `function(doc: dict) -> dict | None`: it gets the parsed line (or row, or
{"text": ...}), may change it, and returns None to leave it out. It must be a function of the document alone:
documents reach it in several processes. What must be compared over the whole input goes through `dedup_keys`:
a string, or a list of strings, that a hook puts into the document. Of documents that share a key, only the
first in input order is kept, whatever the number of workers.
"""

import hashlib
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

from data_prep.errors import DataError

Hook = Callable[[dict], dict | None]
KEYS_FIELD = "dedup_keys"
DIGEST_BYTES = 16
SHINGLE_WORDS = 5
BANDS, ROWS = 8, 4
_MASK = (1 << 64) - 1


def load_hook(spec: str) -> Hook | None:
    """The function that `module:function` names; None for an empty name.

    Raises:
        DataError: the name has another form, or the module or function cannot be had.
    """
    if not spec:
        return None
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise DataError(f"--hook {spec}: need module:function, for example data_prep.hooks:exact")
    try:
        function: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise DataError(f"--hook {spec}: {error}; the module must be importable from this folder") from None
    if not callable(function):
        raise DataError(f"--hook {spec}: {type(function).__name__} is not a function")
    return function


def hook_identity(spec: str) -> str:
    """Name and source digest: parts made with another version of the hook's module are not taken up again."""
    function = load_hook(spec)
    if function is None:
        return ""
    try:
        source = inspect.getsource(inspect.getmodule(function) or function)
    except (OSError, TypeError):
        source = ""
    return f"{spec} {hashlib.sha256(source.encode()).hexdigest()}"


def digest(text: str) -> bytes:
    """Key of a document (or of what stands for it), DIGEST_BYTES long."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=DIGEST_BYTES).digest()


def keys_of(document: dict, text: str, *, exact: bool) -> list[bytes]:
    """The keys that no later document may share: those of the hook and, if `exact`, one of the whole text.

    Raises:
        ValueError: a hook's `dedup_keys` is neither a string nor a list of strings.
    """
    given = document.get(KEYS_FIELD, [])
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(key, str) for key in given):
        raise ValueError(f"{KEYS_FIELD} must be a string or a list of strings")
    return ([digest(text)] if exact else []) + [digest(f"{KEYS_FIELD} {key}") for key in given]


def near(doc: dict) -> dict:
    """Hook: near duplicates of an earlier document are left out (MinHash with banding, Broder 1997).

    Documents whose sets of 5-word shingles have Jaccard similarity s share a key with probability
    1 - (1 - s^4)^8: 0.99 at s = 0.8, 0.41 at 0.5, 0.01 at 0.2.
    """
    text = doc.get("text")
    if not isinstance(text, str):
        return doc
    words = re.findall(r"\w+", text.lower())
    last = max(len(words) - SHINGLE_WORDS, 0) + 1
    shingles = {" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last)}
    hashes = [int.from_bytes(digest(shingle)[:8], "little") for shingle in shingles]
    smallest = [min((value * a + b & _MASK) >> 11 for value in hashes) for a, b in _multipliers()]
    bands = (smallest[band * ROWS : (band + 1) * ROWS] for band in range(BANDS))
    return {**doc, KEYS_FIELD: [f"{number} {band}" for number, band in enumerate(bands)]}


def _multipliers() -> list[tuple[int, int]]:
    """Fixed odd multipliers and offsets, one pair for each of the BANDS * ROWS hash functions."""
    pairs = []
    for number in range(BANDS * ROWS):
        seed = digest(f"minhash {number}")
        pairs.append((int.from_bytes(seed[:8], "little") | 1, int.from_bytes(seed[8:], "little")))
    return pairs
