"""What a token set holds: a table, and a picture of document lengths as PNG."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import DataError
from data_prep.files import atomic_write
from data_prep.indexed import Header
from data_prep.manifest import TokenSetManifest, length_histogram, open_checked

if TYPE_CHECKING:
    from PIL import Image

QUANTILES = (0, 10, 50, 90, 99, 100)
_BAR, _GAP, _HEIGHT, _MARGIN = 36, 8, 200, 24
_INK, _FILL, _PAPER = (40, 40, 40), (70, 110, 170), (255, 255, 255)


def token_set_table(prefix: str | Path) -> str:
    """Counts, shares and quantiles as lines of text; raises DataError if the set cannot be read."""
    header, manifest = open_checked(prefix)
    rows = [
        ("documents", f"{manifest.documents:,}"),
        ("tokens", f"{manifest.tokens:,} ({header.dtype.name})"),
        ("text", f"{manifest.text_bytes / 1e6:,.2f} MB"),
        ("bytes per token", f"{manifest.bytes_per_token:.3f}"),
        ("vocabulary", f"{manifest.vocab_size:,}, EOS {manifest.eos_id}"),
        ("licence", manifest.licence or "not stated"),
        ("sources", ", ".join(source["name"] for source in manifest.sources) or "not recorded"),
        ("bad records", _counts(manifest.bad)),
        ("left out", _counts(manifest.dropped)),
    ]
    quantiles = np.percentile(header.document_lengths, QUANTILES, method="nearest").astype(int)
    for percent, value in zip(QUANTILES, quantiles.tolist(), strict=True):
        rows.append((f"length, {percent}%", f"{value:,} tokens"))
    lines = [f"{name:16} {value}" for name, value in rows]
    return "\n".join([str(prefix), *lines, *_histogram_lines(header, manifest)])


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items() if count) or "none"


def _histogram_lines(header: Header, manifest: TokenSetManifest) -> list[str]:
    histogram = length_histogram(header.document_lengths)
    tallest = max(histogram.values())
    lines = ["tokens from       documents"]
    for name, count in histogram.items():
        bar = "#" * max(round(40 * count / tallest), 1)
        lines.append(f"{_lower_edge(name):>11,} {count:>15,}  {100 * count / manifest.documents:5.1f}%  {bar}")
    return lines


def _lower_edge(name: str) -> int:
    return 0 if name == "0" else 2 ** int(name.removeprefix("2^"))


def picture(prefix: str | Path, path: str | Path) -> None:
    """Write a PNG: documents per power of two of their length, counts over the bars, lower edges under them.

    Raises:
        DataError: the set cannot be read, or `path` does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise DataError(f"stats: --png {path} is not the name of a PNG; {Path(path).with_suffix('.png')} works")
    header, manifest = open_checked(prefix)
    image = draw(length_histogram(header.document_lengths), f"{Path(prefix).name}: {manifest.documents:,} documents")
    with atomic_write(path) as stream:
        image.save(stream, format="PNG")


def draw(histogram: dict[str, int], title: str = "") -> "Image.Image":
    """Bars as an RGB image; every class from the shortest to the longest has its place, empty ones too."""
    from PIL import Image, ImageDraw, ImageFont  # 0.1 s that tokenizing processes need not pay

    edges = [_lower_edge(name) for name in histogram]
    counts = dict(zip(edges, histogram.values(), strict=True))
    classes = [edges[0]]
    while classes[-1] < edges[-1]:
        classes.append(max(2 * classes[-1], 1))
    width, bottom = 2 * _MARGIN + len(classes) * (_BAR + _GAP), _HEIGHT + 2 * _MARGIN
    image = Image.new("RGB", (width, bottom + 2 * _MARGIN), _PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    pen.text((_MARGIN, 6), title, fill=_INK, font=font)
    tallest = max(counts.values())
    for number, edge in enumerate(classes):
        left = _MARGIN + number * (_BAR + _GAP)
        middle, count = left + _BAR // 2, counts.get(edge, 0)
        top = bottom - max(round(_HEIGHT * count / tallest), 1 if count else 0)
        if count:
            pen.rectangle((left, top, left + _BAR - 1, bottom - 1), fill=_FILL)
            pen.text((middle, top - 3), short_number(count), fill=_INK, font=font, anchor="mb")
        pen.text((middle, bottom + 6), short_number(edge, 1024), fill=_INK, font=font, anchor="mt")
    pen.line((_MARGIN, bottom, width - _MARGIN - _GAP, bottom), fill=_INK, width=2)
    pen.text((width // 2, bottom + 26), "tokens from", fill=_INK, font=font, anchor="mt")
    return image


def short_number(value: int, thousand: int = 1000) -> str:
    """Three digits at most and a sign: 999, 1.56k, 19.8k, 3M; with `thousand` 1024, 16384 is 16k."""
    size = 0
    while value >= thousand ** (size + 1):
        size += 1
    return f"{value / thousand**size:.3g}{' kMGT'[size].strip()}"
