"""Probes that tell memories apart: `python -m hope.evaluate probe NAME CONFIG [a.b=c ...]`.

NAME is one of the probes that train a small model by a published set-up (mqar, palindrome, selective_copy, parity,
modular, s3, s5), or needle or facts, which ask a trained model. One process.

Exit codes: 0 done, 2 a request or file that cannot work, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch

from configs.errors import ConfigError
from configs.schema import load
from data_prep.errors import DataError
from data_prep.files import sha256_file
from data_prep.paths import naming
from data_prep.texts import tokenizer_for
from hope.devices import device_of
from hope.evaluate.errors import EvaluationError
from hope.evaluate.options import DTYPES
from hope.evaluate.options import table as table_of_tasks
from hope.evaluate.probes.haystack import sentences_of
from hope.evaluate.probes.needles import facts, needle
from hope.evaluate.probes.options import ZERO_SHOT, best_of, check, parser_of, table
from hope.evaluate.probes.protocols import PROTOCOLS
from hope.evaluate.probes.train import Plan, accuracy, adamw, train
from hope.evaluate.progress import Progress, Steps
from hope.evaluate.record import Record
from hope.evaluate.rows import Alone
from hope.evaluate.run import Engine, evaluate_task
from hope.evaluate.scorer import ModelScorer, fingerprint
from hope.evaluate.tasks import Task
from hope.pipe import piped
from hope.pretrained import open_pretrained
from hope.stored.errors import CheckpointError

DONE, REFUSED, INTERRUPTED = 0, 2, 130
LENGTHS, ITEMS = (1024, 2048, 4096), 500


def main(argv: Sequence[str] | None = None) -> int:
    args = parser_of(__doc__).parse_intermixed_args(argv)
    try:
        check(args)
        print((zero_shot if args.name in ZERO_SHOT else trained)(args), flush=True)
    except (EvaluationError, CheckpointError, ConfigError, DataError) as error:
        print(f"probe: {error}", file=sys.stderr, flush=True)
        return REFUSED
    except KeyboardInterrupt:
        print("\ninterrupted; with --json the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return DONE


def trained(args: argparse.Namespace) -> str:
    """Train and test at every rate and seed; the table."""
    protocol = PROTOCOLS[args.name]
    config = load(args.model, args.overrides, check=False)
    sizes = protocol.train[: args.train_sizes]
    tests = dict(list(protocol.test.items())[: args.test_sizes])
    model = dataclasses.replace(
        config.model, vocab_size=sizes[0][0].vocab_size, layers=args.layers or protocol.layers
    )  # fmt: skip
    if problems := list(model.problems()):
        raise EvaluationError("; ".join(f"{problem.path}: {problem.what}" for problem in problems))
    device = device_of(args.device, EvaluationError)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # the kernels of the memories have TF32 products
    steps, batch = args.steps or protocol.steps, args.batch or protocol.batch
    tested = args.tested or protocol.tested
    identity = {"probe": args.name, "model": dataclasses.asdict(model), "steps": steps, "batch": batch,
                "train_sizes": len(sizes), "optim": dataclasses.asdict(config.optim), "tests": list(tests)}  # fmt: skip
    record = Record(args.json, identity, {"source": protocol.source})
    runs: list[tuple[float, dict[str, Any]]] = []
    for rate in args.rates or protocol.rates:
        optim = adamw(config.optim, rate, protocol.weight_decay, steps)
        for seed in args.seeds:
            name = f"rate{rate:g}.seed{seed}"
            entry = record.open(name, {"rate": rate, "seed": seed}, tested)
            cells = entry.result
            if cells is None:
                progress = Steps(f"{args.name} {name}", steps)
                made = train(model, optim, Plan(sizes, steps, batch, seed), device, progress)
                cells = {size: accuracy(made, probe, seed, tested, batch, device) for size, probe in tests.items()}
                entry.finish(cells, keep_rows=False)
            runs.append((rate, cells))
    return table(runs, best_of(runs))


def zero_shot(args: argparse.Namespace) -> str:
    """Ask a trained model at every length; the table."""
    found = open_pretrained(args.model)
    tokenizer = tokenizer_for(args.tokenizer or found.tokenizer_path, found.model.config.vocab_size)
    if tokenizer is None:
        raise EvaluationError(f"{args.model}: its tokenizer was not found beside its data; --tokenizer FILE names it")
    with naming(args.haystack):
        text = args.haystack.read_bytes().decode("utf-8", "replace")
    sentences = sentences_of(text, str(args.haystack))
    identity = {"model": fingerprint(found.model), "dtype": args.dtype, "haystack": sha256_file(args.haystack)}
    record = Record(args.json, identity, {"origin": found.origin, "step": found.step, "window": found.seq_len})
    starts_after = tokenizer.eos_id if found.data.get("documents") == "reset" else None
    scorer = ModelScorer(
        found.model, device=device_of(args.device, EvaluationError), dtype=DTYPES[args.dtype], starts_after=starts_after
    )
    size = lambda part: len(tokenizer.encode(part)) + 1  # the end-of-document token stands before it
    count, results = args.tested or ITEMS, []
    for length in args.lengths or LENGTHS:
        for kind in args.kinds if args.name == "needle" else (None,):
            name = f"{kind or 'facts'}.T{length}"
            entry = record.open(name, {"seed": args.seeds[0]}, count)
            where = (length, args.seeds[0])
            if kind is None:
                items = tuple(facts(*where, index, sentences, size) for index in range(count))
            else:
                items = tuple(needle(kind, *where, index, sentences, size) for index in range(count))
            task = Task("choice" if kind is None else "completion", items)
            engine = Engine(scorer, Alone(), args.batch_tokens, Progress(name, True))
            result = evaluate_task(engine, task, entry, tokenizer.encode, eos_id=tokenizer.eos_id, window=None)
            results.append((name, result))
    return table_of_tasks(results)


if __name__ == "__main__":
    sys.exit(piped(main))
