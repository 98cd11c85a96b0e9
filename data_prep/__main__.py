"""`python -m data_prep quickstart | corpus | tokenizer train | tokenizer info | tokenize`."""

import argparse
import sys
from pathlib import Path

from data_prep.errors import DataError
from data_prep.jsonl import read_texts
from data_prep.quickstart import make_corpus, make_token_set, quickstart
from data_prep.tokenizer import Tokenizer, train_tokenizer


def build_parser() -> argparse.ArgumentParser:
    """The command line of the package."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description="Text to Megatron token files.")
    commands = parser.add_subparsers(dest="command", required=True)

    quick = commands.add_parser("quickstart", help="corpus, tokenizer and token files without network")
    quick.add_argument("--out", required=True, help="folder, for example data/quickstart")
    quick.add_argument("--vocab", type=int, default=8192, help="tokenizer pieces (default 8192)")
    quick.set_defaults(run=lambda args: quickstart(args.out, args.vocab))

    corpus = commands.add_parser("corpus", help="only the quick-start text (train.jsonl, heldout.jsonl)")
    corpus.add_argument("--out", required=True, help="folder")
    corpus.set_defaults(run=lambda args: make_corpus(Path(args.out)))

    tokens = commands.add_parser("tokenize", help="JSON lines to PREFIX.bin, .idx and .manifest.json")
    tokens.add_argument("--input", required=True, help='JSON lines with a string under "text"')
    tokens.add_argument("--tokenizer", required=True, help="sentencepiece model file")
    tokens.add_argument("--out", required=True, help="prefix, for example data/mine/train")
    tokens.set_defaults(run=_tokenize)

    tokenizer = commands.add_parser("tokenizer", help="train or describe a tokenizer")
    actions = tokenizer.add_subparsers(dest="action", required=True)
    train = actions.add_parser("train", help="sentencepiece BPE with byte fallback and exact round trip")
    train.add_argument("--input", required=True, help="JSON lines")
    train.add_argument("--out", required=True, help="model file")
    train.add_argument("--vocab", type=int, default=8192)
    train.set_defaults(run=_train)
    info = actions.add_parser("info", help="vocabulary, special tokens, digest")
    info.add_argument("model")
    info.set_defaults(run=_info)
    return parser


def _tokenize(args: argparse.Namespace) -> None:
    make_token_set(Path(args.input), Tokenizer.load(args.tokenizer), Path(args.out))


def _train(args: argparse.Namespace) -> None:
    _describe(args.out, train_tokenizer(read_texts(args.input), args.vocab, args.out))


def _info(args: argparse.Namespace) -> None:
    _describe(args.model, Tokenizer.load(args.model))


def _describe(path: str, tokenizer: Tokenizer) -> None:
    print(
        f"tokenizer  {path}: {tokenizer.vocab_size} pieces, eos {tokenizer.eos_id}, pad {tokenizer.pad_id},"
        f" sha256 {tokenizer.sha256}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 data error)."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except DataError as error:
        print(f"data error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
