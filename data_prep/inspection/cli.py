"""`python -m data_prep verify`, `stats`, `inspect` and `manifest`."""

import argparse

from data_prep.config import DOCUMENTS, DataConfig
from data_prep.errors import DataError
from data_prep.inspection.stats import picture, token_set_table
from data_prep.inspection.tokens import show_document, show_window
from data_prep.inspection.verify import adopt, problems
from data_prep.manifest import load_manifest
from data_prep.paths import token_prefix, user_path
from data_prep.tokenizing.tokenizer import Tokenizer
from hope.arguments import LARGEST, whole


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands that look at finished token sets."""
    verify = commands.add_parser("verify", help="read everything again and compare all digests; exit 2 if wrong")
    verify.add_argument("prefix", nargs="+", type=token_prefix)
    verify.add_argument("--tokenizer", default="", type=user_path, help="also compare with this model")
    verify.add_argument("--sources", action="store_true", help="also compare the input files")
    verify.set_defaults(run=_verify)
    stats = commands.add_parser("stats", help="counts, quantiles, histogram of document lengths")
    stats.add_argument("prefix", nargs="+", type=token_prefix)
    stats.add_argument("--png", default="", type=user_path, help="write the histogram as a picture (one prefix)")
    stats.set_defaults(run=_stats)
    look = commands.add_parser("inspect", help="decode a document, a window in file order, or a training sample")
    look.add_argument(
        "prefix", type=token_prefix, help="of a token set, a raw folder, or with --sample a run's YAML file"
    )
    look.add_argument("overrides", nargs="*", help="with a YAML file, the run's section.key=value")
    which = look.add_mutually_exclusive_group(required=True)
    which.add_argument("--document", type=whole(0, LARGEST), help="number from 0")
    which.add_argument("--window", type=whole(0, LARGEST), help="number from 0 in file order, as held-out text is read")
    which.add_argument(
        "--sample",
        type=whole(0, LARGEST),
        help="number from 0 of a training sample, counted over all epochs; step s of a run reads"
        " (s - 1) * train.global_batch and the following ones",
    )
    look.add_argument("--seq-len", type=whole(), default=256, help="train.seq_len of a prefix (default 256)")
    look.add_argument("--seed", type=whole(0, LARGEST), default=1234, help="data.seed of a prefix (default 1234)")
    look.add_argument("--documents", choices=DOCUMENTS, default="carry", help="data.documents of a prefix")
    look.add_argument("--tokenizer", default="", type=user_path, help="model (default: tokenizer.model beside the set)")
    look.set_defaults(run=_inspect)
    manifest = commands.add_parser("manifest", help="write a manifest for .bin/.idx that another tool made")
    manifest.add_argument("prefix", type=token_prefix)
    manifest.add_argument("--tokenizer", required=True, type=user_path, help="the model that made the tokens")
    manifest.add_argument("--licence", default="")
    manifest.set_defaults(run=_manifest)


def _verify(args: argparse.Namespace) -> None:
    wrong = []
    for prefix in args.prefix:
        found = list(problems(prefix, args.tokenizer, sources=args.sources))
        wrong += found
        if not found:
            manifest = load_manifest(prefix)
            print(f"verified   {prefix}: {manifest.documents} documents, {manifest.tokens} tokens, all digests agree")
    if wrong:
        raise DataError("\n            ".join(wrong))


def _stats(args: argparse.Namespace) -> None:
    if args.png and len(args.prefix) > 1:
        raise DataError(f"stats: --png {args.png} is one picture, but {len(args.prefix)} sets are named; name one")
    print("\n\n".join(token_set_table(prefix) for prefix in args.prefix))
    if args.png:
        picture(args.prefix[0], args.png)
        print(f"picture    {args.png}")


def _inspect(args: argparse.Namespace) -> None:
    is_run = args.prefix.endswith((".yaml", ".yml"))
    if args.overrides and not is_run:
        raise DataError(f"inspect: {args.overrides[0]} goes with a YAML file; --seq-len, --seed, --documents work here")
    if args.document is not None:
        print(show_document(args.prefix, args.document, args.tokenizer))
    elif args.window is not None:
        print(show_window(args.prefix, args.window, args.seq_len, args.documents, args.tokenizer))
    else:
        # training's own reader, so that what is shown is what is trained on; it imports torch and megatron-core
        from data_prep.inspection.run import show_sample
        from data_prep.training.index_build import read_config

        data, seq_len = DataConfig(train=args.prefix, documents=args.documents, seed=args.seed), args.seq_len
        if is_run:
            data, seq_len = read_config(args.prefix, args.overrides, blended=True)
        print(show_sample(data, seq_len, args.sample, args.tokenizer))


def _manifest(args: argparse.Namespace) -> None:
    written = adopt(args.prefix, Tokenizer.load(args.tokenizer), args.licence)
    print(f"manifest   {args.prefix}: {written.documents} documents, {written.tokens} tokens")
