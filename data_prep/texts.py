"""Texts to be evaluated: files as they are, documents of JSON lines, and token sets; see `hope.evaluate.texts.Text`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.compressed import open_bytes
from data_prep.errors import DataError
from data_prep.inspection.text_bytes import count_text_bytes
from data_prep.jsonl import read_texts
from data_prep.paths import naming
from data_prep.tokenizing.tokenizer import Tokenizer, replace_lone_surrogates
from data_prep.training.index_store import MegatronStore, open_store
from hope.evaluate.errors import EvaluationError
from hope.evaluate.rows import ListedRows
from hope.evaluate.tasks import Task, read_task, rows_of
from hope.evaluate.texts import Text
from hope.stored.tokenizer import find_tokenizer

_LINES = re.compile(r"\.jsonl?(\.\w+)?$")


def tokenizer_for(path: str | Path | None, rows: int) -> Tokenizer | None:
    """The tokenizer of a model with `rows` rows of embeddings; None without a path.

    Raises:
        DataError: it cannot be read, or has more tokens than the model.
    """
    if path is None:
        return None
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > rows:
        raise DataError(
            f"{path} has {tokenizer.vocab_size} tokens, the model {rows}: it was trained with another tokenizer"
        )
    return tokenizer


@dataclass(frozen=True)
class OpenTask:
    """A task, its pairs as rows of token ids, and the end-of-document token that is in front of each."""

    task: Task
    rows: ListedRows
    eos_id: int


def open_tasks(
    files: Mapping[str, str], data: Mapping[str, Any], rows: int, window: int, limit: int
) -> dict[str, OpenTask]:
    """The tasks of a run, by name.

    Args:
        files: JSON lines, by name.
        data: the run's data section: its tokenizer is looked for beside the data.
        rows: of the model's embedding.
        window: tokens of training; contexts are cut from the left.
        limit: items of each; 0: all.

    Raises:
        DataError: a file is missing or has a bad line, or the tokenizer is not found.
    """
    if not files:
        return {}
    tokenizer = tokenizer_for(find_tokenizer(data), rows)
    if tokenizer is None:
        raise DataError(
            "train.tasks needs the tokenizer of the data, and it is not beside it; copy tokenizer.model there"
        )
    found = {}
    for name, path in files.items():
        try:
            with naming(path), open(path, "rb") as stream:
                task = read_task(stream, path, limit or None)
        except EvaluationError as error:
            raise DataError(str(error)) from None
        found[name] = OpenTask(
            task, ListedRows(rows_of(task, tokenizer.encode, tokenizer.eos_id, window)), tokenizer.eos_id
        )
    return found


def text_of_file(path: str | Path, tokenizer: Tokenizer) -> Text:
    """A UTF-8 text file as one segment, or the "text" of every line of a .jsonl file, compressed or not.

    Words are counted as in lm-evaluation-harness: `re.split` of the original text at white space.

    Raises:
        DataError: the file is missing, empty, not UTF-8, or no such JSON lines.
    """
    documents = list(read_texts(path)) if _LINES.search(str(path)) else [_whole(path)]
    documents = [replace_lone_surrogates(text) for text in documents]
    if not any(documents):
        raise DataError(f"{path}: holds no text; give a file with at least one character")
    ids = tokenizer.encode_batch(documents)
    tokens = np.fromiter(chain.from_iterable(ids), np.int64)
    bounds = np.cumsum([0, *map(len, ids)])
    whole = sum(len(text.encode()) for text in documents)
    words = sum(len(re.split(r"\s+", text)) for text in documents)
    read = lambda start, stop: tokens[start:stop]
    return Text(read, bounds, tokenizer.eos_id, _bytes_of(read, bounds, whole, tokenizer), words)


def text_of_set(prefix: str, documents: str, tokenizer: Tokenizer | None, rows: int) -> tuple[Text, str]:
    """A token set, and the fingerprint of its tokens.

    Bytes of a part of it are known if it records its tokenizer.

    Args:
        documents: as the model was trained (`data.documents`): "doc" makes every document a segment, anything else
            the whole set one.
        tokenizer: of the model, to compare and to count bytes with; None if unknown.
        rows: of the model's embedding.

    Raises:
        DataError: the set is missing, damaged, of another tokenizer, or of more tokens than the model has.
    """
    store = open_store(prefix)
    if tokenizer is not None and store.tokenizer and store.tokenizer != tokenizer.sha256:
        raise DataError(
            f"{prefix}: made with tokenizer {store.tokenizer[:12]}..., the model's is {tokenizer.sha256[:12]}...;"
            " its ids mean other texts. Tokenize the text again, or give it with --text"
        )
    if store.vocab_size > rows:
        raise DataError(f"{prefix}: its vocabulary is {store.vocab_size}, the model has {rows} rows; it was trained on"
                        " other tokens")  # fmt: skip
    known = tokenizer if store.tokenizer else None
    bounds = store.bounds() if documents == "doc" else np.array([0, store.tokens])
    whole = store.manifest.text_bytes if isinstance(store, MegatronStore) else None
    return Text(store.read, bounds, store.eos_id, _bytes_of(store.read, bounds, whole, known)), store.fingerprint


def _whole(path: str | Path) -> str:
    with naming(path), open_bytes(path) as stream:
        content = stream.read()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte offset {error.start} is not UTF-8; convert the file to UTF-8") from None


def _bytes_of(
    read: Callable[[int, int], np.ndarray], bounds: np.ndarray, whole: int | None, tokenizer: Tokenizer | None
) -> Callable[[int], int | None]:
    """Bytes of the first `count` tokens. What is known of the whole is not counted again."""

    def count_bytes(count: int) -> int | None:
        if count == bounds[-1] and whole is not None:
            return whole
        if tokenizer is None:
            return None
        lengths = np.diff(np.minimum(bounds, count))
        return count_text_bytes(read(0, count), lengths[lengths > 0], tokenizer)

    return count_bytes
