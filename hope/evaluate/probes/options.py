"""The command line of `python -m hope.evaluate probe`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hope.arguments import result_file, whole
from hope.evaluate.errors import EvaluationError
from hope.evaluate.options import DTYPES
from hope.evaluate.probes.needles import NEEDLES
from hope.evaluate.probes.protocols import PROTOCOLS

ZERO_SHOT = ("needle", "facts")


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """All options, with what each is for."""
    parser = argparse.ArgumentParser(
        prog="python -m hope.evaluate probe", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("name", choices=(*PROTOCOLS, *ZERO_SHOT), help="the probe")
    add("model", metavar="CONFIG|MODEL", help="a configuration to train; for needle and facts a trained model")
    add("overrides", nargs="*", help="section.key=value, or YAML files, as for pretrain_hope.py")
    add("--json", type=result_file, metavar="OUT", help="results, also partial ones: the same command goes on there")
    add("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    trained = parser.add_argument_group("probes that train; defaults are the published set-up")
    trained.add_argument("--layers", type=whole(), metavar="N", help="of the model")
    trained.add_argument("--steps", type=whole(), metavar="N", help="optimizer steps of each run")
    trained.add_argument("--batch", type=whole(), metavar="N", help="sequences of a step")
    trained.add_argument("--rates", type=float, nargs="+", metavar="RATE", help="AdamW's, one run each")
    trained.add_argument("--seeds", type=whole(0), nargs="+", default=[1], metavar="SEED", help="default 1")
    trained.add_argument("--train-sizes", type=whole(), metavar="N", help="train on the first N sizes only")
    trained.add_argument("--test-sizes", type=whole(), metavar="N", help="test on the first N sizes only")
    both = parser.add_argument_group("all")
    both.add_argument("--tested", type=whole(), metavar="N", help="test examples of a size (needle and facts: 500)")
    shot = parser.add_argument_group("needle and facts")
    shot.add_argument("--haystack", type=Path, metavar="FILE", help="UTF-8 text, required")
    shot.add_argument("--kinds", nargs="+", choices=NEEDLES, default=NEEDLES, help="needles (default: all)")
    shot.add_argument("--lengths", type=whole(), nargs="+", metavar="T", help="tokens (default: 1024 2048 4096)")
    shot.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model, if it is not found by itself")
    shot.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32)")
    shot.add_argument("--batch-tokens", type=whole(), default=4096, metavar="N", help="of a batch (default 4096)")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises EvaluationError for options that cannot work."""
    if wrong := [rate for rate in args.rates or () if not 0 < rate < math.inf]:
        raise EvaluationError(f"--rates {wrong[0]} is not a positive number; 1e-3 works")
    if args.name in ZERO_SHOT and args.haystack is None:
        raise EvaluationError(f"{args.name} hides sentences in a text; --haystack FILE names it")
    if args.name in ZERO_SHOT and args.overrides:
        raise EvaluationError(f"{args.name} takes a trained model, which {args.overrides[0]} cannot change")


def best_of(runs: Sequence[tuple[float, Mapping[str, Any]]]) -> float:
    """The rate with the highest accuracy, averaged over seeds and test sizes, as zoology chooses it."""
    means: dict[float, list[float]] = {}
    for rate, cells in runs:
        means.setdefault(rate, []).extend(cell["accuracy"]["value"] for cell in cells.values())
    return max(means, key=lambda rate: sum(means[rate]) / len(means[rate]))


def table(runs: Sequence[tuple[float, Mapping[str, Any]]], best: float) -> str:
    """Accuracy against state size at the best rate, the mean over seeds with their range."""
    chosen = [cells for rate, cells in runs if rate == best]
    lines = [("test", "accuracy", "range over seeds", "whole examples", "state bytes")]
    for name in chosen[0]:
        found = [cells[name] for cells in chosen]
        accuracies = [cell["accuracy"]["value"] for cell in found]
        whole = sum(cell["whole"]["value"] for cell in found) / len(found)
        span = f"{min(accuracies):.4f} to {max(accuracies):.4f}" if len(found) > 1 else ""
        mean = sum(accuracies) / len(accuracies)
        lines.append((name, f"{mean:.4f}", span, f"{whole:.4f}", f"{found[0]['state_bytes']:,}"))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    rows = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*rows, f"rate {best:g}, the best of {len({rate for rate, _ in runs})}; {len(chosen)} seeds"])
