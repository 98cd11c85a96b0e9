"""From nothing to token files: corpus, tokenizer, training and held-out sets; finished stages are kept."""

from collections.abc import Callable
from pathlib import Path

from data_prep.corpora.corpus import FILES, finished_corpus, quickstart_documents, write_corpus
from data_prep.errors import DataError
from data_prep.files import sha256_file, write_json
from data_prep.jsonl import read_texts
from data_prep.manifest import TokenSetManifest, is_verified, load_manifest
from data_prep.tokenizing.tokenize import tokenize
from data_prep.tokenizing.tokenizer import Tokenizer, train_tokenizer
from hope.nesting import json_of

Report = Callable[[str], None]


def quickstart(out: str | Path, vocab_size: int = 8192, report: Report = print) -> None:
    """Make OUT/train and OUT/heldout (token sets), OUT/tokenizer.model and the text they come from.

    A stage whose outputs are complete and made from the present inputs is skipped, so that a second
    call changes no file.

    Raises:
        DataError: the corpus is too small for the vocabulary, or a file cannot be read.
    """
    out = Path(out)
    make_corpus(out, report)
    tokenizer = make_tokenizer(out / "train.jsonl", out / "tokenizer.model", vocab_size, report)
    for name in ("train", "heldout"):
        make_token_set(out / f"{name}.jsonl", tokenizer, out / name, report)


def make_corpus(out: Path, report: Report = print) -> None:
    """Write the quick-start corpus unless it is there."""
    manifest, kept = finished_corpus(out), " (kept)"
    if manifest is None:
        manifest, kept = write_corpus(out, quickstart_documents()), ""
    files = manifest["files"]
    counts = (f"{name} {files[name]['documents']} documents, {_mb(files[name]['bytes'])}" for name in FILES)
    report(f"corpus     {'; '.join(counts)} (Python {manifest['python']}, {manifest['licence']}){kept}")


def make_tokenizer(text: Path, model: Path, vocab_size: int, report: Report = print) -> Tokenizer:
    """Train MODEL on TEXT unless MODEL.json says that exactly this was done."""
    recipe = {"source_sha256": sha256_file(text), "vocab_size": vocab_size}
    record = model.with_suffix(".json")
    try:
        done = json_of(record.read_bytes())
        if done == {**recipe, "sha256": sha256_file(model)}:
            report(f"tokenizer  {model}: {vocab_size} pieces (kept)")
            return Tokenizer.load(model)
    except (OSError, ValueError):
        pass
    tokenizer = train_tokenizer(read_texts(text), vocab_size, model)
    write_json(record, {**recipe, "sha256": tokenizer.sha256})
    report(f"tokenizer  {model}: {vocab_size} pieces")
    return tokenizer


def make_token_set(text: Path, tokenizer: Tokenizer, prefix: Path, report: Report = print) -> TokenSetManifest:
    """Tokenize TEXT into PREFIX.bin/.idx unless that is done and its bytes are intact."""
    if not text.is_file():
        raise DataError(f"{text}: no such file")
    kept = is_verified(prefix, sha256_file(text), tokenizer.sha256)
    manifest = load_manifest(prefix) if kept else tokenize(text, tokenizer, prefix)
    report(
        f"tokens     {prefix}: {manifest.documents} documents, {manifest.tokens} tokens,"
        f" {_mb(manifest.text_bytes)} of text, {manifest.bytes_per_token:.2f} bytes/token"
        f"{' (kept)' if kept else ''}"
    )
    return manifest


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
