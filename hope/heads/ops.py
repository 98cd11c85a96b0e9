"""`memory_input` and `merge_heads` of hope/mixers/self_modifying.py as ops of the kernels in `hope.heads.fused`.

The same values, from the operands as they are: nothing is rounded between them and the result, where the plain forms
in bf16 round at every operation. Each op is one node for torch.compile, saves its inputs and nothing else, and can be
differentiated once. K is the width of a head, D = H K of those of this rank.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def _kernels() -> ModuleType:
    return importlib.import_module("hope.heads.fused")


def _dense(x: Tensor) -> Tensor:
    """With neighbours in the last dimension, copied if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@torch.library.custom_op(
    "hope::memory_input",
    mutates_args=(),
    schema="(Tensor z, Tensor weight, Tensor history, Tensor? same, int head_dim, ScalarType dtype) -> Tensor",
)
def memory_input(
    z: Tensor, weight: Tensor, history: Tensor, same: Tensor | None, head_dim: int, dtype: torch.dtype
) -> Tensor:
    """silu of the depthwise causal convolution, cut into heads of unit length.

    Args:
        z: [T, B, D]. weight: [D, taps], the last tap of the token itself. history: [taps-1, B, D], what came before.
        same: [taps-1, T, B], true where the token `lag` = 1, 2, ... steps back is of the same document; None: all are.
        dtype: of the result, bf16 or fp32.
    Returns: [B, H, T, K], contiguous.
    """
    out: Tensor = _kernels().input_forward(
        _dense(z), weight.contiguous(), history.contiguous(), _whole(same), head_dim, dtype
    )
    return out


@memory_input.register_fake
def _(z, weight, history, same, head_dim, dtype):  # type: ignore[no-untyped-def]
    length, batch, width = z.shape
    return z.new_empty(batch, width // head_dim, length, head_dim, dtype=dtype)


@torch.library.custom_op(
    "hope::memory_input_backward",
    mutates_args=(),
    schema="(Tensor du, Tensor z, Tensor weight, Tensor history, Tensor? same) -> (Tensor, Tensor, Tensor)",
)
def memory_input_backward(
    du: Tensor, z: Tensor, weight: Tensor, history: Tensor, same: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, weight and history, from that of the unit vectors."""
    dz, dweight, dhistory = _kernels().input_backward(
        du.contiguous(), _dense(z), weight.contiguous(), history.contiguous(), _whole(same)
    )
    return dz, dweight.to(weight.dtype), dhistory


@memory_input_backward.register_fake
def _(du, z, weight, history, same):  # type: ignore[no-untyped-def]
    return z.new_empty(z.shape), weight.new_empty(weight.shape), history.new_empty(history.shape)


def _input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _input_adjoint(ctx: Any, du: Tensor) -> tuple[Tensor | None, ...]:
    return *memory_input_backward(du, *ctx.saved_tensors), None, None, None


memory_input.register_autograd(_input_adjoint, setup_context=_input_setup)


@torch.library.custom_op(
    "hope::merge_heads",
    mutates_args=(),
    schema='(Tensor y, Tensor gate, Tensor norm_weight, str activation="silu") -> Tensor',
)
def merge_heads(y: Tensor, gate: Tensor, norm_weight: Tensor, activation: str = "silu") -> Tensor:
    """Heads y [B, H, T, K] over their root mean square, times norm_weight [K], side by side, times act(gate).

    activation: silu or sigmoid. Returns [T, B, D] in the dtype of gate [T, B, D], contiguous.
    """
    out: Tensor = _kernels().merge_forward(_dense(y), _dense(gate), norm_weight.contiguous(), activation)
    return out


@merge_heads.register_fake
def _(y, gate, norm_weight, activation="silu"):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape)


@torch.library.custom_op(
    "hope::merge_heads_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor y, Tensor gate, Tensor norm_weight, str activation) -> (Tensor, Tensor, Tensor)",
)
def merge_heads_backward(
    dout: Tensor, y: Tensor, gate: Tensor, norm_weight: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, gate and norm_weight."""
    dy, dgate, dweight = _kernels().merge_backward(
        dout.contiguous(), _dense(y), _dense(gate), norm_weight.contiguous(), activation
    )
    return dy, dgate, dweight.to(norm_weight.dtype)


@merge_heads_backward.register_fake
def _(dout, y, gate, norm_weight, activation):  # type: ignore[no-untyped-def]
    return y.new_empty(y.shape), gate.new_empty(gate.shape), norm_weight.new_empty(norm_weight.shape)


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, gate, norm_weight, ctx.activation = inputs
    ctx.save_for_backward(y, gate, norm_weight)


def _merge_adjoint(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *merge_heads_backward(dout, *ctx.saved_tensors, ctx.activation), None


merge_heads.register_autograd(_merge_adjoint, setup_context=_merge_setup)
