"""Softmax attention with rotary embedding: the mixer of Transformer++ (the control) and of HOPE-Attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hope.documents import Documents
from hope.flops import Flops
from hope.layers import Linear, rotated, rotation
from hope.mixers.base import Mixer, Trunk, mixer
from hope.mixers.base import State as MixerState
from hope.sections import MixerSection, Problem


@dataclass
class AttentionConfig(MixerSection):
    """Causal multi-head softmax attention (Vaswani et al., 2017) with rotary positions."""

    rope_base: float = 10000.0
    """Base of the rotary position embedding."""

    def problems(self, path: str, head_dim: int) -> Iterator[Problem]:
        if head_dim % 2:
            yield Problem("model.heads", f"head width {head_dim} is odd; rotary embedding needs pairs", "an even width")
        if not self.rope_base > 0:
            yield Problem(f"{path}.rope_base", f"{self.rope_base} is not positive", "10000.0")


@dataclass(frozen=True)
class KeysAndValues(MixerState):
    """Keys (rotated) and values of earlier tokens, [B, H, S, K] each.

    open: [B, S], whether a token belongs to the document that the row is in; None: all do.
    position: of the next token, in tokens since the first call.
    """

    keys: Tensor
    values: Tensor
    open: Tensor | None
    position: int

    def compared(self) -> dict[str, Tensor]:
        """Keys and values."""
        return {"keys": self.keys, "values": self.values}

    def reset(self, rows: Tensor, initial: KeysAndValues) -> KeysAndValues:
        """Where rows [B] is true, a sequence sees none of its past."""
        return KeysAndValues(self.keys, self.values, _known(self) & ~rows.unsqueeze(1), self.position)


@mixer("attention", section=AttentionConfig)
class Attention(Mixer):
    """Causal multi-head attention, x [T, B, D] -> y [T, B, D]; documents of a packed row do not see each other."""

    def __init__(self, trunk: Trunk, config: AttentionConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_base, width = trunk.head_dim, config.rope_base, trunk.width
        self.query, self.key, self.value = (Linear(width, width, "column", self.head_dim) for _ in range(3))
        self.output = Linear(width, width, "row")

    def forward(
        self, x_TBD: Tensor, state: MixerState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, KeysAndValues]:
        assert state is None or isinstance(state, KeysAndValues)
        x_TBD = self.enter(x_TBD)
        offset = 0 if state is None else state.position
        heads = lambda z: z.unflatten(-1, (-1, self.head_dim)).permute(1, 2, 0, 3)
        q, k, v = (heads(project(x_TBD)) for project in (self.query, self.key, self.value))
        turn = rotation(q, self.rope_base, offset)
        q, k = (self.form(rotated)(z, *turn) for z in (q, k))
        mask = None if documents is None else documents.attention_mask()
        opened = None if documents is None else documents.open_at_end(0).T
        if state is not None:
            k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
            mask = _mask_with_past(state, q.shape[2], documents, mask)
            opened = _open_with_past(state, q.shape[2], documents, opened)
        y_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        merged = y_BHTK.permute(2, 0, 1, 3).flatten(-2)
        after = KeysAndValues(k, v, opened, offset + q.shape[2])
        return self.leave(self.output(merged)), after if state is None else _without_closed(after)

    def start(self, batch: int) -> KeysAndValues:
        """No keys yet."""
        heads = self.query.weight.shape[0] // self.head_dim
        nothing = self.query.weight.new_zeros(batch, heads, 0, self.head_dim)
        return KeysAndValues(nothing, nothing, None, 0)

    def flops(self, length: int) -> Flops:
        """Per token, forward; causal scores count half of the square."""
        dense = self.query.flops() + self.key.flops() + self.value.flops() + self.output.flops()
        return dense + Flops(2.0 * length * torch.numel(self.query.weight[0]))


def _continues(documents: Documents | None, like: Tensor, length: int) -> Tensor:
    """[B, T]: does a new token belong to the document that was open before this call?"""
    if documents is None:
        return like.new_ones(like.shape[0], length, dtype=torch.bool)
    return documents.segment_BT == 0


def _known(state: KeysAndValues) -> Tensor:
    """[B, S]: earlier tokens of the open document."""
    if state.open is not None:
        return state.open
    return state.keys.new_ones(state.keys.shape[0], state.keys.shape[2], dtype=torch.bool)


def _mask_with_past(state: KeysAndValues, length: int, documents: Documents | None, new: Tensor | None) -> Tensor:
    """[B, 1, T, S + T]: what each new token sees of earlier and of new tokens."""
    known, continues = _known(state), _continues(documents, state.keys, length)
    past = known[:, None, None, :] & continues[:, None, :, None]
    if new is None:
        new = past.new_ones(past.shape[0], 1, length, length).tril()
    return torch.cat([past, new], -1)


def _open_with_past(
    state: KeysAndValues, length: int, documents: Documents | None, new: Tensor | None
) -> Tensor | None:
    """[B, S + T]: which tokens belong to the document that is open after this call."""
    if documents is None and state.open is None:
        return None
    continues = _continues(documents, state.keys, length)
    return torch.cat([_known(state) & continues[:, -1:], continues if new is None else new], 1)


def _without_closed(state: KeysAndValues) -> KeysAndValues:
    """Without the leading tokens that no row's open document has."""
    if state.open is None:
        return state
    first = int(state.open.any(0).long().argmax())
    return KeysAndValues(state.keys[:, :, first:], state.values[:, :, first:], state.open[:, first:], state.position)
