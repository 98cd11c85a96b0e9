"""Text from a trained model: `python -m hope.generate RUN|CHECKPOINT|EXPORT --prompt TEXT --tokens N`.

Of a run the newest sound checkpoint is meant. Without --prompt and --batch the prompt is what comes on standard input.
The text goes to standard output while it grows, all else to standard error. With --batch FILE, one prompt a line or
JSON lines with "prompt", the output is JSON lines {"prompt": ..., "text": ...}.

Under `torchrun --nproc-per-node N` the model is cut over N devices, for models that do not fit one.

Exit codes: 0 done, 2 a request or file that cannot work, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from data_prep.errors import DataError
from data_prep.texts import tokenizer_for
from data_prep.tokenizing.tokenizer import Tokenizer
from hope.adapt.learner import Learner
from hope.adapt.settings import AdaptError, settings_of
from hope.devices import device_of
from hope.generate.errors import GenerationError
from hope.generate.learning import read_and_learn
from hope.generate.loop import Forward, Memory, Sequences, on_one_device, write
from hope.generate.options import DTYPES, check, parser_of, sampling_of
from hope.generate.prompts import checked, read_prompts
from hope.generate.session import Session, identity_of, learner_of, read_session, write_session
from hope.generate.text import Stream, Writer
from hope.model import Model
from hope.pipe import in_words, piped
from hope.pretrained import Pretrained, open_pretrained
from hope.stored.errors import CheckpointError
from parallel.compute.generation import on_tensor_ranks
from parallel.layout.topology import ParallelConfig
from parallel.start import groups, launcher, told
from parallel.start.errors import LaunchError

DONE, REFUSED, INTERRUPTED = 0, 2, 130
LARGE = "--dtype bfloat16, fewer prompts, a smaller --prefill-chunk, or torchrun over several devices takes less"
EXPLAINED = (GenerationError, AdaptError, CheckpointError, DataError, LaunchError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser_of(__doc__).parse_args(argv)
    launch: launcher.Launch | None = None
    met = False
    try:
        launch = launcher.from_environment(os.environ)
        check(args, launch.world_size)
        if launch.world_size == 1:
            _run(args, None)
        else:
            with groups.start(ParallelConfig(tensor=launch.world_size)) as ranks:
                met = True
                _run(args, ranks)
    except BrokenPipeError:  # an OSError, but about the reader of the output
        raise
    except torch.OutOfMemoryError as error:
        told.once(f"generate: {str(error).partition('. ')[0]}; {LARGE}", launch, met, agreed=False)
        return REFUSED
    except EXPLAINED as error:
        told.once(f"generate: {in_words(error)}", launch, met, agreed=isinstance(error, GenerationError))
        return REFUSED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    return DONE


@dataclass(frozen=True)
class _Engine:
    """What computes: a model on one device, or this rank's part of it; and what of the model learns."""

    forward: Forward
    device: torch.device
    speaks: bool
    model: Model
    learner: Learner | None = None


def _run(args: argparse.Namespace, ranks: groups.Ranks | None) -> None:
    """Open, read, continue. `ranks`: of several processes; only the first one reads standard input, and prints."""
    found = _opened(args.model, ranks)
    tokenizer = _tokenizer(args, found)
    prompts = _prompts(args) if ranks is None or ranks.rank == 0 else []
    prompts = prompts if ranks is None else groups.from_first(prompts)
    wanted = DTYPES[args.dtype] if args.dtype else next(found.model.parameters()).dtype
    identity = identity_of(found.model) if args.state_in or args.state_out else ""
    model = found.model.to(wanted).requires_grad_(False)
    if ranks is None:
        device = device_of(args.device, GenerationError)
        engine = _Engine(on_one_device(model.to(device)), device, True, model)
    else:
        engine = _Engine(on_tensor_ranks(model, ranks), ranks.device, ranks.rank == 0, model)
    session = Session(Memory(), [], 0)
    if args.state_in is not None:
        session = read_session(args.state_in, found.model, identity, engine.device)
    settings = settings_of(args, found.model.config, found.seq_len)
    engine = replace(engine, learner=learner_of(session, args.state_in, model, settings))
    if engine.speaks:
        name = args.dtype or str(wanted).removeprefix("torch.")
        where = str(engine.device) if ranks is None else f"{ranks.tp_size} x {engine.device.type}"
        print(f"model: {found.origin}, step {found.step}, {name} on {where}", file=sys.stderr, flush=True)
    after = _continue(args, engine, tokenizer, prompts, session, found.seq_len)
    if args.state_out is not None:
        write_session(args.state_out, after, identity, wanted)
        print(f"state: {args.state_out}, after {after.memory.place:,} tokens", file=sys.stderr)


