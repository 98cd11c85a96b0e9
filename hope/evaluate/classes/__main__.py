"""Classes learned one task after another: `python -m hope.evaluate classes MODEL --data FILE --tasks 10`.

The classes of a data set (CLINC150, Banking77, or your own in their formats) are divided into tasks. A copy of the
model learns them in turn, each from its own examples alone, and is then asked to tell all classes apart that it has
seen. One process, fp32.

Exit codes: 0 done, 2 a request or file that cannot work, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from data_prep.errors import DataError
from data_prep.files import sha256_file
from data_prep.texts import tokenizer_for
from hope.devices import device_of
from hope.evaluate.classes.data import Example, read
from hope.evaluate.classes.learner import Learner, Plan, model_of
from hope.evaluate.classes.matrix import summary, table
from hope.evaluate.classes.options import check, parser_of
from hope.evaluate.classes.stream import Prompts, order_of
from hope.evaluate.errors import EvaluationError
from hope.evaluate.options import WINDOW
from hope.evaluate.progress import Progress, Steps
from hope.evaluate.record import Record, Source
from hope.evaluate.scorer import fingerprint
from hope.pipe import piped
from hope.pretrained import open_pretrained
from hope.stored.errors import CheckpointError

DONE, REFUSED, INTERRUPTED = 0, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    args = parser_of(__doc__).parse_args(argv)
    try:
        check(args)
        print(Experiment(args).run(), flush=True)
    except (EvaluationError, CheckpointError, DataError, ImportError) as error:
        print(f"classes: {error}", file=sys.stderr, flush=True)
        return REFUSED
    except KeyboardInterrupt:
        print("\ninterrupted; with --json the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return DONE


class Experiment:
    """A model, a data set and a plan; every seed is a stream of tasks."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.data = read(args.data, args.test).first(args.train, args.tested)
        self.orders = {seed: order_of(self.data.labels(), args.tasks, seed, args.classes) for seed in args.seeds}
        self.plan = Plan(
            args.rate, args.batch, args.epochs, tuple(args.learn),
            tuple(args.periods) if args.periods else None, args.batch_tokens,
        )  # fmt: skip
        found = open_pretrained(args.model)
        tokenizer = tokenizer_for(args.tokenizer or found.tokenizer_path, found.model.config.vocab_size)
        if tokenizer is None:
            raise EvaluationError(
                f"{args.model}: its tokenizer was not found beside its data; --tokenizer FILE names it"
            )
        window = args.window or found.seq_len or WINDOW
        self.prompts = Prompts(tokenizer.encode, tokenizer.eos_id, window)
        steps = min(self._steps(tasks) for tasks in self.orders.values())
        self.config, self.weights = model_of(found.model.config, self.plan, steps), found.model.state_dict()
        self.device = device_of(args.device, EvaluationError)
        how = {name: value for name, value in dataclasses.asdict(self.plan).items() if name != "batch_tokens"}
        identity: dict[str, Any] = {
            "program": "classes", "model": fingerprint(found.model), "tokenizer": tokenizer.sha256, "window": window,
            "data": sha256_file(args.data), "test": sha256_file(args.test) if args.test else None,
            "tasks": args.tasks, "classes": args.classes, "train": args.train, "tested": args.tested,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in how.items()},
        }  # fmt: skip
        self.record = Record(args.json, identity, {"origin": found.origin, "step": found.step})
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # the kernels of the memories have TF32 products

    def run(self) -> str:
        """All seeds; the table."""
        runs = [(seed, self._stream(seed, tasks)) for seed, tasks in self.orders.items()]
        sizes = [len(task) for task in self.orders[self.args.seeds[0]]]
        return table(runs, [sum(sizes[: number + 1]) for number in range(len(sizes))])

    def _stream(self, seed: int, tasks: list[list[str]]) -> dict[str, Any]:
        """The summary of one seed. Answers that are on record are not asked again; to come to those that are not, the
        tasks before them are learned again."""
        entries = [
            self.record.open(f"seed{seed}.task{number}", {"seed": seed, "task": number, "classes": task}, None)
            for number, task in enumerate(tasks, 1)
        ]
        if any(entry.result is None for entry in entries):
            learner = Learner(self.config, self.weights, self.plan, self.prompts, self.device)
            for number, entry in enumerate(entries, 1):
                self._task(learner, seed, tasks[:number], entry)
        found = summary([entry.result or {} for entry in entries], len(tasks))
        self.record.open(f"seed{seed}", {"seed": seed}, None).finish(found, keep_rows=False)
        return found

    def _task(self, learner: Learner, seed: int, tasks: list[list[str]], entry: Source) -> None:
        number, examples = len(tasks), _of(self.data.train, tasks[-1])
        name = f"seed{seed}.task{number}"
        if self.plan.epochs:
            learner.learn(examples, [seed, number], Steps(f"{name} learns", self.plan.steps(len(examples))))
        if entry.result is not None:
            return
        labels = [label for task in tasks for label in task]
        asked = [_of(self.data.test, task) for task in tasks]
        right = [
            learner.right(examples, labels, _progress(f"{name} asked of task {earlier}"))
            for earlier, examples in enumerate(asked, 1)
        ]
        entry.finish({"right": right, "items": [len(examples) for examples in asked]}, keep_rows=False)

    def _steps(self, tasks: list[list[str]]) -> int:
        return sum(self.plan.steps(len(_of(self.data.train, task))) for task in tasks)


def _progress(name: str) -> Callable[[int, int], None]:
    """Told rows that are done, and of how many."""
    progress, began = Progress(name, True), time.monotonic()
    return lambda done, total: progress(done, total, time.monotonic() - began)


def _of(examples: Sequence[Example], labels: Sequence[str]) -> list[Example]:
    wanted = frozenset(labels)
    return [example for example in examples if example.label in wanted]


if __name__ == "__main__":
    sys.exit(piped(main))
