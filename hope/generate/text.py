"""Text as it grows, token by token: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""The text of token ids."""

UNFINISHED = "\ufffd"
"""What a decoder shows of bytes that are no character, or not yet."""
LONGEST = 4
"""Bytes of a character."""
CONTEXT = 8
"""Tokens before the new ones that are decoded with them: some tokenizers drop the first space of a text."""


class Stream:
    """Ids in, text out. `push` gives the text since the last call, once its last character is whole.

    Args:
        before: ids in front of the first new one, whose text is known. The last few of them are enough.
        held: of these the last ones, whose text was held back.
    """

    def __init__(self, decode: Decode, before: Sequence[int] = (), held: int = 0) -> None:
        self._decode, self._ids = decode, list(before)
        self._shown = len(before) - held
        del self._ids[: max(0, self._shown - CONTEXT)]
        self._shown = min(self._shown, CONTEXT)

    def push(self, token: int) -> str:
        """The text that is known for certain now."""
        self._ids.append(token)
        text = self._new()
        if not text.endswith(UNFINISHED):
            return self._show(len(self._ids), text)
        # bytes that are no character and never will be: all but the last three, which the next one may complete
        known = len(self._ids) - LONGEST + 1
        if known - self._shown > LONGEST:
            sure = self._decode(self._ids[:known])[len(self._decode(self._ids[: self._shown])) :]
            if text.startswith(sure):
                return self._show(known, sure)
        return ""

    def _show(self, known: int, text: str) -> str:
        """`text` of the ids up to `known`, which are from now on the context of what follows."""
        del self._ids[: self._shown]
        self._shown = known - self._shown
        return text

    def finish(self) -> str:
        """What was held back, as it is."""
        text = self._new()
        self._shown = len(self._ids)
        return text

    def tail(self) -> tuple[list[int], int]:
        """`before` and `held` of a stream that goes on from here."""
        return list(self._ids), len(self._ids) - self._shown

    def _new(self) -> str:
        known = self._decode(self._ids[: self._shown])
        return self._decode(self._ids)[len(known) :]


class Writer:
    """The text of one sequence until it ends: at an id of `ends`, or before one of the `stops`.

    Attributes:
        ended: whether it has.
        tokens: ids so far, with the one that ended it.
    """

    def __init__(self, stream: Stream, stops: Sequence[str] = (), ends: frozenset[int] = frozenset()) -> None:
        self._stream, self._stops, self._ends = stream, [stop for stop in stops if stop], ends
        self._waiting = ""
        self.ended, self.tokens = False, 0

    def push(self, token: int) -> str:
        """The text to show after this token. What may become a stop string waits."""
        self.tokens += 1
        if token in self._ends:
            self.ended = True
            return ""
        self._waiting += self._stream.push(token)
        found = [place for stop in self._stops if (place := self._waiting.find(stop)) >= 0]
        if found:
            self.ended = True
            shown, self._waiting = self._waiting[: min(found)], ""
            return shown
        keep = max((_overlap(self._waiting, stop) for stop in self._stops), default=0)
        cut = len(self._waiting) - keep
        shown, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return shown

    def finish(self, *, whole: bool = True) -> str:
        """What has waited. whole: also bytes of a character that never became whole."""
        text, self._waiting = self._waiting, ""
        return text + (self._stream.finish() if whole else "")


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that may be the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
