"""Matrix memories M(z) = z + M z, all memories of a head through two shared factors.

The gradient of 1/2 |k + M k - v̂|^2 with v̂ = v + M v at the chunk-start state M_s is (M_s + I)(k - v) k^T: every
memory is multiplied from the right by the same matrix and receives the same addition. Hence

    M_box,t = M_box,0 P_t + R_t,     P_0 = I,  R_0 = 0,

with P and R shared by all memories of a head and sequence: N fast weights collapse into one state [2K, K] (P stacked
on R), and the M_box,0 stay ordinary weights. That is `forget: zero`. Where alpha forgets and eta erases the difference
D = M - M_0 only (`forget: initial`), D_t = (M_box,0 + I) R_t with the same R for all memories, hence

    M_box,t + I = (M_box,0 + I)(I + R_t),     R_0 = 0:     P = I + R, and one state [K, K] is enough.

Every form of erasing and momentum multiplies from the right or adds a multiple of (M_s + I), so both hold for all of
them. Exact, not an approximation: tests/unit/test_self_modifying_reference.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hope.memory.bank import State
from hope.memory.config import MemoryConfig
from hope.memory.delta import DeltaChunk, DeltaState, Gates, Written
from hope.parameters import new_parameter, normal


class MatrixMemories(nn.Module):
    """Meta-learned initial states M_box,0 [H, K, K], one parameter per memory: `initial.<box>`."""

    def __init__(self, boxes: tuple[str, ...], heads: int, head_dim: int, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        # random, not zero: with all M_box,0 equal every memory would read the same thing and v̂ = M(v) would follow k
        std = head_dim**-0.5
        new = lambda: new_parameter(heads, head_dim, head_dim, init=normal(std), cut=0, update="matrix_per_head")
        self.initial = nn.ParameterDict({box: new() for box in boxes})

    def bank(self, boxes: tuple[str, ...], dtype: torch.dtype) -> "MatrixBank":
        reads = [self.initial[b].to(dtype) for b in boxes if b != "main"]
        main = self.initial["main"].to(dtype) if "main" in boxes else None
        return MatrixBank(torch.cat(reads, 1) if reads else None, main, self.initial[boxes[0]].shape, self.config)

    def flops(self, read_boxes: int, tokens_per_chunk: int, head_dim: int) -> tuple[float, float]:
        """(reads, writes) per token and head in FLOPs, forward; a multiply-add counts two."""
        k, c = head_dim, tokens_per_chunk
        rows = k if self.config.forget == "initial" else 2 * k
        reads = 2 * k * rows + 2 * k * k * read_boxes + 2 * k * rows + 2 * c * k + 2 * c * rows + 2 * k * k
        writes = 2 * 2 * k * rows + 2 * c * k + c * rows + 2 * k * rows
        return float(reads), float(writes)


@dataclass(frozen=True)
class MatrixBank:
    """See `hope.memory.bank.Bank`. `stack` is [H, N K, K], `main` [H, K, K]. Features are P q and R q, side by side."""

    stack: Tensor | None
    main: Tensor | None
    shape: torch.Size
    config: MemoryConfig

    def start(self, batch: int) -> State:
        heads, width, _ = self.shape
        like = self.stack if self.stack is not None else self.main
        assert like is not None
        if self.config.forget == "initial":
            return (DeltaState(like.new_zeros(batch, heads, width, width)),)
        identity = torch.eye(2 * width, width, dtype=like.dtype, device=like.device)
        return (DeltaState(identity.expand(batch, heads, 2 * width, width)),)

    def read(self, state: State, inputs: Tensor) -> Tensor:
        assert self.stack is not None
        width = inputs.shape[-1]
        through_p, through_r = self._factors(inputs, inputs @ state[0].weight.mT).split(width, -1)
        boxes = (through_p @ self.stack.mT).unflatten(-1, (-1, width))
        reads: Tensor = boxes + through_r.unsqueeze(-2)
        return reads.transpose(-2, -3)

    def write(self, state: State, keys: Tensor, values: Tensor, gates: Gates) -> tuple[State, "MatrixReads"]:
        rule = self.config.erase
        chunk = DeltaChunk(keys, gates, erase=rule in ("layerwise", "input"), momentum=self.config.momentum)
        # the penalty 1/2 |M(k)|^2 adds M(k) to the error, which the shared factors see as one more k
        difference = (2 * keys if rule == "objective" else keys) - values
        width, length = keys.shape[-1], keys.shape[-2]
        read_keys, errors = (torch.cat([keys, difference], -2) @ state[0].weight.mT).split(length, -2)
        residual = errors.shape[-1] - width  # R's error has the residual part of the read, and R is what comes last
        errors = errors + nn.functional.pad(difference, (residual, 0))
        written = chunk.write(state[0], read_keys, errors)
        return (written.state,), MatrixReads(written, self)

    def boundary(self, state: State, queries: Tensor) -> Tensor:
        return self._factors(queries, queries @ state[0].weight.mT)

    def _factors(self, inputs: Tensor, read: Tensor) -> Tensor:
        """[..., 2 K]: P z and R z, from z and what the state says of it."""
        return read if self.config.forget == "zero" else torch.cat([inputs + read, read], -1)

    def output(self, features: Tensor) -> Tensor:
        assert self.main is not None
        through_p, through_r = features.chunk(2, -1)
        return through_p @ self.main.mT + through_r


@dataclass(frozen=True)
class MatrixReads:
    written: Written
    bank: MatrixBank

    def causal(self, queries: Tensor) -> Tensor:
        read = self.written.read(queries, queries @ self.written.start.weight.mT)
        return self.bank._factors(queries, read)
