"""Parts that every kind of model shares: parameters with a declared initial value, SwiGLU, causal convolution, RoPE.

A mixer, an MLP and the embedding are *regions* that a tensor-parallel layout divides: activations pass `enter` before
the first of their sharded products and `leave` after the last. Both are the identity until parallel/ replaces them.

Trunk activations are [T, B, D] (time, batch, width), as megatron-core's sequence parallelism and p2p expect.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hope.flops import Flops

Init = Callable[[torch.Size, torch.Generator], Tensor]


def normal(std: float) -> Init:
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def constant(value: float) -> Init:
    return lambda shape, generator: torch.full(shape, value)


def last_tap(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A convolution [channels, taps] that starts as the identity: only the newest tap is 1."""
    return torch.cat([torch.zeros(shape[0], shape[1] - 1), torch.ones(shape[0], 1)], -1)


def new_parameter(*shape: int, init: Init) -> nn.Parameter:
    """An unfilled parameter that carries how `initialise` will fill it."""
    parameter = nn.Parameter(torch.zeros(*shape))
    parameter.init = init  # type: ignore[attr-defined]
    return parameter


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter from (seed, its name) alone, drawn in fp32 on the CPU.

    The draw of a tensor depends neither on the order of construction nor on which other blocks are present, so a
    pipeline stage, or a tensor-parallel shard cut from the full draw, starts from the weights of the whole model.

    Raises:
        TypeError: a parameter was not made by `new_parameter`.
    """
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "init"):
            raise TypeError(f"{name} declares no initial value; create it with new_parameter")
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        parameter.copy_(parameter.init(parameter.shape, generator))


def unit(x: Tensor) -> Tensor:
    """L2-normalise the last dimension; 1e-6 keeps the gradient finite at zero (padding)."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class Linear(nn.Module):
    """y = x W^T, no bias. Weight [out, in] ~ N(0, 0.16 / in): std 0.02 at width 400, and equally loud at others."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = new_parameter(fan_out, fan_in, init=normal(0.4 * fan_in**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def flops(self) -> Flops:
        return Flops(dense=2.0 * self.weight.numel())


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = new_parameter(width, init=constant(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, eps=1e-6)


class SwiGlu(nn.Module):
    """down(silu(gate x) * up x). The two input maps stay apart: a packed one is wrong under column parallelism."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = Linear(width, hidden), Linear(width, hidden), Linear(hidden, width)
        self.enter, self.leave = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(self.down(F.silu(self.gate(x)) * self.up(x)))

    def flops(self) -> Flops:
        return self.gate.flops() + self.up.flops() + self.down.flops()


class CausalConv(nn.Module):
    """Depthwise causal convolution over time with silu; starts as the identity tap.

    forward: x [T, B, D], history [taps-1, B, D] of earlier inputs, same [taps-1, T, B] (true where the token `lag`
    steps back belongs to the same document; None: one document) -> y [T, B, D] and the new history.
    """

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.taps = taps
        self.weight = new_parameter(width, taps, init=last_tap)

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


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary position embedding (Su et al., 2021) on x [B, H, T, K], K even; computed in fp32."""
    length, width = x.shape[-2:]
    rate = base ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float64) / width)
    angle = (torch.arange(length, device=x.device, dtype=torch.float64).unsqueeze(-1) * rate).to(
        torch.promote_types(x.dtype, torch.float32)
    )
    cos, sin = angle.cos(), angle.sin()
    left, right = x.to(angle.dtype).chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)