def _opened(path: str, ranks: groups.Ranks | None) -> Pretrained:
    """The model of `path`. What the first process takes is what all take: a run that is training may save meanwhile."""
    found = open_pretrained(path)
    if ranks is None or (first := groups.from_first(found.path)) == found.path:
        return found
    return open_pretrained(first)


def _continue(
    args: argparse.Namespace,
    engine: _Engine,
    tokenizer: Tokenizer,
    prompts: list[str],
    session: Session,
    seq_len: int | None,
) -> Session:
    """Print the text; the session after it, if it is of one sequence."""
    ids = tokenizer.encode_batch(prompts)
    held = session.held if not ids[0] else 0
    streams = [Stream(tokenizer.decode, [*session.tail, *row], held) for row in ids]
    ends = frozenset() if args.ignore_eos else frozenset([tokenizer.eos_id])
    writers = [Writer(stream, args.stop, ends) for stream in streams]
    memory, prompt_ids = session.memory, ids
    if engine.learner is not None:
        memory, prompt_ids = read_and_learn(engine.model, engine.learner, memory, ids[0]), [[]]
        made = ", ".join(f"{count} of {name}" for name, count in engine.learner.updates.items())
        print(f"adapt: updates so far {made}, {engine.learner.gathered} tokens wait", file=sys.stderr, flush=True)
    sequences = Sequences(
        engine.forward,
        prompt_ids,
        sampling_of(args),
        engine.device,
        vocabulary=tokenizer.vocab_size,
        chunk=args.prefill_chunk,
        memory=None if args.state_in is None and engine.learner is None else memory,
    )
    texts = [""] * len(ids)

    def emit(number: int, text: str) -> None:
        texts[number] += text
        if engine.speaks and args.batch is None:
            sys.stdout.write(text)
            sys.stdout.flush()

    read = sum(map(len, prompt_ids)) + len(memory.unread)
    speed = write(sequences, writers, args.tokens, read, emit)
    for number, writer in enumerate(writers):
        emit(number, writer.finish(whole=args.state_out is None))
    if engine.speaks:
        _close(args, prompts, texts)
        longest = session.memory.place + max(len(row) + w.tokens for row, w in zip(ids, writers, strict=True))
        if seq_len is not None and longest > seq_len:
            print(f"note: {longest:,} tokens, the training windows had {seq_len:,}", file=sys.stderr)
        print(speed, file=sys.stderr, flush=True)
    learned = None if engine.learner is None else engine.learner.learned()
    return Session(sequences.memory(), *streams[0].tail(), learned) if len(ids) == 1 else session


def _close(args: argparse.Namespace, prompts: list[str], texts: list[str]) -> None:
    if args.batch is None:
        print(flush=True)
        return
    for prompt, text in zip(prompts, texts, strict=True):
        print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.batch is not None:
        return read_prompts(args.batch)
    if args.prompt is not None:
        return [checked(args.prompt, "--prompt")]
    if sys.stdin.isatty():
        print("the prompt, ended by Ctrl-D:", file=sys.stderr)
    try:
        text = checked(sys.stdin.read().removesuffix("\n"), "standard input")  # what `echo` adds is not meant
    except UnicodeDecodeError as error:
        raise GenerationError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text and args.state_in is None:
        raise GenerationError("standard input is empty; give a prompt there, with --prompt, or with --batch")
    return [text]


def _tokenizer(args: argparse.Namespace, found: Pretrained) -> Tokenizer:
    tokenizer = tokenizer_for(args.tokenizer or found.tokenizer_path, found.model.config.vocab_size)
    if tokenizer is None:
        raise GenerationError(
            f"{args.model}: its tokenizer was not found beside its data; --tokenizer FILE names the tokenizer.model"
        )
    return tokenizer


if __name__ == "__main__":
    sys.exit(piped(main))
