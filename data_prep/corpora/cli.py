"""`python -m data_prep corpus`."""

import argparse
from pathlib import Path

from data_prep.corpora.build import HELDOUT_SHARE, build
from data_prep.corpora.debian_corpus import package_sources
from data_prep.corpora.debian_sources import SOURCES, TIERS, chosen_sources
from data_prep.errors import DataError
from data_prep.quickstart import make_corpus


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    corpus = commands.add_parser("corpus", help="English text without an account: train.jsonl and heldout.jsonl")
    corpus.add_argument("--out", help="folder")
    corpus.add_argument(
        "--tier",
        choices=["stdlib", *TIERS],
        default="stdlib",
        help="stdlib (default): Python's own library, no network; quick: about 11 MB and main: about 124 MB from"
        " Debian's documentation packages, one folder per source",
    )
    corpus.add_argument("--sources", default="", help="only these sources, comma-separated, instead of a tier")
    corpus.add_argument("--add", default="", help="sources beside those of the tier, for example anarchism")
    corpus.add_argument("--debs", help="folder that keeps downloaded packages (default OUT/debs)")
    corpus.add_argument("--heldout", type=float, default=HELDOUT_SHARE, help="share held out (default 0.02)")
    corpus.add_argument("--list", action="store_true", help="show the sources and end")
    corpus.set_defaults(run=_corpus)


def _corpus(args: argparse.Namespace) -> None:
    if args.list:
        print(source_table())
        return
    if not args.out:
        raise DataError("corpus: --out is not set; --out data/main works")
    if not 0 <= args.heldout < 1:
        raise DataError(f"corpus: --heldout {args.heldout} is not a share; 0.02 works")
    if args.tier == "stdlib" and not args.sources:
        if args.add:
            raise DataError("corpus: --add goes with --tier quick or --tier main; --sources names sources alone")
        make_corpus(Path(args.out))
        return
    names = chosen_sources(args.tier, args.sources, args.add)
    cache = Path(args.debs) if args.debs else Path(args.out, "debs")
    build(args.out, package_sources(names, cache), args.heldout)


def source_table() -> str:
    """Every source with its tiers, size and licence."""
    lines = [f"{'source':10} {'tiers':10} {'MB':>5}  {'licence':28} about"]
    for name, source in SOURCES.items():
        tiers = ",".join(tier for tier, names in TIERS.items() if name in names) or "-"
        lines.append(f"{name:10} {tiers:10} {source.megabytes:5.1f}  {source.licence:28} {source.about}")
    return "\n".join(lines)
