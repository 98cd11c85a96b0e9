"""Document boundaries inside packed rows: what they mean for the memory, the convolution and attention.

A memory's chunks are counted from the start of its document. Packed rows are therefore laid out anew before the chunk
loop: every document begins at a chunk boundary and the gap before it is padding that neither writes nor forgets. The
result for a document is then the same function as for that document alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkLayout:
    """Where each token lies once every document starts at a multiple of the window; L = padded length.

    position: [B, T] index into L of every token (None: the identity).
    source: [B, L] index into T, or T for padding (None: the identity, padded at the end).
    valid: [B, L] false at padding (None: no padding at all).
    resets: [B, L / window] true where the window begins a document (None: nowhere).
    """

    length: int
    padded: int
    position: Tensor | None
    source: Tensor | None
    valid: Tensor | None
    resets: Tensor | None

    def spread(self, x: Tensor) -> Tensor:
        """[B, H, T, K] -> [B, H, L, K], zeros at padding."""
        if self.padded == self.length and self.source is None:
            return x
        if self.source is None:
            return torch.nn.functional.pad(x, (0, 0, 0, self.padded - self.length))
        extended = torch.nn.functional.pad(x, (0, 0, 0, 1))
        index = self.source[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return extended.gather(2, index)

    def collect(self, y: Tensor) -> Tensor:
        """[B, H, L, K] -> [B, H, T, K]."""
        if self.position is None:
            return y[:, :, : self.length]
        index = self.position[:, None, :, None].expand(-1, y.shape[1], -1, y.shape[3])
        return y.gather(2, index)


def plain_layout(batch: int, length: int, window: int, device: torch.device) -> ChunkLayout:
    """One document per row: padding only at the end, to a whole window."""
    padded = -(-length // window) * window
    valid = None
    if padded != length:
        valid = (torch.arange(padded, device=device) < length).expand(batch, padded)
    return ChunkLayout(length, padded, None, None, valid, None)


class Documents:
    """The documents of one batch, from `starts` [T, B]: true at each document's first token.

    A row whose first token is no start continues the state that is handed in.
    """

    def __init__(self, starts: Tensor) -> None:
        self.segment_BT = starts.T.long().cumsum(-1)
        self._layouts: dict[int, ChunkLayout] = {}

    def same(self, taps: int) -> Tensor:
        """[taps-1, T, B]: does the token `lag` = 1, 2, ... steps back (maybe before the row) share the document?"""
        segment = torch.nn.functional.pad(self.segment_BT, (taps - 1, 0)).T
        length = self.segment_BT.shape[1]
        lags = range(1, taps)
        return torch.stack([segment[taps - 1 :] == segment[taps - 1 - j : taps - 1 - j + length] for j in lags])

    def attention_mask(self) -> Tensor:
        """[B, 1, T, T], true where query t may see key s: causal and in the same document."""
        segment = self.segment_BT
        same = segment.unsqueeze(-1) == segment.unsqueeze(-2)
        return same.tril().unsqueeze(1)

    def layout(self, window: int) -> ChunkLayout:
        if window not in self._layouts:
            self._layouts[window] = self._build(window)
        return self._layouts[window]

    def _build(self, window: int) -> ChunkLayout:
        segment = self.segment_BT
        batch, length = segment.shape
        time = torch.arange(length, device=segment.device).expand(batch, length)
        sizes = torch.zeros(batch, length + 1, dtype=torch.long, device=segment.device)
        sizes.scatter_add_(1, segment, torch.ones_like(segment))
        room = -(-sizes // window) * window
        begin_padded, begin = room.cumsum(1) - room, sizes.cumsum(1) - sizes
        position = begin_padded.gather(1, segment) + time - begin.gather(1, segment)
        padded = int(room.sum(1).max())
        source = torch.full((batch, padded), length, dtype=torch.long, device=segment.device)
        source.scatter_(1, position, time)
        first = (segment > 0) & (time == begin.gather(1, segment))
        resets = torch.zeros(batch, padded // window, dtype=torch.bool, device=segment.device)
        rows, columns = first.nonzero(as_tuple=True)
        resets[rows, position[rows, columns] // window] = True
        return ChunkLayout(length, padded, position, source, source < length, resets)
