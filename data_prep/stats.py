"""What a token set holds: a table, and a picture of document lengths as PNG."""

import struct
import zlib
from pathlib import Path

import numpy as np

from data_prep.files import atomic_write
from data_prep.indexed import Header
from data_prep.manifest import Manifest, length_histogram, open_checked

QUANTILES = (0, 10, 50, 90, 99, 100)
_BAR, _GAP, _HEIGHT, _MARGIN, _SCALE = 36, 8, 200, 24, 2
_INK, _FILL, _PAPER = (40, 40, 40), (70, 110, 170), (255, 255, 255)
# 3 x 5 pixels per sign, rows from top to bottom, one bit per pixel
_GLYPHS = {
    "0": "75557",
    "1": "26227",
    "2": "71747",
    "3": "71717",
    "4": "55711",
    "5": "74717",
    "6": "74757",
    "7": "71111",
    "8": "75757",
    "9": "75717",
    "k": "55655",
    "M": "57555",
    "G": "74557",
}


def table(prefix: str | Path) -> str:
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


def _histogram_lines(header: Header, manifest: Manifest) -> list[str]:
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
    """Write a PNG: documents per power of two of their length; numbers over bars, lower edges under them."""
    header, _ = open_checked(prefix)
    with atomic_write(path) as stream:
        stream.write(png(draw(length_histogram(header.document_lengths))))


def draw(histogram: dict[str, int]) -> np.ndarray:
    """Bars as an image, uint8 [height, width, 3]; all classes from the shortest to the longest are shown."""
    edges = [_lower_edge(name) for name in histogram]
    counts = dict(zip(edges, histogram.values(), strict=True))
    classes, edge = [edges[0]], edges[0]
    while edge < edges[-1]:
        edge = max(2 * edge, 1)
        classes.append(edge)
    width = 2 * _MARGIN + len(classes) * (_BAR + _GAP)
    image = np.full((_HEIGHT + 2 * _MARGIN, width, 3), _PAPER, dtype=np.uint8)
    bottom = _HEIGHT + _MARGIN
    tallest = max(counts.values())
    for number, edge in enumerate(classes):
        left = _MARGIN + number * (_BAR + _GAP)
        count = counts.get(edge, 0)
        top = bottom - max(round(_HEIGHT * count / tallest), 1 if count else 0)
        image[top:bottom, left : left + _BAR] = _FILL
        _write(image, short_number(count) if count else "", left + _BAR // 2, top - 14)
        _write(image, short_number(edge), left + _BAR // 2, bottom + 6)
    image[bottom : bottom + 2, _MARGIN:-_MARGIN] = _INK
    return image


def short_number(value: int) -> str:
    """At most four signs: 999, 16k (of 16384), 3M. Rounded down to thousands, so 1024 is 1k."""
    for size, sign in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value // size}{sign}"
    return str(value)


def _write(image: np.ndarray, text: str, middle: int, top: int) -> None:
    left = middle - 2 * len(text) * _SCALE
    for sign in text:
        rows = [[int(bit) for bit in f"{int(digit):03b}"] for digit in _GLYPHS[sign]]
        pixels = np.kron(np.array(rows, dtype=bool), np.ones((_SCALE, _SCALE), dtype=bool))
        area = image[top : top + pixels.shape[0], left : left + pixels.shape[1]]
        area[pixels] = _INK
        left += 4 * _SCALE


def png(image: np.ndarray) -> bytes:
    """Encode uint8 [height, width, 3] as PNG (ISO/IEC 15948): 8-bit RGB, no filter, no interlace."""
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # every row begins with its filter, 0 = none
    rows[:, 1:] = image.reshape(height, 3 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
