"""PREFIX.manifest.json: what a pair of token files was made from, and the checks made before reading it."""

import dataclasses
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import DataError
from data_prep.files import sha256_file, write_json
from data_prep.indexed import Header, check_bin, read_header
from data_prep.paths import naming
from hope.nesting import json_of

FORMAT = 3
READABLE = (1, 2, 3)  # format 1 had the fields up to `format`, format 2 those up to `recipe`


@dataclass(frozen=True)
class TokenSetManifest:
    """Facts about PREFIX.bin/.idx. Digests are hex sha256; `text_bytes` is UTF-8, without EOS tokens.

    Attributes:
        sha256_source: of the one source file; of several, of their digests in order.
        licence: of the text, as its corpus says; empty if it says nothing.
        sources: one {"name", "bytes", "sha256", "licence"} per input file, in order.
        bad: records that were not as they should be, by kind (`data_prep.tokenizing.records.BAD_KINDS`).
        dropped: good documents left out: {"hook": n, "repeated": n}.
        length_histogram: {"2^k": documents with 2^k <= tokens < 2^(k+1)}, EOS counted; "0" for empty ones.
        recipe: digest of the settings, tokenizer and sources that the set was made with.
        tokenizer: path of the model, as it was given; empty if unknown.
    """

    documents: int
    tokens: int
    text_bytes: int
    bytes_per_token: float
    vocab_size: int
    eos_id: int
    sha256_bin: str
    sha256_idx: str
    sha256_tokenizer: str
    sha256_source: str
    format: int = FORMAT
    licence: str = ""
    sources: list[dict[str, Any]] = field(default_factory=list)
    bad: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    length_histogram: dict[str, int] = field(default_factory=dict)
    recipe: str = ""
    tokenizer: str = ""

    @property
    def fingerprint(self) -> str:
        """Identity of the token data (64 hex digits): names index caches, and belongs in checkpoints."""
        return hashlib.sha256(f"{self.sha256_bin}{self.sha256_idx}".encode()).hexdigest()

    def save(self, prefix: str | Path) -> None:
        """Write PREFIX.manifest.json; do this last, since a set without manifest counts as unfinished."""
        write_json(manifest_path(prefix), dataclasses.asdict(self))


def manifest_path(prefix: str | Path) -> str:
    """Path of the manifest of a prefix."""
    return f"{prefix}.manifest.json"


def load_manifest(prefix: str | Path) -> TokenSetManifest:
    """Read PREFIX.manifest.json; raises DataError if it is missing, broken, or of another format."""
    path = manifest_path(prefix)
    try:
        with naming(path, "no such file; tokenize again to make it"), open(path, "rb") as stream:
            fields = json_of(stream.read())
        if fields.get("format") not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise DataError(f"{path}: format {fields.get('format')}, this version reads formats {known}")
        return TokenSetManifest(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a manifest ({error}); tokenize again to make it") from None


def length_histogram(lengths: np.ndarray) -> dict[str, int]:
    """Documents per power of two of their length in tokens: {"0": n, "2^0": n, ...}, empty classes left out."""
    # frexp gives the exponent exactly; log2 in floating point would put 2^29 - 1 beside 2^29
    exponents = np.frexp(np.asarray(lengths, dtype=np.float64))[1]
    counts = np.bincount(exponents, minlength=1)
    return {"0" if k == 0 else f"2^{k - 1}": int(count) for k, count in enumerate(counts) if count}


def open_checked(prefix: str | Path) -> tuple[Header, TokenSetManifest]:
    """Header and manifest of a prefix after the cheap checks (sizes and counts, not digests).

    Raises:
        DataError: a file is missing or truncated, the set is empty, or manifest and index disagree.
    """
    header = read_header(prefix)
    check_bin(prefix, header)
    manifest = load_manifest(prefix)
    if header.documents == 0 or header.tokens == 0:
        # megatron-core's epoch count never ends on a set without tokens
        raise DataError(f"{prefix}.idx: {header.documents} documents, {header.tokens} tokens; need at least one each")
    if (header.documents, header.tokens) != (manifest.documents, manifest.tokens):
        raise DataError(
            f"{manifest_path(prefix)} speaks of {manifest.documents} documents and {manifest.tokens} tokens,"
            f" {prefix}.idx of {header.documents} and {header.tokens}; tokenize again"
        )
    return header, manifest


def is_verified(prefix: str | Path, sha256_source: str, sha256_tokenizer: str) -> bool:
    """True if the set was made from exactly this text and tokenizer and all its bytes are intact."""
    try:
        _, manifest = open_checked(prefix)
    except DataError:
        return False
    return (
        (manifest.sha256_source, manifest.sha256_tokenizer) == (sha256_source, sha256_tokenizer)
        and manifest.sha256_bin == sha256_file(f"{prefix}.bin")
        and manifest.sha256_idx == sha256_file(f"{prefix}.idx")
    )


def remove_manifest(prefix: str | Path) -> None:
    """Mark a set as unfinished before its files are replaced."""
    path = manifest_path(prefix)
    if os.path.exists(path):
        os.unlink(path)
