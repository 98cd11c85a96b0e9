"""`python -m data_prep split`."""

import argparse

from data_prep.paths import user_path
from data_prep.tokenizing.inputs import INPUT_HELP, input_files
from data_prep.tokenizing.records import Rules
from data_prep.tokenizing.split import SIDES, split_files
from data_prep.tokenizing.units import FORMATS
from hope.arguments import finite

SHARE = 0.01


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("split", help="your own text to OUT/train.jsonl and OUT/heldout.jsonl")
    parser.add_argument("--input", required=True, nargs="+", type=user_path, help=INPUT_HELP)
    parser.add_argument("--out", required=True, type=user_path, help="folder, for example data/mine")
    parser.add_argument("--heldout", type=finite, default=SHARE, help="share of the documents held out (default 0.01)")
    parser.add_argument("--format", choices=FORMATS, default="auto", help="as for `tokenize`")
    parser.add_argument("--text-key", default="text", help="field with the text (default text), or a.b inside a")
    parser.add_argument("--on-bad", choices=["stop", "skip", "replace"], default="stop", help="as for `tokenize`")
    parser.add_argument("--hook", default="", help="as for `tokenize`")
    parser.add_argument("--licence", default="", help="of text whose corpus does not state one")
    parser.set_defaults(run=_split)


def _split(args: argparse.Namespace) -> None:
    rules = Rules(text_key=args.text_key, on_bad=args.on_bad, hook=args.hook, format=args.format)
    manifest = split_files(input_files(args.input), args.out, args.heldout, rules, args.licence)
    for name in SIDES:
        record = manifest["files"][name]
        size = f"{record['documents']:,} documents, {record['bytes'] / 1e6:.2f} MB of text"
        print(f"split      {args.out}/{name}: {size}")
    if manifest["bad"]:
        counts = ", ".join(f"{kind} {count}" for kind, count in manifest["bad"].items())
        print(f"bad        {counts}; listed in {args.out}/split.bad.jsonl")
