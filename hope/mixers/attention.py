"""Softmax attention: the mixer of Transformer++ (the control) and of HOPE-Attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hope.documents import Documents
from hope.flops import Flops
from hope.layers import Linear, RMSNorm, rotated, rotation
from hope.mixers.base import Mixer, Trunk, mixer
from hope.mixers.base import State as MixerState
from hope.mixers.sliding_window import sliding_window_attention, with_always
from hope.parameters import new_parameter, normal
from hope.sections import MixerSection, Problem, only_if


@dataclass
class AttentionConfig(MixerSection):
    """Causal multi-head softmax attention (Vaswani et al., 2017)."""

    positions: Literal["rope", "none"] = "rope"
    """rope: rotary embedding of queries and keys (Su et al., 2021); none: the causal mask alone tells order, as beside
    recurrent layers (NoPE, Kazemnejad et al., 2023)."""
    rope_base: float = only_if("positions", "rope", default=10000.0)
    """Base of the rotary position embedding."""
    window: int | None = None
    """Tokens that a token sees, itself and those before it (sliding window); null: all."""
    qk_norm: bool = False
    """RMSNorm of every head's queries and keys before the positions (Henry et al., 2020; Dehghani et al., 2023)."""

    def problems(self, path: str, head_dim: int) -> Iterator[Problem]:
        if head_dim % 2 and self.positions == "rope":
            fix = f"an even width, or {path}.positions=none"
            yield Problem("model.heads", f"head width {head_dim} is odd; rotary embedding needs pairs", fix)
        if self.window is not None and self.window < 1:
            yield Problem(f"{path}.window", f"{self.window} is less than 1", "1024, or null for no window")
        if not self.rope_base > 0:
            yield Problem(f"{path}.rope_base", f"{self.rope_base} is not positive", "10000.0")

    def endless(self) -> tuple[str, str] | None:
        """Without a window, keys and values of all tokens are kept."""
        return ("window", "1024") if self.window is None else None


