"""The tokenizer that belongs to the data of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TOKENIZER = "tokenizer.model"


def find_tokenizer(data: Mapping[str, Any]) -> Path | None:
    """The model that the data of this section was made with; None if it is not here.

    It is looked for beside the data, one folder up, and where the token set says that it was. Its hash must be the one
    that the token set records.
    """
    for prefix, wanted, said in _recorded(data):
        for path in (prefix.parent / TOKENIZER, prefix.parent.parent / TOKENIZER, Path(said or TOKENIZER)):
            if path.is_file() and sha256_of(path) == wanted:
                return path
    return None


def tokenizer_hash(data: Mapping[str, Any]) -> str | None:
    """Hex sha256 of the tokenizer that the data of this section was made with; None if no token set says it."""
    return next((wanted for _, wanted, _ in _recorded(data)), None)


def sha256_of(path: Path) -> str:
    """Hex digest of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _recorded(data: Mapping[str, Any]) -> Iterator[tuple[Path, str, str]]:
    """(prefix, sha256 of the tokenizer, where it was) of every token set that says it."""
    for prefix in _prefixes(data):
        try:
            known = json.loads(Path(f"{prefix}.manifest.json").read_text(encoding="utf-8"))
            yield prefix, str(known["sha256_tokenizer"]), str(known.get("tokenizer", ""))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue


def _prefixes(data: Mapping[str, Any]) -> Iterator[Path]:
    for source in (data, *(data.get("sources") or ())):
        if source.get("train"):
            yield Path(source["train"])
