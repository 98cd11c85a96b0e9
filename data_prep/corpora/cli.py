"""`python -m data_prep corpus`."""

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path

from data_prep.corpora.build import HELDOUT_SHARE, CorpusSource, build
from data_prep.corpora.corpus import LICENCE
from data_prep.corpora.debian_corpus import package_sources
from data_prep.corpora.debian_sources import SOURCES
from data_prep.corpora.library_corpus import LIBRARY, library_sources
from data_prep.corpora.tiers import TIERS, chosen_sources
from data_prep.errors import DataError
from data_prep.paths import user_path
from hope.arguments import finite


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    corpus = commands.add_parser("corpus", help="English text without an account: train.jsonl and heldout.jsonl")
    corpus.add_argument("--out", type=user_path, help="folder")
    corpus.add_argument(
        "--tier",
        choices=list(TIERS),
        default="stdlib",
        help="stdlib (default): Python's own library, no network; quick: about 11 MB and main: about 124 MB from"
        " Debian's documentation packages, one folder per source",
    )
    corpus.add_argument("--sources", default="", help="only these sources, comma-separated, instead of a tier")
    corpus.add_argument("--add", default="", help="sources beside those of the tier, for example anarchism")
    corpus.add_argument("--debs", type=user_path, help="folder that keeps downloaded packages (default OUT/debs)")
    corpus.add_argument("--heldout", type=finite, default=HELDOUT_SHARE, help="share held out (default 0.02)")
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
    if args.tier == "stdlib" and not args.sources and args.add:
        raise DataError("corpus: --add goes with --tier quick or --tier main; --sources names sources alone")
    names = chosen_sources(args.tier, args.sources, args.add)
    parts: Iterable[CorpusSource] = library_sources(name for name in names if name in LIBRARY)
    if packaged := [name for name in names if name in SOURCES]:
        cache = Path(args.debs) if args.debs else Path(args.out, "debs")
        parts = itertools.chain(package_sources(packaged, cache), parts)
    build(args.out, parts, args.heldout)


def source_table() -> str:
    """Every source with its tiers, size and licence."""
    lines = [f"{'source':10} {'tiers':10} {'MB':>5}  {'licence':28} about"]
    rows = [(name, source.megabytes, source.licence, source.about) for name, source in SOURCES.items()]
    rows += [(name, source.megabytes, LICENCE, source.about) for name, source in LIBRARY.items()]
    for name, megabytes, licence, about in rows:
        tiers = ",".join(tier for tier, names in TIERS.items() if name in names) or "-"
        lines.append(f"{name:10} {tiers:10} {megabytes:5.1f}  {licence:28} {about}")
    return "\n".join(lines)
