"""Parts that every kind of model shares: linear maps, norms, SwiGLU, causal convolution, RoPE.

A mixer, an MLP and the embedding are *regions* that a tensor-parallel layout divides: activations pass `enter` before
the first of their sharded products and `leave` after the last. Both are the identity until parallel/ replaces them.
Of regions inside a region only the outermost counts.

Trunk activations are [T, B, D] (time, batch, width), as megatron-core's sequence parallelism and p2p expect.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hope.dense import Dense
from hope.flops import Flops
from hope.parameters import Used, constant, last_tap, new_parameter, normal, uniform

COPY: Used = "heads"
"""What a rank does with a copy inside a mixer."""


def unit(x: Tensor) -> Tensor:
    """L2-normalise the last dimension; 1e-6 keeps the gradient finite at zero (padding)."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class Linear(nn.Module):
    """y = x W^T, no bias. Weight [out, in] ~ N(0, 0.16 / in): std 0.02 at width 400, and equally loud at others.

    parallel: as Megatron names it. "column": output features are divided over tensor-parallel ranks; "row": input
    features are, and the region's `leave` sums; "copy": every rank has the whole map, and uses it for its own heads.
    head_rows: how many consecutive output features are one head's, see `Declaration`. Not of row-parallel maps.
    """

    def __init__(
        self, fan_in: int, fan_out: int, parallel: Literal["column", "row", "copy"], head_rows: int | None = None
    ) -> None:
        super().__init__()
        cut, used = {"column": (0, None), "row": (1, None), "copy": (None, COPY)}[parallel]
        init = normal(0.4 * fan_in**-0.5)
        self.weight = new_parameter(
            fan_out, fan_in, init=init, cut=cut, used=used, update="matrix", head_rows=head_rows
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def flops(self) -> Flops:
        return Flops(dense=2.0 * self.weight.numel())


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) * weight over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps=eps)


class RMSNorm(Dense):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich, 2019). used: see `Declaration`.

    eps: added to the mean square.
    """

    def __init__(self, width: int, used: Used = "trunk", eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(width, init=constant(1.0), used=used, update="elementwise")

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        return self.form(rms_norm)(x, self.weight, self.eps)


def gated(gate: Tensor, x: Tensor, kind: Literal["silu", "sigmoid"] = "silu") -> Tensor:
    """silu(gate) x, or sigmoid(gate) x."""
    return (F.silu(gate) if kind == "silu" else torch.sigmoid(gate)) * x


class SwiGlu(Dense):
    """down(silu(gate x) * up x) (Shazeer, 2020). The two input maps stay apart: a packed one is wrong under column
    parallelism."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = Linear(width, hidden, "column"), Linear(width, hidden, "column")
        self.down = Linear(hidden, width, "row")
        self.enter, self.leave = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y: Tensor = self.leave(self.down(self.form(gated)(self.gate(x), self.up(x))))
        return y

    def flops(self) -> Flops:
        return self.gate.flops() + self.up.flops() + self.down.flops()


def convolved(
    x_TBD: Tensor, weight: Tensor, history: Tensor, same: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """silu of the depthwise causal convolution [T, B, D]; see `CausalConv`."""
    length, past = x_TBD.shape[0], weight.shape[1] - 1
    padded = torch.cat([history.to(x_TBD.dtype), x_TBD])
    y = x_TBD * weight[:, past]
    for lag in range(1, past + 1):
        earlier = padded[past - lag : past - lag + length]
        if same is not None:
            earlier = earlier * same[lag - 1].unsqueeze(-1)
        y = y + earlier * weight[:, past - lag]
    return F.silu(y if bias is None else y + bias)


class CausalConv(Dense):
    """Depthwise causal convolution over time with silu; starts as the identity tap, without a bias.

    drawn: with a bias, both uniform within taps^(-1/2), as torch's own layer starts. copy: of channels that every
    tensor-parallel rank has, see `Linear`.

    forward: x [T, B, D], history [taps-1, B, D] of earlier inputs, same [taps-1, T, B] (true where the token `lag`
    steps back belongs to the same document; None: one document) -> y [T, B, D] and the last taps-1 inputs.
    """

    def __init__(self, width: int, taps: int, drawn: bool = False, copy: bool = False) -> None:
        super().__init__()
        self.taps, init = taps, uniform(taps**-0.5) if drawn else last_tap
        layout: dict[str, Any] = {"used": COPY} if copy else {"cut": 0}
        self.weight = new_parameter(width, taps, init=init, update="elementwise", **layout)
        self.bias = new_parameter(width, init=init, update="elementwise", **layout) if drawn else None

    def forward(self, x_TBD: Tensor, history: Tensor, same: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.form(convolved)(x_TBD, self.weight, history, same, self.bias), self.latest(x_TBD, history)

    def latest(self, x_TBD: Tensor, history: Tensor) -> Tensor:
        """The last taps-1 inputs [taps-1, B, D]."""
        past = self.taps - 1
        padded = torch.cat([history.to(x_TBD.dtype), x_TBD[max(0, x_TBD.shape[0] - past) :]])
        return padded[padded.shape[0] - past :]


def rotation(x: Tensor, base: float, offset: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin [T, K / 2] of rotary position embedding (Su et al., 2021) for x [B, H, T, K], K even, the first token
    at position `offset`; in fp32 (or fp64)."""
    length, width = x.shape[-2:]
    rate = base ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float64) / width)
    position = torch.arange(offset, offset + length, device=x.device, dtype=torch.float64)
    angle = (position.unsqueeze(-1) * rate).to(torch.promote_types(x.dtype, torch.float32))
    return angle.cos(), angle.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, K] turned by `rotation`, computed in its precision."""
    left, right = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)
