"""One unit of input to one part of the output, whole or absent; runs in the worker processes.

A part is KEY-NUMBER.bin (tokens), .npy (per document: tokens, text bytes), .keys.npy (only if documents have
keys) and, written last, .json with counts and digests. KEY identifies inputs, tokenizer and settings, so that a
worker which outlives its killed parent can only ever write the bytes that the next run would write as well.
"""

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import atomic_write, write_json
from data_prep.hooks import DIGEST_BYTES, load_hook
from data_prep.indexed import dtype_for
from data_prep.tokenizing.records import RecordReader, Rules, Text
from data_prep.tokenizing.tokenizer import Tokenizer
from data_prep.tokenizing.units import InputUnit
from hope.nesting import json_of

BATCH_CHARACTERS = 1 << 20
DOCUMENT = np.dtype([("tokens", "<i8"), ("bytes", "<i8")])
KEY = np.dtype([("document", "<i8"), ("digest", f"S{2 * DIGEST_BYTES}")])  # hex: numpy strips zero bytes off S


@dataclass(frozen=True)
class TokenizeTask:
    """What a worker needs for one unit; `base` is the path of the part without suffix."""

    unit: InputUnit
    rules: Rules
    base: str


class Worker:
    """The state of a worker process: the loaded tokenizer and hook."""

    def __init__(self, model: bytes, rules: Rules) -> None:
        self.tokenizer = Tokenizer(model)
        self.hook = load_hook(rules.hook)

    def run(self, task: TokenizeTask) -> dict[str, Any]:
        """Write the part of a unit; returns its record (the content of the .json file)."""
        reader = RecordReader(task.unit, task.rules, self.hook)
        documents: list[tuple[int, int]] = []
        keys: list[tuple[int, bytes]] = []
        digest = hashlib.sha256()
        with atomic_write(f"{task.base}.bin") as stream:
            for batch in _batches(reader.texts()):
                data, sizes = self._encode([text.text for text in batch])
                for text, size in zip(batch, sizes, strict=True):
                    keys += [(len(documents), key.hex().encode()) for key in text.keys]
                    documents.append(size)
                stream.write(data)
                digest.update(data)
        _save(f"{task.base}.npy", np.array(documents, dtype=DOCUMENT))
        if keys:
            _save(f"{task.base}.keys.npy", np.array(keys, dtype=KEY))
        record = {**asdict(reader.tally), "documents": len(documents), "sha256": digest.hexdigest()}
        write_json(f"{task.base}.json", record)
        return record

    def _encode(self, texts: list[str]) -> tuple[bytes, list[tuple[int, int]]]:
        """Token bytes of the texts, EOS after each, and (tokens, text bytes) of each."""
        dtype = dtype_for(self.tokenizer.vocab_size)
        eos = [self.tokenizer.eos_id]
        arrays = [np.array(ids + eos, dtype=dtype) for ids in self.tokenizer.encode_batch(texts)]
        sizes = [(len(ids), len(text.encode())) for ids, text in zip(arrays, texts, strict=True)]
        return b"".join(ids.tobytes() for ids in arrays), sizes


def finished_part(base: str) -> dict[str, Any] | None:
    """The record of a part that was written completely; else None."""
    try:
        return json_of(Path(f"{base}.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


_worker: list[Worker] = []  # one entry per worker process, set when it starts: how a pool hands over state


def start_worker(model: bytes, rules: Rules, parent: int) -> None:
    """Prepare this process; it ends by itself within half a second of its parent's death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool, without a traceback per worker
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _worker.append(Worker(model, rules))


def run_task(task: TokenizeTask) -> dict[str, Any]:
    """Worker.run in a process that start_worker has prepared."""
    return _worker[0].run(task)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _save(path: str, values: np.ndarray) -> None:
    with atomic_write(path) as stream:
        np.save(stream, values)


def _batches(texts: Iterator[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
