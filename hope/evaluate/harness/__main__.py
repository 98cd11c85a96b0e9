"""Tasks of lm-evaluation-harness: `python -m hope.evaluate.harness MODEL --tasks NAME,NAME [--include FOLDER]`.

Needs the extra `harness` (`pip install -e '.[harness]'`). --include names a folder of task files (YAML) of one's
own; then only these are known, and nothing is downloaded for them. One device.

Exit codes: 0 done, 2 a request or file that cannot work.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.files import atomic_write
from data_prep.texts import tokenizer_for
from hope.arguments import result_file, whole
from hope.devices import device_of
from hope.evaluate.errors import EvaluationError
from hope.evaluate.harness.answers import Answers
from hope.evaluate.options import DTYPES, WINDOW
from hope.evaluate.progress import Progress
from hope.evaluate.rows import Alone
from hope.evaluate.run import Engine
from hope.evaluate.scorer import ModelScorer
from hope.generate.greedy import greedy
from hope.generate.loop import on_one_device
from hope.pipe import piped
from hope.pretrained import open_pretrained
from hope.stored.errors import CheckpointError

DONE, REFUSED = 0, 2
EXTRA = "lm-evaluation-harness is not installed; `pip install -e '.[harness]'` brings it (0.5 GB)"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        results = evaluate(args)
        if args.json is not None:
            with atomic_write(args.json) as stream:
                stream.write(json.dumps(results, indent=1, default=str).encode() + b"\n")
    except (EvaluationError, CheckpointError, DataError, OSError, NotImplementedError) as error:
        print(f"harness: {error}", file=sys.stderr, flush=True)
        return REFUSED
    for task, measures in results["results"].items():
        for name, value in measures.items():
            if isinstance(value, int | float):
                print(f"{task}  {name}  {value}")
    return DONE


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """What the harness reports: results, configurations, versions, and with --samples every document."""
    try:
        import lm_eval
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(f"{EXTRA}: {error}") from None

    class Ours(Answers, LM):  # the harness's own class, which knows nothing but its name
        pass

    found = open_pretrained(args.model)
    tokenizer = tokenizer_for(args.tokenizer or found.tokenizer_path, found.model.config.vocab_size)
    if tokenizer is None:
        raise EvaluationError(f"{args.model}: its tokenizer was not found beside its data; --tokenizer FILE names it")
    device = device_of(args.device, EvaluationError)
    starts_after = tokenizer.eos_id if found.data.get("documents") == "reset" else None
    scorer = ModelScorer(found.model, device=device, dtype=DTYPES[args.dtype], starts_after=starts_after)
    engine = Engine(scorer, Alone(), args.batch_tokens, Progress("harness", True))
    window = None if args.carry else args.window or found.seq_len or WINDOW
    generate = greedy(
        on_one_device(scorer.model), tokenizer.encode, tokenizer.decode, tokenizer.eos_id,
        vocabulary=tokenizer.vocab_size, device=device,
    )  # fmt: skip
    model = Ours(engine, tokenizer.encode, tokenizer.eos_id, window, generate)
    manager = TaskManager(include_path=args.include, include_defaults=args.include is None)
    try:
        report = lm_eval.simple_evaluate(
            model=model, tasks=args.tasks.split(","), limit=args.limit, task_manager=manager, log_samples=args.samples
        )  # fmt: skip
    except KeyError as error:
        raise EvaluationError(f"--tasks {args.tasks}: {error}") from None
    return {"origin": found.origin, "step": found.step, "window": window, **(report or {})}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hope.evaluate.harness", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a run, of a checkpoint or of exported weights")
    add("--tasks", required=True, metavar="NAME,NAME", help="as the harness calls them")
    add("--include", metavar="FOLDER", help="task files of one's own, instead of the harness's")
    add("--limit", type=whole(), metavar="N", help="documents of a task at most")
    add("--json", type=result_file, metavar="OUT", help="what the harness reports")
    add("--samples", action="store_true", help="report every document too")
    add("--window", type=whole(), metavar="T", help="tokens of a window (default: those of training)")
    add("--carry", action="store_true", help="no windows: the state is carried over a whole text")
    add("--batch-tokens", type=whole(), default=4096, metavar="N", help="tokens of a batch (default 4096)")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model, if it is not found by itself")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32)")
    add("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    return parser


if __name__ == "__main__":
    sys.exit(piped(main))
