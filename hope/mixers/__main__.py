"""Every registered mixer: `python -m hope.mixers [--width D] [--heads H] [--seq T] [--import MODULE ...]`.

For one layer of that size, per mixer and published kind of it: parameters, bytes that one sequence of T tokens carries
on (bf16 weights; memories are fp32), FLOPs per token (forward) with the share of memory writes, and the paper. Nothing
is allocated. `--import` takes modules that register mixers of your own (docs/extending.md).

Exit codes: 0 done, 2 a size or module that cannot work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch

from hope.arguments import count
from hope.config import import_modules
from hope.mixers import MIXERS, Trunk
from hope.pipe import piped
from hope.sections import MixerSection

MOST = 2**24
"""Of tokens and widths: shapes of a few such sizes can still be counted."""
Row = tuple[str, ...]
TITLES: Row = ("mixer", "parameters", "state bytes", "FLOPs/token", "writes", "paper")


def sections() -> Iterator[tuple[str, str, MixerSection]]:
    """(mixer, name to print, section) of every mixer with its defaults, or of its published kinds."""
    for name, kind in MIXERS.items():
        section = kind.section()
        for own, of_kind in (section.kinds() or {"": section}).items():
            yield name, f"{name} {own}".strip(), of_kind


def row(name: str, shown: str, section: MixerSection, trunk: Trunk, length: int) -> Row:
    """The line of a mixer in one layer of `trunk` after `length` tokens."""
    with torch.device("meta"), torch.no_grad():
        layer = MIXERS[name].build(trunk, section).bfloat16()
        _, state = layer(torch.zeros(length, 1, trunk.width, dtype=torch.bfloat16))
    flops = layer.flops(length)
    return (
        shown,
        f"{sum(p.numel() for p in layer.parameters()):,}",
        f"{0 if state is None else state.nbytes():,}",
        f"{flops.forward:,.0f}",
        f"{flops.writes / flops.forward:.0%}",
        section.paper(),
    )


def table(rows: Sequence[Row]) -> str:
    """Aligned text: names and papers to the left, numbers to the right."""
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(TITLES))]
    side = ("<", ">", ">", ">", ">", "<")
    line = lambda cells: "  ".join(f"{c:{s}{w}}" for c, s, w in zip(cells, side, widths, strict=True)).rstrip()
    return "\n".join(map(line, rows))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m hope.mixers", description=__doc__.partition("\n\n")[2])
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--width", type=count, default=1024, metavar="D", help="of the model (default 1024)")
    made.add_argument("--heads", type=count, default=16, metavar="H", help="default 16")
    made.add_argument("--seq", type=count, default=4096, metavar="T", help="tokens (default 4096)")
    made.add_argument("--import", nargs="+", default=[], metavar="MODULE", dest="modules", help="of your own")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    sizes = (args.width, args.heads, args.seq)
    if min(sizes) < 1 or max(sizes) > MOST or args.width % args.heads:
        given = f"--width {args.width} --heads {args.heads} --seq {args.seq}"
        wanted = f"numbers from 1 to {MOST:,}, and heads that divide the width: 1024 and 16"
        print(f"{given}: wanted are {wanted}", file=sys.stderr)
        return 2
    try:
        import_modules(args.modules)
    except Exception as error:  # whatever a user's module raises
        what = f"cannot import {' '.join(args.modules)}: {type(error).__name__}: {error}"
        print(f"--import: {what}; modules that are installed or in this folder work, without .py", file=sys.stderr)
        return 2
    trunk, rows = Trunk(args.width, args.heads, 1), [TITLES]
    for name, shown, section in sections():
        if problem := next(section.problems(f"model.mixers.{name}", trunk.head_dim), None):
            rows.append((shown, "", "", "", "", f"not at this size: {problem.what}"))
            continue
        try:
            rows.append(row(name, shown, section, trunk, args.seq))
        except RuntimeError as error:  # of torch: a shape with more than 2^63 bytes; the others are still told
            rows.append((shown, "", "", "", "", f"not at this size: {str(error).splitlines()[0]}"))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
