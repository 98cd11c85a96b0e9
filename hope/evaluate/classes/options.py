"""The command line of `python -m hope.evaluate classes`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from hope.arguments import result_file, whole
from hope.evaluate.errors import EvaluationError


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """All options, with what each is for."""
    parser = argparse.ArgumentParser(
        prog="python -m hope.evaluate classes", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a run, of a checkpoint or of exported weights")
    add(
        "--data", type=Path, metavar="FILE", required=True, help="data_full.json of CLINC150, or train.csv of Banking77"
    )
    add("--test", type=Path, metavar="FILE", help="test.csv, beside a --data of the same kind")
    add("--tasks", type=whole(), default=10, metavar="N", help="tasks, near-equal parts of the classes (default 10)")
    add("--classes", type=whole(), metavar="N", help="only N classes, drawn by the seed")
    add("--train", type=whole(), metavar="N", help="examples of a class to learn from, at most")
    add("--tested", type=whole(), metavar="N", help="test examples of a class, at most")
    add("--epochs", type=whole(0), default=3, metavar="N", help="passes over a task; 0: nothing is learned (default 3)")
    add("--batch", type=whole(), default=16, metavar="N", help="examples of a step (default 16)")
    add("--rate", type=float, default=1e-4, metavar="RATE", help="AdamW's, constant (default 1e-4)")
    add(
        "--learn",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help='parameters that learn, "*.cms.levels.1.*" (default: all)',
    )
    add("--periods", type=whole(), nargs="+", metavar="N", help="clocks of the levels in steps (default: the model's)")
    add(
        "--seeds",
        type=whole(0),
        nargs="+",
        default=[1],
        metavar="SEED",
        help="of classes' and examples' order (default 1)",
    )
    add("--json", type=result_file, metavar="OUT", help="results, also partial ones: the same command goes on there")
    add("--window", type=whole(2), metavar="T", help="tokens of a prompt at most (default: those of training)")
    add("--batch-tokens", type=whole(), default=4096, metavar="N", help="tokens of a batch of answers (default 4096)")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model, if it is not found by itself")
    add("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises EvaluationError for options that cannot work."""
    if not 0 < args.rate < math.inf:
        raise EvaluationError(f"--rate {args.rate} is not a positive number; 1e-4 works")
    twice = [seed for seed in args.seeds if args.seeds.count(seed) > 1]
    if twice:
        raise EvaluationError(f"--seeds has {twice[0]} twice")
    if "*" in args.learn:
        raise EvaluationError("--learn *: leave --learn out, and all parameters learn")
