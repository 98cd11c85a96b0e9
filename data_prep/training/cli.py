"""`python -m data_prep blend CONFIG --tokens N` and `python -m data_prep index CONFIG`.

What the commands need is imported when they run. It brings torch and megatron-core, which take seconds, and
`tokenize` in the same program needs neither.
"""

import argparse

from data_prep.paths import user_path


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to `commands`, what ArgumentParser.add_subparsers() gave; each sets `run`."""
    blend = commands.add_parser("blend", help="tokens, epochs and first order per source for a token budget")
    index = commands.add_parser("index", help="check the data and build the indices that training maps into memory")
    for parser in (blend, index):
        parser.add_argument("config", type=user_path, help="the run's YAML file")
        parser.add_argument("overrides", nargs="*", help="the run's section.key=value, and YAML files to merge")
    blend.add_argument("--tokens", type=_count, required=True, help="training tokens, such as 3e9")
    blend.set_defaults(run=_blend)
    index.set_defaults(run=_index)


def _count(word: str) -> int:
    try:
        count = int(float(word.replace("_", "")))
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{word} is not a number of tokens; try 1e9")
    return count


def _blend(args: argparse.Namespace) -> None:
    from data_prep.training.blend_preview import preview
    from data_prep.training.index_build import read_config

    for line in preview(*read_config(args.config, args.overrides, blended=True), args.tokens):
        print(line)


def _index(args: argparse.Namespace) -> None:
    from data_prep.training.index_build import build_indices, read_config

    for line in build_indices(*read_config(args.config, args.overrides)):
        print(line, flush=True)
