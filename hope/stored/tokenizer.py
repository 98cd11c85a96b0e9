"""The tokenizer that belongs to the data of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hope.nesting import json_of

TOKENIZER, HF_TOKENIZER = "tokenizer.model", "tokenizer.json"
"""Names of a sentencepiece model, and of a tokenizer of Hugging Face."""


class Recorded(NamedTuple):
    """What a token set says of its tokenizer: hex sha256, where it was, and the token that ends a document."""

    prefix: Path
    sha256: str
    path: str
    eos_id: int | None


def find_tokenizer(data: Mapping[str, Any]) -> Path | None:
    """The model that the data of this section was made with; None if it is not here.

    It is looked for beside the data, one folder up, and where the token set says that it was. Its hash must be the one
    that the token set records.
    """
    for known in recorded_tokenizers(data):
        near = [folder / name for folder in (known.prefix.parent, known.prefix.parent.parent) for name in _NAMES]
        for path in (*near, Path(known.path or TOKENIZER)):
            if path.is_file() and sha256_of(path) == known.sha256:
                return path
    return None


def name_in_exports(path: Path) -> str:
    """What a tokenizer's file is called in exported weights: by its kind, whatever it is called here."""
    with open(path, "rb") as file:
        return HF_TOKENIZER if file.read(64).lstrip()[:1] == b"{" else TOKENIZER


def sha256_of(path: Path) -> str:
    """Hex digest of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recorded_tokenizers(data: Mapping[str, Any]) -> Iterator[Recorded]:
    """Of every token set of this section that says it."""
    for prefix in _prefixes(data):
        try:
            known = json_of(Path(f"{prefix}.manifest.json").read_text(encoding="utf-8"))
            yield Recorded(prefix, str(known["sha256_tokenizer"]), str(known.get("tokenizer", "")), known.get("eos_id"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue


_NAMES = (TOKENIZER, HF_TOKENIZER)


def _prefixes(data: Mapping[str, Any]) -> Iterator[Path]:
    for source in (data, *(data.get("sources") or ())):
        if source.get("train"):
            yield Path(source["train"])
