"""`python -m data_prep COMMAND`: from text to token sets, and looking at them; `--help` lists the commands."""

import argparse
import sys

from data_prep.corpora import cli as corpus_cli
from data_prep.errors import DataError
from data_prep.inspection import cli as inspect_cli
from data_prep.paths import reason, user_path
from data_prep.quickstart import quickstart
from data_prep.tokenizing import cli as tokenize_cli
from data_prep.tokenizing import split_cli, tokenizer_cli
from data_prep.training import cli as training_cli
from hope.arguments import whole
from hope.pipe import piped


def build_parser(*, training: bool = True) -> argparse.ArgumentParser:
    """The command line of the package; `training` adds the commands that need torch and megatron-core."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description="Text to Megatron token files.")
    commands = parser.add_subparsers(dest="command", required=True)
    quick = commands.add_parser("quickstart", help="corpus, tokenizer and token files without network")
    quick.add_argument("--out", required=True, type=user_path, help="folder, for example data/quickstart")
    quick.add_argument("--vocab", type=whole(), default=8192, help="tokenizer pieces (default 8192)")
    quick.set_defaults(run=lambda args: quickstart(args.out, args.vocab))
    corpus_cli.add_parser(commands)
    split_cli.add_parser(commands)
    tokenizer_cli.add_parser(commands)
    tokenize_cli.add_parser(commands)
    inspect_cli.add_parsers(commands)
    if training:
        training_cli.add_parsers(commands)
    return parser


def _is_override(word: str) -> bool:
    """`a.b=c`, or a YAML file to merge."""
    return word[0] != "-" and ("=" in word or word.endswith((".yaml", ".yml")))


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 2 data error, 130 interrupted."""
    try:
        args = _parsed(argv)
        args.run(args)
    except BrokenPipeError:  # an OSError, but about the reader of the output
        raise
    except DataError as error:
        print(f"data error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a user's path that nothing below has named
        print(f"data error: {error.filename or 'a file'}: {reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is done", file=sys.stderr)
        return 130
    return 0


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse leaves over what follows an option: `blend run.yaml --tokens 1e9 data.seed=3`
    if rest and not (hasattr(args, "overrides") and all(map(_is_override, rest))):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


if __name__ == "__main__":
    sys.exit(piped(main))
