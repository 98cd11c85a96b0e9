"""JSON lines of text to PREFIX.bin, PREFIX.idx and PREFIX.manifest.json."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from data_prep.errors import DataError
from data_prep.files import sha256_file
from data_prep.indexed import IndexedWriter
from data_prep.jsonl import read_texts
from data_prep.manifest import Manifest, remove_manifest
from data_prep.tokenizer import Tokenizer, available_threads, replace_lone_surrogates

BATCH_CHARACTERS = 1 << 20


def tokenize(source: str | Path, tokenizer: Tokenizer, prefix: str | Path, text_key: str = "text") -> Manifest:
    """Encode every line of `source`, with EOS after each document, and write the token set.

    The manifest goes last and the old one is removed first, so an interrupted run leaves a set that
    readers refuse, never one that mixes old and new files.

    Raises:
        DataError: a bad line (with file, line number and byte offset), or no document at all.
    """
    text_bytes = 0
    threads = available_threads()
    with IndexedWriter(prefix, tokenizer.vocab_size) as writer:
        for batch in _batches(read_texts(source, text_key)):
            text_bytes += sum(len(replace_lone_surrogates(text).encode()) for text in batch)
            for ids in tokenizer.encode_batch(batch, num_threads=threads):
                writer.add_document([*ids, tokenizer.eos_id])
        if not writer.lengths:
            raise DataError(f"{source}: no documents; give at least one line with a text")
        remove_manifest(prefix)
    tokens = sum(writer.lengths)
    manifest = Manifest(
        documents=len(writer.lengths),
        tokens=tokens,
        text_bytes=text_bytes,
        bytes_per_token=round(text_bytes / tokens, 4),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        sha256_bin=writer.sha256_bin,
        sha256_idx=writer.sha256_idx,
        sha256_tokenizer=tokenizer.sha256,
        sha256_source=sha256_file(source),
    )
    manifest.save(prefix)
    return manifest


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
