"""Files of text to PREFIX.bin, PREFIX.idx and PREFIX.manifest.json, in parallel and resumable.

The input is cut into units (`units`), each becomes a part in PREFIX.work/ (`shard`), and the
parts are put together in input order (`merge`). The output therefore depends neither on the number of
workers nor on interruptions.
"""

import hashlib
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import DataError
from data_prep.hooks import hook_identity
from data_prep.indexed import IndexedWriter
from data_prep.manifest import TokenSetManifest, length_histogram, remove_manifest
from data_prep.tokenizing.bad import bad_counts, nothing_left, report_bad
from data_prep.tokenizing.inputs import refuse_twice
from data_prep.tokenizing.merge import Merged, merge
from data_prep.tokenizing.progress import Progress
from data_prep.tokenizing.records import Rules
from data_prep.tokenizing.shard import TokenizeTask, Worker, finished_part, run_task, start_worker
from data_prep.tokenizing.tokenizer import Tokenizer, available_threads
from data_prep.tokenizing.units import plan
from data_prep.tokenizing.work import WorkFolder, part_key, recipe_of, source_records, stamps


@dataclass(frozen=True)
class Settings:
    """How to run. Only `rules` and `licence` have an effect on what is written.

    Attributes:
        workers: processes; with 1 the work is done in this process.
        unit_bytes: input bytes per unit; a killed run loses at most this much work per worker.
        max_bad: largest number ("20") or share ("0.5%") of bad records; empty for no limit.
        licence: of inputs whose corpus does not state one.
        progress: show a progress line on stderr.
    """

    rules: Rules = field(default_factory=Rules)
    workers: int = 1
    unit_bytes: int = 4 << 20
    max_bad: str = ""
    licence: str = ""
    progress: bool = False


def tokenize(source: str | Path, tokenizer: Tokenizer, prefix: str | Path, text_key: str = "text") -> TokenSetManifest:
    """Encode every document of one file, with EOS after each, stopping at the first bad record.

    Raises:
        DataError: a bad record (with file, line number and byte offset), or no document at all.
    """
    settings = Settings(Rules(text_key=text_key), workers=available_threads())
    return tokenize_files([str(source)], tokenizer, prefix, settings)


def tokenize_files(
    sources: Sequence[str], tokenizer: Tokenizer, prefix: str | Path, settings: Settings
) -> TokenSetManifest:
    """Encode every document of `sources` in order and write the token set.

    The manifest goes last and the old one is removed first, so an interrupted run leaves a set that
    readers refuse, never one that mixes old and new files. The same call resumes where a killed one stopped.
    PREFIX.bad.jsonl lists every bad record: file, byte offset, kind, what was done, message.

    Raises:
        DataError: a bad record under on_bad = "stop", more bad records than `max_bad`, no document at all,
            a source that changes meanwhile, another run on the same prefix.
    """
    settings.rules.check()
    limit = parse_limit(settings.max_bad)
    refuse_twice(sources)
    units = plan(sources, settings.rules.format, settings.unit_bytes)
    before = stamps(sources)
    hook = hook_identity(settings.rules.hook)
    with WorkFolder(f"{prefix}.work") as work, ThreadPoolExecutor(1) as background:
        described = background.submit(source_records, sources, settings.licence)
        keys = [part_key(unit, before[unit.path], settings.rules, hook, tokenizer.sha256) for unit in units]
        tasks = [TokenizeTask(unit, settings.rules, work.base(key)) for unit, key in zip(units, keys, strict=True)]
        work.remove_temporary()
        work.keep_only(keys)
        records = _collect(tasks, tokenizer, settings, limit, prefix)
        if stamps(sources) != before:
            raise DataError(f"{prefix}: an input file changed while it was read; run the same command again")
        files = described.result()
        recipe = recipe_of(files, settings.rules, hook, tokenizer.sha256)
        manifest = _publish(tasks, records, _Origin(tokenizer, files, recipe), prefix)
        work.remove()
    return manifest


def _collect(
    tasks: list[TokenizeTask], tokenizer: Tokenizer, settings: Settings, limit: tuple[float, float], prefix: str | Path
) -> list[dict[str, Any]]:
    """The records of all parts, in order; those that are missing are made."""
    progress = Progress(sum(task.unit.size for task in tasks)) if settings.progress else None
    records: list[dict[str, Any]] = []
    bad = 0
    try:
        for task, record, fresh in _parts(tasks, tokenizer, settings):
            records.append(record)
            bad += len(record["bad_records"])
            if progress and fresh:
                progress.add(task.unit.size, record["documents"])
            elif progress:
                progress.found(task.unit.size)
            if bad > limit[0]:
                _refuse(records, prefix, f"more than --max-bad {settings.max_bad}")
    finally:
        if progress:
            progress.close()
    total = sum(record["records"] for record in records)
    if bad > limit[1] * total:
        _refuse(records, prefix, f"{100 * bad / total:.3g}% of {total}, more than --max-bad {settings.max_bad}")
    return records


