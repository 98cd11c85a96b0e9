"""What a trained model scores: `python -m hope.evaluate MODEL --text FILE --tokens PREFIX --task NAME=FILE.jsonl`.

MODEL is the folder of a run (its newest sound checkpoint), of a checkpoint or of exported weights. A table goes to
standard output, progress to standard error. With --json OUT all results are kept there: a command that was interrupted
goes on where it stood. Under `torchrun --nproc-per-node N` the work is divided over N devices.

`probe`, `classes` and `harness` in the place of MODEL are further programs, and have a --help of their own.

Exit codes: 0 done, 2 a request or file that cannot work, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from data_prep.errors import DataError
from data_prep.files import sha256_file
from data_prep.paths import naming
from data_prep.texts import text_of_file, text_of_set, tokenizer_for
from hope.adapt.learner import Learner
from hope.adapt.settings import AdaptError, settings_of
from hope.devices import device_of
from hope.evaluate.errors import EvaluationError
from hope.evaluate.options import DTYPES, WINDOW, Named, check, delimiters_of, parser_of, sources_of, table
from hope.evaluate.progress import Progress
from hope.evaluate.record import Record, Source
from hope.evaluate.rows import Alone, Share
from hope.evaluate.run import Engine, evaluate_task, evaluate_text
from hope.evaluate.scorer import ModelScorer, fingerprint
from hope.evaluate.tasks import read_task
from hope.pipe import in_words, piped
from hope.pretrained import open_pretrained
from hope.stored.errors import CheckpointError
from parallel.compute.shares import RankShare
from parallel.layout.topology import ParallelConfig
from parallel.start import groups, launcher, told
from parallel.start.errors import LaunchError

Made = TypeVar("Made")

DONE, REFUSED, INTERRUPTED = 0, 2, 130
PROGRAMS = {"probe": "probes", "classes": "classes", "harness": "harness"}
"""Programs of their own, by the word that asks for them; no module imports them."""
EXPLAINED = (EvaluationError, AdaptError, CheckpointError, DataError, LaunchError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    launch: launcher.Launch | None = None
    met = False
    try:
        launch = launcher.from_environment(os.environ)
        if words and words[0] in PROGRAMS:
            _further(words, launch.world_size)
        args = parser_of(__doc__).parse_args(words)
        check(args, launch.world_size)
        sources = sources_of(args)
        if launch.world_size == 1:
            Evaluation(args, Alone(), device_of(args.device, EvaluationError)).run(sources)
        else:
            with groups.start(ParallelConfig()) as ranks:
                met = True
                Evaluation(args, RankShare(ranks), ranks.device).run(sources)
    except BrokenPipeError:  # an OSError, but about the reader of the output
        raise
    except EXPLAINED as error:
        told.once(f"evaluate: {in_words(error)}", launch, met, agreed=False)
        return REFUSED
    except KeyboardInterrupt:
        print("\ninterrupted; with --json the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return DONE


def _further(words: list[str], world_size: int) -> None:
    """Become the program that the first word asks for, which ends this process with its own exit code."""
    if world_size > 1:
        raise EvaluationError(f"{words[0]} works in one process, and {world_size} were started; start one")
    sys.argv = [sys.argv[0], *words[1:]]
    runpy.run_module(f"hope.evaluate.{PROGRAMS[words[0]]}", run_name="__main__")


class Evaluation:
    """A model that was opened, and what it is asked."""

    def __init__(self, args: argparse.Namespace, share: Share, device: torch.device) -> None:
        self.args, self.share = args, share
        found = open_pretrained(args.model)
        self.tokenizer = tokenizer_for(args.tokenizer or found.tokenizer_path, found.model.config.vocab_size)
        self.documents = found.data.get("documents", "carry")
        self.window = args.window or found.seq_len or WINDOW
        if args.stride is not None and args.stride > self.window:
            raise EvaluationError(f"--stride {args.stride} is more than the window of {self.window} tokens")
        self.adapt = settings_of(args, found.model.config, found.seq_len)
        identity = {
            "model": fingerprint(found.model),
            "dtype": args.dtype,
            "documents": self.documents,
            "tokenizer": self.tokenizer.sha256 if self.tokenizer else None,
        }
        about = {"origin": found.origin, "step": found.step, "trained_on_windows_of": found.seq_len}
        path = args.json if share.rank == 0 else None
        self.record = self._together(lambda: Record(path, identity, about))
        starts_after = self.tokenizer.eos_id if self.tokenizer and self.documents == "reset" else None
        scorer = ModelScorer(found.model, device=device, dtype=DTYPES[args.dtype], starts_after=starts_after)
        self.scorer, self.batch_tokens = scorer, args.batch_tokens or (16384 if device.type == "cuda" else 4096)
        if share.rank == 0:
            where = f"{share.size} x {device.type}" if share.size > 1 else str(device)
            print(f"model: {found.origin}, step {found.step}, {args.dtype} on {where}", file=sys.stderr, flush=True)

    def run(self, sources: Sequence[Named]) -> None:
        """Evaluate all, and print the table. Collective."""
        if self.tokenizer is None and any(source.kind != "tokens" for source in sources):
            raise EvaluationError(
                f"{self.args.model}: its tokenizer was not found beside its data; --tokenizer FILE names it"
            )
        results = [(source.name, self._one(source)) for source in sources]
        if self.share.rank == 0:
            print(table(results), flush=True)

    def _one(self, source: Named) -> dict[str, Any]:
        engine = Engine(self.scorer, self.share, self.batch_tokens, Progress(source.name, self.share.rank == 0))
        if source.kind == "task":
            return self._task(engine, source)
        args = self.args
        if source.kind == "text":
            assert self.tokenizer is not None
            text, digest = text_of_file(source.path, self.tokenizer), sha256_file(source.path)
        else:
            text, digest = text_of_set(source.path, self.documents, self.tokenizer, self.scorer.vocab_size)
            if self.documents == "reset":
                self.scorer.starts_after = text.eos_id
        window = None if args.carry or self.adapt else self.window
        known = {"adapt": str(self.adapt)} if self.adapt else {}
        entry = self._entry(source, sha256=digest, window=window, stride=args.stride, block=self.window, **known)
        how = {"window": window, "stride": args.stride, "block": self.window, "limit": args.limit}
        if self.adapt is None:
            return evaluate_text(engine, text, entry, **how)
        learner = Learner(self.scorer.model, self.adapt)
        try:
            return evaluate_text(engine, text, entry, **how, learner=learner)
        finally:
            learner.restore()  # every text meets the model as it is stored

    def _task(self, engine: Engine, source: Named) -> dict[str, Any]:
        assert self.tokenizer is not None
        delimiter = delimiters_of(self.args).get(source.name)
        with naming(source.path), open(source.path, "rb") as stream:
            task = read_task(stream, source.path, self.args.limit, delimiter)
        window = None if self.args.carry else self.window
        entry = self._entry(source, sha256=sha256_file(source.path), window=window, delimiter=delimiter)
        return evaluate_task(engine, task, entry, self.tokenizer.encode, eos_id=self.tokenizer.eos_id, window=window)

    def _together(self, make: Callable[[], Made]) -> Made:
        """What `make` gives. The first process alone reads the file of results; its refusal is everybody's."""
        try:
            made, error = make(), ""
        except EvaluationError as problem:
            made, error = None, str(problem)
        error = self.share.agree(error)
        if error or made is None:
            raise EvaluationError(error)
        return made

    def _entry(self, source: Named, **identity: Any) -> Source:
        known = {"kind": source.kind, **identity}
        return self._together(lambda: self.record.open(source.name, known, self.args.limit))


if __name__ == "__main__":
    sys.exit(piped(main))
