"""English prose that every machine has: the docstrings and comments of the running Python's own library.

One document per module (docstrings and comment blocks in source order) and one per topic of
`pydoc_data.topics`. Licence PSF-2.0. No network; deterministic for one Python installation.
"""

import ast
import hashlib
import inspect
import json
import os
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import DataError
from data_prep.files import atomic_write, make_folder, sha256_file, write_json
from data_prep.tokenizing.tokenizer import replace_lone_surrogates
from hope.nesting import json_of

MIN_CHARACTERS = 200
MIN_COMMENT_LINES = 3
HELDOUT_SHARE = 0.03
FILES = ("train.jsonl", "heldout.jsonl")
LICENCE = "PSF-2.0"
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Document:
    """One text with a stable identity; the identity decides whether it is held out."""

    id: str
    source: str
    text: str


def stdlib_documents(root: str | Path | None = None) -> Iterator[Document]:
    """One document per module below `root` (default: the running Python's library), sorted by path.

    A block of text seen in an earlier module (licence headers, copied docstrings) is left out: it would
    otherwise stand in the training and in the held-out text. Modules that do not parse are passed over.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in _python_files(root):
        blocks = [block for block in _prose_blocks(path) if block not in seen]
        seen.update(blocks)
        text = "\n\n".join(blocks)
        if len(text) >= MIN_CHARACTERS:
            yield Document(f"stdlib/{path.relative_to(root).as_posix()}", "stdlib", text)


def topic_documents() -> Iterator[Document]:
    """The language reference's chapters as `help()` shows them, sorted by name."""
    from pydoc_data.topics import topics  # 0.76 MB that only this corpus needs

    for name, text in sorted(topics.items()):
        text = text.strip("\n")
        if len(text) >= MIN_CHARACTERS:
            yield Document(f"topics/{name}", "topics", text)


def _python_files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _prose_blocks(path: Path) -> list[str]:
    """Docstrings and comment blocks of a module in source order; nothing if it does not parse."""
    try:
        with tokenize.open(path) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the library's own test data
            source = stream.read()
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, OSError):
        return []
    strings: set[int] = set()  # lines inside multi-line strings: a '#' there is no comment
    blocks: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, _DOCUMENTED) and (doc := ast.get_docstring(node)):
            blocks.append((node.body[0].lineno, doc))
    blocks += _comment_blocks(source.split("\n"), strings)
    cleaned = (replace_lone_surrogates(text).strip() for _, text in sorted(blocks))
    return [text for text in cleaned if text]


def _comment_blocks(lines: list[str], strings: set[int]) -> Iterator[tuple[int, str]]:
    """(line number, text) of every run of at least MIN_COMMENT_LINES comment lines that reads as prose."""
    run: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        stripped = line.strip()
        if stripped.startswith("#") and number not in strings:
            run.append(stripped.lstrip("#"))
            continue
        if len(run) >= MIN_COMMENT_LINES:
            text = inspect.cleandoc("\n" + "\n".join(run))
            if _is_prose(text):
                yield number - len(run), text
        run = []


def _is_prose(text: str) -> bool:
    """True unless under 0.8 of the block is letters and spaces, as in tables, rulers and old code."""
    return sum(character.isalpha() or character.isspace() for character in text) >= 0.8 * max(len(text), 1)


def deduplicate(documents: Iterable[Document]) -> Iterator[Document]:
    """Keep the first of documents with the same text. Do this before splitting, else held-out text leaks."""
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield document


def _identity(document: Document) -> str:
    return document.id


def split(
    documents: list[Document], share: float = HELDOUT_SHARE, key: Callable[[Document], str] = _identity
) -> tuple[list[Document], list[Document]]:
    """(train, heldout) by hash of `key` (the document id), so that new documents never move old ones.

    Held-out documents stand in hash order: the first windows of the set then mix the sources. At least
    one document is held out.

    Raises:
        DataError: fewer than two documents.
    """
    if len(documents) < 2:
        raise DataError(f"{len(documents)} documents cannot be split in training and held-out text; need at least 2")
    ranked = sorted(documents, key=lambda document: _hash_fraction(key(document)))
    count = sum(_hash_fraction(key(document)) < share for document in ranked)
    heldout = ranked[: min(max(count, 1), len(ranked) - 1)]
    held_ids = {document.id for document in heldout}
    return [document for document in documents if document.id not in held_ids], heldout


def _hash_fraction(identity: str) -> float:
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") / 2**64


def write_corpus(out: str | Path, documents: Iterable[Document], licence: str = LICENCE) -> dict:
    """Deduplicate, split and write train.jsonl, heldout.jsonl and manifest.json; returns the manifest."""
    out = Path(out)
    make_folder(out)
    (out / "manifest.json").unlink(missing_ok=True)
    manifest: dict = {"python": platform.python_version(), "licence": licence, "files": {}}
    for name, part in zip(FILES, split(list(deduplicate(documents))), strict=True):
        manifest["files"][name] = write_documents(out / name, part)
    write_json(out / "manifest.json", manifest)
    return manifest


def write_documents(path: Path, documents: list[Document]) -> dict:
    """Write JSON lines; returns {"documents", "bytes" (of text), "sha256" (of the file)}."""
    with atomic_write(path) as stream:
        for document in documents:
            stream.write((json.dumps(vars(document), ensure_ascii=False) + "\n").encode())
    size = sum(len(document.text.encode()) for document in documents)
    return {"documents": len(documents), "bytes": size, "sha256": sha256_file(path)}


def quickstart_documents() -> Iterator[Document]:
    """All documents of the quick-start corpus."""
    yield from stdlib_documents()
    yield from topic_documents()


def finished_corpus(out: str | Path) -> dict | None:
    """The manifest of a corpus this Python has written completely, with intact files; else None."""
    out = Path(out)
    try:
        manifest = json_of((out / "manifest.json").read_bytes())
        intact = manifest["python"] == platform.python_version() and all(
            sha256_file(out / name) == manifest["files"][name]["sha256"] for name in FILES
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if intact else None