def _parts(
    tasks: list[TokenizeTask], tokenizer: Tokenizer, settings: Settings
) -> Iterator[tuple[TokenizeTask, dict[str, Any], bool]]:
    """(task, record, made now) in order of the tasks."""
    found = {task.base: record for task in tasks if (record := finished_part(task.base)) is not None}
    missing = [task for task in tasks if task.base not in found]
    workers = min(settings.workers, len(missing))
    if workers <= 1:
        worker = Worker(tokenizer.model_bytes, settings.rules)
        made: Iterator[dict[str, Any]] = map(worker.run, missing)
    else:
        made = _in_processes(missing, tokenizer, settings.rules, workers)
    for task in tasks:
        if task.base in found:
            yield task, found[task.base], False
        else:
            yield task, next(made), True


def _in_processes(
    tasks: list[TokenizeTask], tokenizer: Tokenizer, rules: Rules, workers: int
) -> Iterator[dict[str, Any]]:
    """Results in order. Spawned, since forking a process that has threads may hang; 0.4 s per worker."""
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(tokenizer.model_bytes, rules, os.getpid()),
    )
    waiting: deque[Future[dict[str, Any]]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(run_task, task))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a tokenizing process died, perhaps for want of memory; the same command goes on from what is done,"
            f" --workers {max(workers // 2, 1)} needs less"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Origin:
    """What a token set is made from; `sources` and `recipe` as in TokenSetManifest."""

    tokenizer: Tokenizer
    sources: list[dict[str, Any]]
    recipe: str


def _publish(
    tasks: list[TokenizeTask], records: list[dict[str, Any]], origin: _Origin, prefix: str | Path
) -> TokenSetManifest:
    """Put the parts together, report the bad records, and write the manifest last."""
    with IndexedWriter(prefix, origin.tokenizer.vocab_size) as writer:
        merged = merge([task.base for task in tasks], writer)
        if not writer.lengths:
            raise DataError(nothing_left([task.unit for task in tasks], tasks[0].rules if tasks else Rules(), records))
        remove_manifest(prefix)
    report_bad(records, prefix)
    manifest = _manifest(writer, merged, records, origin)
    manifest.save(prefix)
    return manifest


def _manifest(
    writer: IndexedWriter, merged: Merged, records: list[dict[str, Any]], origin: _Origin
) -> TokenSetManifest:
    lengths = np.asarray(writer.lengths)
    tokens = int(lengths.sum(dtype=np.int64))
    digests = [source["sha256"] for source in origin.sources]
    return TokenSetManifest(
        documents=len(lengths),
        tokens=tokens,
        text_bytes=merged.text_bytes,
        bytes_per_token=round(merged.text_bytes / tokens, 4),
        vocab_size=origin.tokenizer.vocab_size,
        eos_id=origin.tokenizer.eos_id,
        sha256_bin=writer.sha256_bin,
        sha256_idx=writer.sha256_idx,
        sha256_tokenizer=origin.tokenizer.sha256,
        sha256_source=digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        licence="; ".join(dict.fromkeys(source["licence"] for source in origin.sources if source["licence"])),
        sources=origin.sources,
        bad=bad_counts(records),
        dropped={"hook": sum(record["dropped_by_hook"] for record in records), "repeated": merged.repeated},
        length_histogram=length_histogram(lengths),
        recipe=origin.recipe,
        tokenizer=origin.tokenizer.path,
    )


def _refuse(records: list[dict[str, Any]], prefix: str | Path, how_many: str) -> None:
    report_bad(records, prefix)
    counts = ", ".join(f"{kind} {count}" for kind, count in bad_counts(records).items())
    bad = sum(len(record["bad_records"]) for record in records)
    raise DataError(
        f"{prefix}: {bad} bad records ({counts}), {how_many}; {prefix}.bad.jsonl has their files and byte offsets."
        " No token set was written. A larger --max-bad goes on from the work that is done"
    )


def parse_limit(text: str) -> tuple[float, float]:
    """(largest number, largest share) of bad records that "20", "0.5%" or "" (no limit) allows."""
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        value = float(number) if text else float("inf")
    except ValueError:
        value = -1.0
    if value < 0 or value != value or (text and not percent and value != int(value)):
        raise DataError(f"--max-bad {text}: need a number of records such as 20, or a share such as 0.5%")
    return (float("inf"), value / 100) if percent else (value, float("inf"))