@dataclass(frozen=True)
class KeysAndValues(MixerState):
    """Keys (rotated) and values of earlier tokens, [B, H, S, K] each; with a window of its last tokens but one.

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
    """Causal multi-head attention, x [T, B, D] -> y [T, B, D]; documents of a packed row do not see each other.

    Args:
        persistent: learned keys and values per head that every token sees, whatever its document and the window
            (persistent memory, Sukhbaatar et al., 2019; Section 3.3 of Titans). They have no position.
    """

    compiles_whole = False
    """A Transformer++ of 334M had 115k tokens/s with whole blocks and 153k with dense parts, on an H100."""

    def __init__(self, trunk: Trunk, config: AttentionConfig, persistent: int = 0) -> None:
        super().__init__()
        self.head_dim, self.config, width = trunk.head_dim, config, trunk.width
        self.query, self.key, self.value = (Linear(width, width, "column", self.head_dim) for _ in range(3))
        self.output = Linear(width, width, "row")
        norm = lambda: RMSNorm(self.head_dim, used="heads") if config.qk_norm else None
        self.query_norm: RMSNorm | None = norm()
        self.key_norm: RMSNorm | None = norm()
        learned = lambda: new_parameter(
            trunk.heads, persistent, self.head_dim, init=normal(0.4), cut=0, update="elementwise"
        )
        self.persistent_keys = learned() if persistent else None
        self.persistent_values = learned() if persistent else None

    def forward(
        self, x_TBD: Tensor, state: MixerState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, KeysAndValues]:
        assert state is None or isinstance(state, KeysAndValues)
        merged, after = self.mix(self.enter(x_TBD), state, documents)
        return self.leave(self.output(merged)), after

    def mix(
        self, x_TBD: Tensor, state: KeysAndValues | None, documents: Documents | None
    ) -> tuple[Tensor, KeysAndValues]:
        """What heads read, side by side [T, B, D], before the output map, and the state after."""
        offset = 0 if state is None else state.position
        heads = lambda z: z.unflatten(-1, (-1, self.head_dim)).permute(1, 2, 0, 3)
        q, k, v = (heads(project(x_TBD)) for project in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        unturned = q
        if self.config.positions == "rope":
            turn = rotation(q, self.config.rope_base, offset)
            q, k = (self.form(rotated)(z, *turn) for z in (q, k))
        opened = None if documents is None else documents.open_at_end(0).T
        if state is not None:
            k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
            opened = _open_with_past(state, q.shape[2], documents, opened)
        after = _in_window(KeysAndValues(k, v, opened, offset + q.shape[2]), self.config.window)
        always = self._persistent(q)
        if always is not None:
            q, k = apart_from_persistent(q, k, unturned)
        merged = self._attend(q, k, v, state, documents, always).permute(2, 0, 1, 3).flatten(-2)
        return merged, after if state is None else _without_closed(after)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: KeysAndValues | None,
        documents: Documents | None,
        always: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """[B, H, T, K] for the T queries, k and v with those of `state` in front. always: keys and values that all
        queries see."""
        if self.config.window is not None and k.shape[2] > self.config.window:
            segments_q, segments_k = _segments(state, q, documents)
            return sliding_window_attention(q, k, v, self.config.window, segments_q, segments_k, always)
        mask = None if documents is None else documents.attention_mask()
        if state is not None:
            mask = _mask_with_past(state, q.shape[2], documents, mask)
        if always is not None:
            if mask is None:
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            k, v, mask = with_always(k, v, mask, always)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    def _persistent(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """The learned keys [H, P, 2 K], see `apart_from_persistent`, and values [H, P, K]."""
        if self.persistent_keys is None or self.persistent_values is None:
            return None
        return F.pad(self.persistent_keys, (self.head_dim, 0)).to(like.dtype), self.persistent_values.to(like.dtype)

    def start(self, batch: int) -> KeysAndValues:
        """No keys yet."""
        heads = self.query.weight.shape[0] // self.head_dim
        nothing = self.query.weight.new_zeros(batch, heads, 0, self.head_dim)
        return KeysAndValues(nothing, nothing, None, 0)

    def flops(self, length: int) -> Flops:
        """Per token, forward; causal scores count half of the square, or of the window's at the start."""
        dense = self.query.flops() + self.key.flops() + self.value.flops() + self.output.flops()
        window = min(self.config.window or length, length)
        seen = window - window**2 / (2 * length)  # mean over the tokens
        width = torch.numel(self.query.weight[0])
        if self.persistent_keys is None:
            return dense + Flops(4.0 * seen * width)
        return dense + Flops(6.0 * (seen + self.persistent_keys.shape[1]) * width)  # scores of doubled width


def apart_from_persistent(q: Tensor, k: Tensor, unturned: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, H, *, 2 K]: rotated ones in one half, and in the other what meets keys without a position,
    the query as it was. A rotated one would read them by its distance from the row's first token. The root undoes the
    doubled width in the scores' scale."""
    return torch.cat([q, unturned], -1) * 2**0.5, F.pad(k, (0, k.shape[-1]))


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


def _segments(
    state: KeysAndValues | None, q: Tensor, documents: Documents | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Of queries [B, T] and keys [B, S + T]: the document's number in this call, 0 the one that was open before it, -1
    what is known of none. None: all tokens are of one document."""
    known = None if state is None else state.open
    if documents is None and known is None:
        return None, None
    batch, length = q.shape[0], q.shape[2]
    new = torch.zeros(batch, length, dtype=torch.long, device=q.device)
    if documents is not None:
        new = documents.segment_BT.long()
    if state is None:
        return new, new
    return new, torch.cat([_known(state).long() - 1, new], 1)


def _in_window(state: KeysAndValues, window: int | None) -> KeysAndValues:
    """Without what no later token sees."""
    if window is None:
        return state
    first = max(0, state.keys.shape[2] - (window - 1))
    opened = None if state.open is None else state.open[:, first:]
    return KeysAndValues(state.keys[:, :, first:], state.values[:, :, first:], opened, state.position)


def _without_closed(state: KeysAndValues) -> KeysAndValues:
    """Without the leading tokens that no row's open document has."""
    if state.open is None or not state.open.shape[1]:
        return state
    first = int(state.open.any(0).long().argmax())
    return KeysAndValues(state.keys[:, :, first:], state.values[:, :, first:], state.open[:, first:], state.position)
