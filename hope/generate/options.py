"""The command line of `python -m hope.generate`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from hope.adapt import settings
from hope.arguments import LARGEST, result_file, whole
from hope.generate.errors import GenerationError
from hope.generate.loop import CHUNK
from hope.generate.sampling import Sampling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """All options, with what each is for."""
    parser = argparse.ArgumentParser(
        prog="python -m hope.generate", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a run, of a checkpoint or of exported weights")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="what the text begins with")
    source.add_argument("--batch", type=Path, metavar="FILE", help="a prompt a line, or JSON lines; output: JSON lines")
    parser.add_argument("--tokens", type=whole(), default=100, metavar="N", help="at most this many (default 100)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy; default 1")
    parser.add_argument("--top-k", type=whole(), metavar="K", help="only the K most probable tokens (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the fewest that have share P")
    parser.add_argument(
        "--seed", type=whole(0, LARGEST), default=0, help="of the draws (default 0): the same seed, the same text"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end of a document")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model, if it is not found by itself")
    parser.add_argument("--state-in", type=Path, metavar="FILE", help="go on from what --state-out wrote")
    parser.add_argument("--state-out", type=result_file, metavar="FILE", help="write what the sequence remembers")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are stored)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "--prefill-chunk",
        type=whole(),
        default=CHUNK,
        metavar="N",
        help=f"tokens of the prompt at a time (default {CHUNK})",
    )
    settings.add_options(parser)
    return parser


def check(args: argparse.Namespace, processes: int) -> None:
    """Raises GenerationError for options that cannot work by themselves, or with this many processes."""
    problems = [*_problems(args, processes), *settings.problems(args), *_learning_problems(args, processes)]
    if problems:
        raise GenerationError("\n  ".join(["this cannot work:", *problems] if len(problems) > 1 else problems))


def _problems(args: argparse.Namespace, processes: int) -> Iterator[str]:
    yield from sampling_of(args).problems()
    if "" in args.stop:
        yield '--stop "" would stop at once; give at least one character'
    if args.prompt == "" and args.state_in is None:
        yield '--prompt "" is empty; it needs at least one character, or --state-in FILE to go on from'
    remembers = [name for name in ("state_in", "state_out") if getattr(args, name) is not None]
    for name in remembers:
        option = f"--{name.replace('_', '-')}"
        if args.batch is not None:
            yield f"{option} is the memory of one sequence, --batch has several; give --prompt"
        if processes > 1:
            yield f"{option} holds a state that is not cut over processes, and {processes} were started; start one"
    if args.device is not None and processes > 1:
        yield f"--device goes with one process; each of {processes} takes the device of its rank"


def _learning_problems(args: argparse.Namespace, processes: int) -> Iterator[str]:
    """Where there is no one sequence on one device to learn from."""
    if args.adapt is None:
        return
    if args.batch is not None:
        yield "--adapt learns from one sequence in order, --batch has several; give --prompt"
    if args.prefill_chunk != CHUNK:
        said = f"--prefill-chunk {args.prefill_chunk}"
        yield f"--adapt reads the prompt in windows of --adapt-every tokens; leave out {said}"
    if args.dtype == "bfloat16":
        yield "--adapt: steps are lost in the rounding of --dtype bfloat16; float32 works"
    if processes > 1:
        yield f"--adapt learns with a model that is not cut over processes, and {processes} were started; start one"


def sampling_of(args: argparse.Namespace) -> Sampling:
    """How tokens are chosen."""
    return Sampling(args.temperature, args.top_k, args.top_p, args.seed)
