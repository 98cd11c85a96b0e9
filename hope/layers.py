"""Parts that every kind of model shares: linear maps, norms, SwiGLU, causal convolution, RoPE.

A mixer, an MLP and the embedding are *regions* that a tensor-parallel layout divides: activations pass `enter` before
the first of their sharded products and `leave` after the last. Both are the identity until parallel/ replaces them.
Of regions inside a region only the outermost counts.

Trunk activations are [T, B, D] (time, batch, width), as megatron-core's sequence parallelism and p2p expect.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hope.flops import Flops
from hope.parameters import Used, constant, last_tap, new_parameter, normal


def unit(x: Tensor) -> Tensor:
    """L2-normalise the last dimension; 1e-6 keeps the gradient finite at zero (padding)."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class Linear(nn.Module):
    """y = x W^T, no bias. Weight [out, in] ~ N(0, 0.16 / in): std 0.02 at width 400, and equally loud at others.

    parallel: as Megatron names it. "column": output features are divided over tensor-parallel ranks; "row": input
    features are, and the region's `leave` sums.
    """

    def __init__(self, fan_in: int, fan_out: int, parallel: Literal["column", "row"]) -> None:
        super().__init__()
        cut = 0 if parallel == "column" else 1
        self.weight = new_parameter(fan_out, fan_in, init=normal(0.4 * fan_in**-0.5), cut=cut, update="matrix")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def flops(self) -> Flops:
        return Flops(dense=2.0 * self.weight.numel())


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich, 2019). used: see `Declaration`.

    eps: added to the mean square.
    """

    def __init__(self, width: int, used: Used = "trunk", eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(width, init=constant(1.0), used=used, update="elementwise")

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, eps=self.eps)


class SwiGlu(nn.Module):
    """down(silu(gate x) * up x) (Shazeer, 2020). The two input maps stay apart: a packed one is wrong under column
    parallelism."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = Linear(width, hidden, "column"), Linear(width, hidden, "column")
        self.down = Linear(hidden, width, "row")
        self.enter, self.leave = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y: Tensor = self.leave(self.down(F.silu(self.gate(x)) * self.up(x)))
        return y

    def flops(self) -> Flops:
        return self.gate.flops() + self.up.flops() + self.down.flops()


class CausalConv(nn.Module):
    """Depthwise causal convolution over time with silu; starts as the identity tap.

    forward: x [T, B, D], history [taps-1, B, D] of earlier inputs, same [taps-1, T, B] (true where the token `lag`
    steps back belongs to the same document; None: one document) -> y [T, B, D] and the last taps-1 inputs.
    """

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.taps = taps
        self.weight = new_parameter(width, taps, init=last_tap, cut=0, update="elementwise")

    def forward(self, x_TBD: Tensor, history: Tensor, same: Tensor | None) -> tuple[Tensor, Tensor]:
        length, past = x_TBD.shape[0], self.taps - 1
        padded = torch.cat([history.to(x_TBD.dtype), x_TBD])
        y = x_TBD * self.weight[:, past]
        for lag in range(1, self.taps):
            earlier = padded[past - lag : past - lag + length]
            if same is not None:
                earlier = earlier * same[lag - 1].unsqueeze(-1)
            y = y + earlier * self.weight[:, past - lag]
        return F.silu(y), padded[length:]


def rotate(x: Tensor, base: float, offset: int = 0) -> Tensor:
    """Rotary position embedding (Su et al., 2021) on x [B, H, T, K], K even, the first token at position `offset`;
    computed in fp32."""
    length, width = x.shape[-2:]
    rate = base ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float64) / width)
    position = torch.arange(offset, offset + length, device=x.device, dtype=torch.float64)
    angle = (position.unsqueeze(-1) * rate).to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = angle.cos(), angle.sin()
    left, right = x.to(angle.dtype).chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)
