"""The command line of pretrain_hope.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hope.arguments import count


def arguments(argv: Sequence[str] | None, about: str | None) -> argparse.Namespace:
    """config, overrides, dry_run and devices (None or at least 1). `about`: for --help. Exits with 2 on misuse."""
    parser = argparse.ArgumentParser(
        prog="pretrain_hope.py", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", help="section.key=value, or YAML files, the last one winning")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, and stop")
    parser.add_argument("--devices", type=count, metavar="N", help="with --dry-run: as if started on N devices")
    args = parser.parse_intermixed_args(argv)
    if args.devices is not None and (args.devices < 1 or not args.dry_run):
        parser.error(
            "--devices N, at least 1, goes with --dry-run; a run counts the processes that its launcher started"
        )
    return args
