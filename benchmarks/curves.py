"""Draw loss curves of runs as an SVG picture: `python benchmarks/curves.py OUT.svg LABEL=RUN_FOLDER ...`.

Thin lines: training loss of each logged step; dots: held-out loss. Reads metrics.jsonl of every folder.
"""

import argparse
import sys
from pathlib import Path
from xml.sax.saxutils import escape

from kept import keep_text

from hope.pipe import piped
from hope.train.plot.curves import NoCurve, points, records_of
from hope.train.plot.picture import Axis, short

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 60, 190, 20, 45
COLOURS = ["#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#bf8700", "#57606a", "#bf3989", "#0a3069"]


def series(folder: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(training, held-out) points (step, nats) of one run."""
    records = records_of(folder)
    return points(records, "step", "loss"), points(records, "step", "heldout_loss")


def draw(runs: dict[str, Path]) -> str:
    """The picture. Raises NoCurve for a folder that is no run's, or if no run has a loss yet; ValueError: numbers that
    no axis holds."""
    curves = {label: series(folder) for label, folder in runs.items()}
    if not any(train or held for train, held in curves.values()):
        raise NoCurve(f"no loss in {', '.join(map(str, runs.values()))} yet")
    last = max(1, *(int(step) for train, held in curves.values() for step, _ in train + held))
    values = [loss for train, held in curves.values() for _, loss in train + held]
    low, high = min(values) // 0.5 * 0.5, (max(values) // 0.5 + 1) * 0.5
    across, up = Axis(0, last, LEFT, WIDTH - RIGHT), Axis(low, high, HEIGHT - BOTTOM, TOP)
    x, y = across.at, up.at
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for level in up.marks():
        parts.append(f'<path d="M{LEFT} {y(level):.0f}H{WIDTH - RIGHT}" stroke="#d0d7de"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(level) + 4:.0f}" text-anchor="end">{level:g}</text>')
    for step in across.marks():
        parts.append(f'<text x="{x(step):.0f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(step)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">optimizer step</text>')
    for index, (label, (train, held)) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in train)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1" opacity="0.6"/>')
        parts += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>' for s, v in held]
        final = f"{label}  {held[-1][1]:.3f}" if held else label
        parts.append(
            f'<text x="{WIDTH - RIGHT + 10}" y="{TOP + 20 + 20 * index}" fill="{colour}">{escape(final)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="SVG file")
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN_FOLDER")
    args = parser.parse_args(argv)
    named = (word.partition("=") for word in args.runs)
    try:
        picture = draw({label: Path(folder) for label, _, folder in named})
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    keep_text(args.out, picture)
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
