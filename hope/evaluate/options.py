"""The command line of `python -m hope.evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from hope.adapt import settings
from hope.arguments import result_file, whole
from hope.evaluate.errors import EvaluationError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
WINDOW = 2048  # of a model that does not record what it was trained on


class Named(NamedTuple):
    """A source: what it is called in results, its kind (text, tokens or task), and where it is."""

    name: str
    kind: str
    path: str


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """All options, with what each is for."""
    parser = argparse.ArgumentParser(
        prog="python -m hope.evaluate", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a run, of a checkpoint or of exported weights")
    add = parser.add_argument
    for option, metavar, what in (
        ("--text", "[NAME=]FILE", 'UTF-8 text, or JSON lines with "text", one document each'),
        ("--tokens", "[NAME=]PREFIX", "token sets"),
        ("--task", "[NAME=]FILE", "JSON lines: see docs/evaluate.md"),
    ):
        add(option, metavar=metavar, action="extend", nargs="+", default=[], help=what)
    add("--delimiter", metavar="NAME=TEXT", action="append", default=[], help="what joins the parts of a task's items")
    add("--json", type=result_file, metavar="OUT", help="results, also partial ones: the same command goes on there")
    add("--window", type=whole(), metavar="T", help="tokens of a window (default: those of training)")
    add("--stride", type=whole(), metavar="S", help="new tokens of each window, the others are context (default: T)")
    add("--carry", action="store_true", help="one pass over every text, the state carried from its first token on")
    add("--limit", type=whole(), metavar="N", help="at most N windows of a text and N items of a task")
    add("--batch-tokens", type=whole(), metavar="N", help="tokens of a batch (default: 4096, on a GPU 16384)")
    settings.add_options(parser)
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model, if it is not found by itself")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32)")
    add("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    return parser


def sources_of(args: argparse.Namespace) -> list[Named]:
    """Everything that is to be evaluated, in order.

    Raises:
        EvaluationError: nothing, or two of one name.
    """
    found = [
        _named(kind, word) for kind, words in (("text", args.text), ("tokens", args.tokens), ("task", args.task))
        for word in words
    ]  # fmt: skip
    if not found:
        raise EvaluationError("nothing to evaluate; give --text FILE, --tokens PREFIX or --task NAME=FILE.jsonl")
    names = [source.name for source in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise EvaluationError(f"two sources are called {twice[0]}; give them names: NAME={twice[0]}, OTHER=...")
    for name in delimiters_of(args):
        if name not in [source.name for source in found if source.kind == "task"]:
            raise EvaluationError(f"--delimiter {name}=...: no task is called {name}; --task {name}=FILE names it so")
    return found


def delimiters_of(args: argparse.Namespace) -> dict[str, str]:
    """By task. Raises EvaluationError for one that names no task."""
    found = {}
    for word in args.delimiter:
        name, equals, text = word.partition("=")
        if not equals:
            raise EvaluationError(f"--delimiter {word!r} names no task; NAME={word} does")
        found[name] = text
    return found


def _named(kind: str, word: str) -> Named:
    name, equals, path = word.partition("=")
    if equals and name and path and "/" not in name:
        return Named(name, kind, path)
    return Named(Path(word).name if kind == "tokens" else Path(word).name.split(".")[0], kind, word)


def check(args: argparse.Namespace, processes: int = 1) -> None:
    """Raises EvaluationError for options that cannot work, or not in so many processes, with all that is wrong."""
    problems = [*_problems(args), *settings.problems(args), *_order_problems(args, processes)]
    if problems:
        raise EvaluationError("\n  ".join(["this cannot work:", *problems] if len(problems) > 1 else problems))


def _problems(args: argparse.Namespace) -> Iterator[str]:
    if args.carry and args.stride is not None:
        yield "--carry has no windows; leave out --stride"


def _order_problems(args: argparse.Namespace, processes: int) -> Iterator[str]:
    """Where there is no order in which a model could learn."""
    if args.adapt is None:
        return
    if args.task:
        yield f"--adapt learns from a text in order, and the items of --task {args.task[0]} have none; leave out one"
    if args.stride is not None:
        yield "--adapt reads every text once, with the state carried; leave out --stride"
    if args.dtype == "bfloat16":
        yield "--adapt: steps are lost in the rounding of --dtype bfloat16; float32 works"
    if processes > 1:
        yield f"--adapt reads a text in order, and {processes} processes share the windows of a text; start one"


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def table(results: Sequence[tuple[str, dict[str, object]]]) -> str:
    """Rows of source, measure, value and standard error, for people."""
    lines = [("source", "measure", "value", "standard error")]
    for name, result in results:
        for key, value in result.items():
            if isinstance(value, dict) and "value" in value:
                error = "" if value["error"] is None else _short(value["error"])
                lines.append((name, key, _short(value["value"]), error))
            elif key in ("items", "tokens", "bytes", "updates"):
                lines.append((name, key, "unknown" if value is None else f"{value:,}", ""))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    shown = [
        "  ".join((*map(str.ljust, line[:2], widths[:2]), *map(str.rjust, line[2:], widths[2:]))) for line in lines
    ]
    return "\n".join(line.rstrip() for line in shown)
