"""The progress line: documents/s, MB/s of input and time left."""

import sys
import time
from typing import TextIO


class Progress:
    """Rewrites one line on a terminal twice a second; elsewhere adds a line every 10 seconds."""

    def __init__(self, total_bytes: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._total = total_bytes
        self._start = self._shown = time.monotonic()
        self._terminal = self._stream.isatty()
        self._bytes = self._documents = self._found = 0
        self._written = False

    def found(self, size: int) -> None:
        """Input bytes whose parts an earlier run has made; they do not count into the rates."""
        self._found += size

    def add(self, size: int, documents: int) -> None:
        """A unit of `size` input bytes has become `documents` documents."""
        self._bytes += size
        self._documents += documents
        now = time.monotonic()
        if now - self._shown >= (0.5 if self._terminal else 10):
            self._shown = now
            self._show(line(self._bytes, self._documents, now - self._start, self._total - self._found))

    def close(self) -> None:
        """End the rewritten line."""
        if self._written and self._terminal:
            self._stream.write("\n")

    def _show(self, text: str) -> None:
        self._written = True
        self._stream.write(f"\r{text}\x1b[K" if self._terminal else f"{text}\n")
        self._stream.flush()


def line(done: int, documents: int, seconds: float, total: int) -> str:
    """The text for `done` of `total` bytes after `seconds`."""
    seconds = max(seconds, 1e-9)
    left = (total - done) * seconds / max(done, 1)
    minutes, rest = divmod(round(left), 60)
    return (
        f"tokenize  {100 * done / max(total, 1):5.1f}%  {documents:,} documents  {documents / seconds:,.0f} documents/s"
        f"  {done / 1e6 / seconds:.2f} MB/s  eta {minutes}m{rest:02d}"
    )
