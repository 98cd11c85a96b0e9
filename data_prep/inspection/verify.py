"""Read every byte of a token set again: digests, document ends, ids, counts; and manifests for foreign sets."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.files import sha256_file
from data_prep.indexed import Header, check_bin, memmap_tokens, read_header
from data_prep.inspection.text_bytes import count_text_bytes
from data_prep.manifest import TokenSetManifest, length_histogram, open_checked
from data_prep.tokenizing.tokenizer import Tokenizer

_CHUNK_TOKENS = 1 << 22


def problems(prefix: str | Path, tokenizer: str = "", *, sources: bool = False) -> Iterator[str]:
    """Everything that is wrong with a token set, one message each, with file, numbers and offsets.

    Args:
        tokenizer: also compare with this model file.
        sources: also compare the digests of the input files, where the manifest names them.
    """
    try:
        header, manifest = open_checked(prefix)
    except DataError as error:
        yield str(error)
        return
    for suffix, expected in (("bin", manifest.sha256_bin), ("idx", manifest.sha256_idx)):
        actual = sha256_file(f"{prefix}.{suffix}")
        if actual != expected:
            yield f"{prefix}.{suffix}: sha256 {actual}, the manifest says {expected}; copy or tokenize it again"
    yield from _token_problems(prefix, header, manifest)
    if manifest.length_histogram and manifest.length_histogram != length_histogram(header.document_lengths):
        yield f"{prefix}.manifest.json: length_histogram is not that of {prefix}.idx; tokenize again"
    if tokenizer:
        digest = Tokenizer.load(tokenizer).sha256
        if digest != manifest.sha256_tokenizer:
            yield f"{tokenizer}: sha256 {digest}, {prefix} was made with {manifest.sha256_tokenizer}"
    if sources:
        yield from _source_problems(manifest)


def _token_problems(prefix: str | Path, header: Header, manifest: TokenSetManifest) -> Iterator[str]:
    tokens = memmap_tokens(prefix, header)
    size, ends = header.dtype.itemsize, 0
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = tokens[start : start + _CHUNK_TOKENS]
        wrong = np.flatnonzero((chunk < 0) | (chunk >= manifest.vocab_size))
        if len(wrong):
            first = start + int(wrong[0])
            yield (
                f"{prefix}.bin: byte offset {first * size}: token {int(tokens[first])} is not in the vocabulary"
                f" 0..{manifest.vocab_size - 1}"
            )
            return
        ends += int(np.count_nonzero(chunk == manifest.eos_id))
    lengths = header.document_lengths.astype(np.int64)
    last = np.cumsum(lengths)[lengths > 0] - 1
    open_ends = np.flatnonzero(tokens[last] != manifest.eos_id)
    if len(open_ends):
        first = int(open_ends[0])
        yield (
            f"{prefix}.bin: {len(open_ends)} documents do not end in EOS {manifest.eos_id}, first at byte offset"
            f" {int(last[first]) * size}"
        )
    inside = ends - (len(last) - len(open_ends))
    if inside:
        yield f"{prefix}.bin: {inside} EOS tokens {manifest.eos_id} stand inside documents"


def _source_problems(manifest: TokenSetManifest) -> Iterator[str]:
    for source in manifest.sources:
        path = Path(source["name"])
        if not path.is_file():
            yield f"{path}: no such file; it is an input of this set"
        elif (digest := sha256_file(path)) != source["sha256"]:
            yield f"{path}: sha256 {digest}, the set was made from {source['sha256']}"


def adopt(prefix: str | Path, tokenizer: Tokenizer, licence: str = "") -> TokenSetManifest:
    """Write a manifest for .bin/.idx that another tool made; text bytes are counted by decoding.

    Raises:
        DataError: unreadable files, token ids outside the vocabulary, documents that do not end in EOS.
    """
    header = read_header(prefix)
    check_bin(prefix, header)
    if not header.tokens:
        raise DataError(f"{prefix}.idx: no tokens; need at least one")
    manifest = TokenSetManifest(
        documents=header.documents,
        tokens=header.tokens,
        text_bytes=0,
        bytes_per_token=0.0,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        sha256_bin=sha256_file(f"{prefix}.bin"),
        sha256_idx=sha256_file(f"{prefix}.idx"),
        sha256_tokenizer=tokenizer.sha256,
        sha256_source=hashlib.sha256(b"").hexdigest(),
        licence=licence,
        length_histogram=length_histogram(header.document_lengths),
        tokenizer=tokenizer.path,
    )
    if found := list(_token_problems(prefix, header, manifest)):
        raise DataError("; ".join(found) + "; tokenize it again with --append-eod and this tokenizer")
    text_bytes = count_text_bytes(memmap_tokens(prefix, header), header.document_lengths, tokenizer)
    fields = {**vars(manifest), "text_bytes": text_bytes, "bytes_per_token": round(text_bytes / header.tokens, 4)}
    manifest = TokenSetManifest(**fields)
    manifest.save(prefix)
    return manifest
