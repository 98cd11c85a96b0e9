"""Draw and compare the losses of runs: `python -m hope.train.plot RUN ... [--out curves]`.

RUN is a run folder, a metrics.jsonl, or NAME=FOLDER for another name in the legend. Lines are training losses, smoothed
over a pale line of the logged ones; dots are held-out losses. With --matrix, RUN is one run with train.mode=continual:
a row of every source's held-out losses for every border of two phases, and below it what was kept (docs/continual.md).
Exit code 0, or 2 with what is wrong.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw, ImageFont

from data_prep.files import atomic_write
from hope.arguments import finite, whole
from hope.pipe import in_words, piped
from hope.train.plot.chart import chart
from hope.train.plot.curves import NoCurve, Run, read_run, smoothed
from hope.train.plot.matrix import matrix_picture, matrix_table, read_matrix
from hope.train.plot.picture import Dot, Line, Picture, Words

SCALE = 2
"""Pixels of a PNG per unit of the picture; it is painted at twice that and made smaller, so that lines are smooth."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hope.train.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, metrics.jsonl, or NAME=FOLDER")
    parser.add_argument("--out", default="curves", help="FILE.svg, FILE.png, or a name for both (default: curves)")
    parser.add_argument("--smooth", type=whole(), metavar="N", help="mean over about N lines (default: a fiftieth)")
    parser.add_argument("--x", choices=("step", "tokens"), default="step")
    parser.add_argument("--log-x", action="store_true", help="logarithmic horizontal axis")
    parser.add_argument("--from", dest="first", type=finite, default=0, metavar="X", help="leave out what is before")
    parser.add_argument("--key", action="append", help="held-out key (default heldout_loss); may be given again")
    parser.add_argument("--title", default="", help="above the picture")
    parser.add_argument("--matrix", action="store_true", help="losses by phase and source, and what is kept")
    args = parser.parse_args(argv)
    if args.matrix and len(args.runs) > 1:
        parser.error(f"--matrix draws one run, not {len(args.runs)}")
    try:
        if args.matrix:
            matrix = read_matrix(Path(args.runs[0]))
            written = write(matrix_picture(matrix, args.title), args.out)
            print("\n".join([*matrix_table(matrix), f"picture  {'  '.join(map(str, written))}"]))
            return 0
        runs = [_read(word, args.x, args.key or ["heldout_loss"]).after(args.first) for word in args.runs]
        span = args.smooth or max(1, max(len(run.losses) for run in runs) // 50)
        picture = chart(runs, span, args.x, args.log_x, args.title)
        written = write(picture, args.out)
    except (NoCurve, OSError, ValueError) as error:
        print(f"plot error: {in_words(error)}", file=sys.stderr)
        return 2
    print("\n".join([*table(runs, span, args.x), f"picture  {'  '.join(map(str, written))}"]))
    return 0


def _read(word: str, x: str, keys: Sequence[str]) -> Run:
    name, equals, path = word.partition("=")
    named = bool(equals) and not Path(word).exists()
    return read_run(Path(path if named else word), name if named else "", x, keys)


def table(runs: Sequence[Run], span: int, x: str) -> list[str]:
    """A line per run: where it is, its smoothed loss there, its last and its best held-out losses."""
    lines = []
    for run in runs:
        facts = [f"{x} {run.losses[-1][0]:,}  loss {smoothed(run.losses, span)[-1][1]:.4f}"] if run.losses else []
        for key, points in run.heldout.items():
            at, best = min(points, key=lambda point: point[1])
            facts.append(f"{key} {points[-1][1]:.4f}, best {best:.4f} at {x} {at:,}")
        lines.append("  ".join([run.name, *facts]))
    return lines


def write(picture: Picture, out: str) -> list[Path]:
    """The files that `out` names, whole or not at all."""
    path = Path(out)
    kinds = [path.suffix] if path.suffix in (".svg", ".png") else [".svg", ".png"]
    base = path.with_suffix("") if path.suffix in (".svg", ".png") else path
    written = []
    for kind in kinds:
        target = base.with_name(base.name + kind)
        with atomic_write(target) as stream:
            stream.write(picture.svg().encode() if kind == ".svg" else png(picture))
        written.append(target)
    return written


def png(picture: Picture) -> bytes:
    """The picture painted."""
    fine = 2 * SCALE
    image = Image.new("RGB", (picture.width * fine, picture.height * fine), "white")
    draw = ImageDraw.Draw(image, "RGBA")
    for part in picture.parts:
        if isinstance(part, Words):
            font = ImageFont.load_default(part.size * fine)
            anchor = {"start": "ls", "middle": "ms", "end": "rs"}[part.anchor]
            draw.text((part.x * fine, part.y * fine), part.text, part.colour, font, anchor)
        elif isinstance(part, Dot):
            box = [(part.x - part.radius) * fine, (part.y - part.radius) * fine]
            draw.ellipse([*box, *(edge + 2 * part.radius * fine for edge in box)], part.colour)
        else:
            _stroke(draw, part, fine)
    small = image.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, "PNG", optimize=True)
    return content.getvalue()


def _stroke(draw: ImageDraw.ImageDraw, line: Line, fine: int) -> None:
    red, green, blue = ImageColor.getrgb(line.colour)[:3]
    colour = (red, green, blue, round(255 * line.opacity))
    points = [(x * fine, y * fine) for x, y in line.points]
    pieces = _dashes(points, 4.0 * fine) if line.dashed else [points]
    for piece in pieces:
        if len(piece) > 1:
            draw.line(piece, colour, max(1, round(line.width * fine)), "curve")


def _dashes(points: Sequence[tuple[float, float]], length: float) -> list[list[tuple[float, float]]]:
    """Every second stretch of `length` along a line."""
    pieces: list[list[tuple[float, float]]] = []
    gone, drawing = 0.0, True
    piece = list(points[:1])
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        whole = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        at = 0.0
        while whole - at > length - gone:
            at += length - gone
            border = (x0 + (x1 - x0) * at / whole, y0 + (y1 - y0) * at / whole)
            pieces += [[*piece, border]] if drawing else []
            piece, gone, drawing = [border], 0.0, not drawing
        gone += whole - at
        piece.append((x1, y1))
    return pieces + ([piece] if drawing else [])


if __name__ == "__main__":
    sys.exit(piped(main))
