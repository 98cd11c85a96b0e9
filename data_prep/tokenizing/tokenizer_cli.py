"""`python -m data_prep tokenizer train | info`."""

import argparse
import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from data_prep.errors import DataError
from data_prep.paths import user_path
from data_prep.tokenizing.bad import nothing_left
from data_prep.tokenizing.inputs import INPUT_HELP, input_files
from data_prep.tokenizing.records import RecordReader, Rules
from data_prep.tokenizing.tokenizer import PROBES, Tokenizer, train_tokenizer
from data_prep.tokenizing.units import FORMATS, plan
from hope.arguments import finite, whole


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command with its two actions."""
    tokenizer = commands.add_parser("tokenizer", help="train or describe a tokenizer")
    actions = tokenizer.add_subparsers(dest="action", required=True)
    train = actions.add_parser("train", help="sentencepiece with byte fallback and exact round trip")
    train.add_argument("--input", required=True, nargs="+", type=user_path, help=INPUT_HELP)
    train.add_argument("--out", required=True, type=user_path, help="model file")
    train.add_argument("--vocab", type=whole(), default=8192, help="pieces (default 8192; to 65499: 2 bytes each)")
    train.add_argument(
        "--type",
        choices=["bpe", "unigram"],
        default="bpe",
        help="bpe (default) trains about 19 times as fast, unigram encodes about 3 times as fast",
    )
    train.add_argument("--sample-mb", type=finite, help="train on an even selection: this many MB of the files' bytes")
    train.add_argument("--format", choices=FORMATS, default="auto", help="as for `tokenize`")
    train.add_argument("--text-key", default="text", help="field with the text (default text), or a.b inside a")
    train.add_argument("--on-bad", choices=["stop", "skip", "replace"], default="stop", help="as for `tokenize`")
    train.set_defaults(run=_train)
    info = actions.add_parser("info", help="vocabulary, special tokens, digest, round trip")
    info.add_argument("model", nargs="?", type=user_path, help="any sentencepiece model, or a tokenizer.json")
    info.add_argument("--model", dest="model_option", type=user_path, help="the same")
    info.set_defaults(run=_info)


def _train(args: argparse.Namespace) -> None:
    bad: dict[str, int] = {}
    inputs = input_files(args.input)
    texts: Iterable[str] = texts_of(inputs, Rules(args.text_key, args.on_bad, format=args.format), bad)
    if args.sample_mb is not None:
        total = sum(Path(path).stat().st_size for path in inputs if Path(path).is_file())
        texts = even_selection(texts, args.sample_mb * 1e6 / max(total, 1))
    started = time.monotonic()
    tokenizer = train_tokenizer(texts, args.vocab, args.out, args.type)
    counts = "".join(f"; {count} {kind}" for kind, count in bad.items())
    print(f"trained    {args.type} in {time.monotonic() - started:.1f} s{counts}")
    _describe(args.out, tokenizer)


def texts_of(paths: Iterable[str], rules: Rules, bad: dict[str, int]) -> Iterator[str]:
    """The texts that `tokenize` makes documents of, in order; bad records are counted into `bad` by kind.

    Raises:
        DataError: a missing or damaged file, a bad record under on_bad = "stop", or no text at all.
    """
    units = plan(paths, rules.format, 1 << 62)  # byte ranges are for processes; here every file is one
    tallies, given = [], False
    for unit in units:
        reader = RecordReader(unit, rules, None)
        for text in reader.texts():
            given = True
            yield text.text
        tallies.append(asdict(reader.tally))
        for kind, count in reader.tally.bad.items():
            bad[kind] = bad.get(kind, 0) + count
    if not given:
        raise DataError(nothing_left(units, rules, tallies))


def even_selection(texts: Iterable[str], share: float) -> Iterator[str]:
    """About `share` of the texts, chosen by their hash: the same ones wherever they stand."""
    for text in texts:
        digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        if int.from_bytes(digest[:8], "big") < share * 2**64:
            yield text


def _info(args: argparse.Namespace) -> None:
    path = args.model or args.model_option
    if not path:
        raise DataError("tokenizer info: no model; `tokenizer info PATH` works")
    _describe(path, Tokenizer.load(path))


def _describe(path: str, tokenizer: Tokenizer) -> None:
    changed = tokenizer.failures(PROBES)
    print(
        f"tokenizer  {path}: {tokenizer.vocab_size} pieces, eos {tokenizer.eos_id}, pad {tokenizer.pad_id},"
        f" sha256 {tokenizer.sha256}"
        + (f"; {len(changed)} of {len(PROBES)} probe texts do not come back exactly: {changed}" if changed else "")
    )
