"""Document boundaries inside packed rows, and where a call's tokens lie in the chunks of the memory.

A memory's chunks are counted from the start of its document. Packed rows are therefore laid out anew before the chunk
loop: every document begins at a chunk boundary and the gap before it is padding that neither writes nor forgets. The
result for a document is then the same function as for that document alone.

A call may end inside a chunk. The state that it returns is the one at the last chunk boundary, together with the tokens
since then (pending). The next call puts them in front of its own, so that any cutting of a sequence into calls gives
what one call gives. Shapes: B sequences, T new tokens, P slots for pending tokens, E = P + T, L padded length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Pending:
    """Tokens since the last chunk boundary, before this call: `slots` per row, of which the first `count` [B] are real
    (None: all of them)."""

    slots: int = 0
    count: Tensor | None = None

    def without(self, rows: Tensor) -> "Pending":
        """Nothing pending where rows [B] is true."""
        count = torch.full_like(rows, self.slots, dtype=torch.long) if self.count is None else self.count
        return Pending(self.slots, count.masked_fill(rows, 0))


NO_PENDING = Pending()


@dataclass(frozen=True)
class ChunkLayout:
    """Where each of E pending and new tokens lies once every document starts at a multiple of the window.

    position: [B, T] index into L of every new token (None: it lies where it is, behind the pending ones).
    source: [B, L] index into E, or E for padding (None: the identity, padded at the end).
    valid: [B, L] false at padding (None: no padding at all).
    resets: [B, L / window] true where the window begins a document (None: nowhere).
    partial: for every window the rows [B] whose last chunk it holds incomplete, None if there are none, or True if all
        rows; what is written in it is not kept.
    tail: [B, window - 1] index into E, or E, of the tokens in that last chunk (None: the last `left.slots` of E).
    left: the pending tokens after this call.
    """

    slots: int
    length: int
    padded: int
    position: Tensor | None
    source: Tensor | None
    valid: Tensor | None
    resets: Tensor | None
    partial: tuple[Tensor | bool | None, ...]
    tail: Tensor | None
    left: Pending

    def spread(self, x: Tensor) -> Tensor:
        """[B, H, E, K] -> [B, H, L, K], zeros at padding."""
        if self.source is None:
            short = self.padded - x.shape[2]
            return F.pad(x, (0, 0, 0, short)) if short else x
        return _gather(x, self.source)

    def collect(self, y: Tensor) -> Tensor:
        """[B, H, L, K] -> [B, H, T, K]: the new tokens."""
        if self.position is None:
            return y[:, :, self.slots : self.slots + self.length]
        index = self.position[:, None, :, None].expand(-1, y.shape[1], -1, y.shape[3])
        return y.gather(2, index)

    def remaining(self, x: Tensor) -> Tensor:
        """[B, H, E, K] -> [B, H, P', K]: the tokens that are pending after this call."""
        if self.tail is None:
            return x[:, :, x.shape[2] - self.left.slots :]
        return _gather(x, self.tail)


def _gather(x: Tensor, source: Tensor) -> Tensor:
    """Rows `source` [B, N] of x [B, H, E, K], zeros where it says E."""
    index = source[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return F.pad(x, (0, 0, 0, 1)).gather(2, index)


def plain_layout(
    batch: int, length: int, window: int, device: torch.device, pending: Pending = NO_PENDING
) -> ChunkLayout:
    """One document per row, continued from `pending`: padding only at the end, to a whole window."""
    if pending.count is not None:
        return Documents(torch.zeros(length, batch, dtype=torch.bool, device=device)).layout(window, pending)
    real = pending.slots + length
    windows, rest = -(-real // window), real % window
    padded = windows * window
    valid = (torch.arange(padded, device=device) < real).expand(batch, padded) if rest else None
    partial = (*[None] * (windows - 1), True if rest else None)
    return ChunkLayout(pending.slots, length, padded, None, None, valid, None, partial, None, Pending(rest))


def layout_of(x_TBD: Tensor, documents: "Documents | None", window: int, pending: Pending = NO_PENDING) -> ChunkLayout:
    """The chunks of a call with the activations `x_TBD`; without documents it is one per row, continued."""
    if documents is not None:
        return documents.layout(window, pending)
    length, batch, _ = x_TBD.shape
    return plain_layout(batch, length, window, x_TBD.device, pending)


class Documents:
    """The documents of one batch, from `starts` [T, B]: true at each document's first token.

    A row whose first token is no start continues the state that is handed in.
    """

    def __init__(self, starts: Tensor) -> None:
        self.segment_BT = starts.T.long().cumsum(-1)
        self._layouts: dict[int, ChunkLayout] = {}

    def same(self, taps: int) -> Tensor:
        """[taps-1, T, B]: does the token `lag` = 1, 2, ... steps back (maybe before the row) share the document?"""
        segment = F.pad(self.segment_BT, (taps - 1, 0)).T
        length = self.segment_BT.shape[1]
        lags = range(1, taps)
        return torch.stack([segment[taps - 1 :] == segment[taps - 1 - j : taps - 1 - j + length] for j in lags])

    def open_at_end(self, past: int) -> Tensor:
        """[past + T, B]: does this token, or one of the `past` before the row, belong to the row's last document?"""
        segment = F.pad(self.segment_BT, (past, 0))
        return (segment == segment[:, -1:]).T

    def attention_mask(self) -> Tensor:
        """[B, 1, T, T], true where query t may see key s: causal and in the same document."""
        segment = self.segment_BT
        same = segment.unsqueeze(-1) == segment.unsqueeze(-2)
        return same.tril().unsqueeze(1)

    def layout(self, window: int, pending: Pending = NO_PENDING) -> ChunkLayout:
        """The chunks of this call. Without pending tokens it is made once per window size."""
        if pending.slots:
            return self._build(window, pending)
        if window not in self._layouts:
            self._layouts[window] = self._build(window, pending)
        return self._layouts[window]

    def _build(self, window: int, pending: Pending) -> ChunkLayout:
        segment, present = self._with_pending(pending)
        batch, extended = segment.shape
        sizes = torch.zeros(batch, extended + 1, dtype=torch.long, device=segment.device)
        sizes.scatter_add_(1, segment, present.long())
        room = -(-sizes // window) * window
        begin_padded, begin = room.cumsum(1) - room, sizes.cumsum(1) - sizes
        rank = present.long().cumsum(1) - 1 - begin.gather(1, segment)
        position = begin_padded.gather(1, segment) + rank
        padded = int(room.sum(1).max())
        source = torch.full((batch, padded + 1), extended, dtype=torch.long, device=segment.device)
        where = torch.arange(extended, device=segment.device).expand(batch, extended)
        source.scatter_(1, position.where(present, padded), where)  # absent tokens go to a column that is cut off
        source = source[:, :padded]
        first = present & (segment > 0) & (rank == 0)
        resets = torch.zeros(batch, padded // window, dtype=torch.bool, device=segment.device)
        rows, columns = first.nonzero(as_tuple=True)
        resets[rows, position[rows, columns] // window] = True
        last = segment[:, -1:]
        return ChunkLayout(
            pending.slots,
            extended - pending.slots,
            padded,
            position[:, pending.slots :],
            source,
            source < extended,
            resets,
            *_unfinished(sizes.gather(1, last), begin_padded.gather(1, last), source, window, extended),
        )

    def _with_pending(self, pending: Pending) -> tuple[Tensor, Tensor]:
        """(document number, whether there is a token) of E places [B, E]. A row that begins with a document has no use
        for what was pending."""
        segment = self.segment_BT
        if not pending.slots:
            return segment, torch.ones_like(segment, dtype=torch.bool)
        slot = torch.arange(pending.slots, device=segment.device)
        count = slot.new_full((segment.shape[0],), pending.slots) if pending.count is None else pending.count
        carried = (slot < count.unsqueeze(1)) & (segment[:, :1] == 0)
        return F.pad(segment, (pending.slots, 0)), torch.cat([carried, torch.ones_like(segment, dtype=torch.bool)], 1)


def _unfinished(
    size: Tensor, begin: Tensor, source: Tensor, window: int, nothing: int
) -> tuple[tuple[Tensor | bool | None, ...], Tensor, Pending]:
    """`partial`, `tail` and `left` of a layout, from length and beginning [B, 1] of every row's last document."""
    rest = size % window
    index = (begin + size - rest) // window
    windows = torch.arange(source.shape[1] // window, device=source.device)
    rows = (windows == index) & (rest > 0)
    held = rows.any(0).tolist()
    partial = tuple(column if any_row else None for column, any_row in zip(rows.unbind(1), held, strict=True))
    slot = torch.arange(window - 1, device=source.device)
    place = (index * window + slot).clamp(max=source.shape[1] - 1)
    tail = source.gather(1, place).where(slot < rest, nothing)
    return partial, tail, Pending(window - 1, rest.squeeze(1))


def of_open_document(latest: Tensor, documents: Documents | None) -> Tensor:
    """`latest` [N, B, D], values of the N tokens before the next call (some may be older than this one), zero where the
    token does not belong to the row's last document: the next call must not see it."""
    if documents is None:
        return latest
    count = latest.shape[0]
    open_at_end = documents.open_at_end(count)
    return latest * open_at_end[open_at_end.shape[0] - count :].unsqueeze(-1)
