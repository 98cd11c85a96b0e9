"""The gated-delta chunk: the one primitive under every self-modifying memory, under the linear family, and
under the networks of Titans and TTT (`hope.memory.deep`, without erasing).

Over a chunk of C tokens with keys x_t, write rates eta_t, erase rates zeta_t, retention alpha_t and errors e_t all
known at its start,

    S_t = beta_t S_{t-1} - eta_t e_t x_t^T
    W_t = W_{t-1} (alpha_t I - zeta_t x_t x_t^T) + S_t                       (Eq. 88/90: zeta = eta, beta = 0)

is solved without a loop. Published layers are rows of one table, with v_t = -e_t the value (`hope.memory.linear`
computes those, whose keys are known beforehand, for all chunks at once):

    linear attention (Katharopoulos et al., 2020)       alpha 1         eta 1          zeta 0
    RetNet (Sun et al., 2023)                           alpha fixed     eta 1          zeta 0
    Mamba-2, scalar decay (Dao and Gu, 2024)            alpha_t         eta_t = dt_t   zeta 0
    DeltaNet (Schlag et al., 2021; Yang et al., 2024)   alpha 1         eta_t          zeta_t = eta_t
    Gated DeltaNet (Yang et al., 2025)                  alpha_t         eta_t          zeta_t = alpha_t eta_t

With Gamma_t = alpha_1 ... alpha_t, the erased content u_t = zeta_t W_{t-1} x_t obeys one
unit-lower-triangular system, and W_C and all reads W_t q_t are matrix products. Ratios of Gamma are taken in log
space: Gamma itself underflows for long chunks. Nothing is divided by alpha, so alpha may be tiny.

Shapes: C tokens of a chunk, K key width, V rows of the state; leading dimensions are free. Rows are tokens.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gates:
    """Per-token scalars of one chunk, each [..., C].

    eta: write rate. log_alpha: logarithm of the retention. erase: zeta, the erase rate; None: the write rate.
    A padded token has eta = 0, erase = 0, log_alpha = 0 and valid = 0: it neither writes nor forgets, nor advances
    momentum.
    """

    eta: Tensor
    log_alpha: Tensor
    valid: Tensor | None = None
    erase: Tensor | None = None

    @property
    def erase_rate(self) -> Tensor:
        return self.eta if self.erase is None else self.erase

    def map(self, change: Callable[[Tensor], Tensor]) -> "Gates":
        """`change` applied to every tensor that is there."""
        optional = lambda t: None if t is None else change(t)
        return Gates(change(self.eta), change(self.log_alpha), optional(self.valid), optional(self.erase))

    def unsqueeze(self, dim: int) -> "Gates":
        return self.map(lambda t: t.unsqueeze(dim))


def decay_ratios(end: Tensor, start: Tensor, diagonal: int) -> Tensor:
    """exp(end_t - start_s) on the lower triangle from `diagonal` down, 0 above. [..., C] x [..., C] -> [..., C, C]."""
    keep = torch.ones(end.shape[-1], end.shape[-1], dtype=torch.bool, device=end.device).tril(diagonal)
    # masked before exp: above the diagonal the exponent is positive and can overflow, which poisons the gradient
    return (end.unsqueeze(-1) - start.unsqueeze(-2)).masked_fill(~keep, float("-inf")).exp()


class DeltaChunk:
    """One chunk's keys and gates, with its triangular system; applies to any number of states with these keys.

    Args:
        keys: [..., C, K].
        gates: eta and log_alpha [..., C].
        erase: whether the term -zeta x x^T is present.
        momentum: beta in [0, 1), or the logarithm of one per token [..., C], 0 at padding.
    """

    def __init__(self, keys: Tensor, gates: Gates, erase: bool = True, momentum: float | Tensor = 0.0) -> None:
        self.keys, self.gates, self.erase = keys, gates, erase
        self.log_gamma = gates.log_alpha.cumsum(-1)
        before = self.log_gamma - gates.log_alpha
        self.gamma_before = before.exp().unsqueeze(-1)
        self.to_end = (self.log_gamma[..., -1:] - self.log_gamma).exp().unsqueeze(-1)
        self.system: Tensor | None = None
        if erase:
            # the solve reads the strict lower triangle only, so what exp(0) leaves above it does no harm
            decay = (before.unsqueeze(-1) - self.log_gamma.unsqueeze(-2)).tril(-1).exp()
            self.system = (keys * gates.erase_rate.unsqueeze(-1)) @ keys.mT * decay
        moves = isinstance(momentum, Tensor) or momentum > 0
        self.momentum = MomentumChunk(self.log_gamma, gates, momentum) if moves else None

    def write(self, state: "DeltaState", read_keys: Tensor, errors: Tensor) -> "Written":
        """Apply all writes of the chunk.

        Args:
            state: at the start of the chunk.
            read_keys: W_0 x_t, [..., C, V] (the layer's own forward product, so the erase term costs nothing extra).
            errors: e_t, [..., C, V].
        """
        eta = self.gates.eta.unsqueeze(-1)
        if self.momentum is None:
            # erased and written content share the right factor x_t, so that one vector per token holds both
            content = eta * errors
            if self.gates.erase is not None and self.erase:
                content = self._solve_apart(content, read_keys)
            elif self.erase:
                content = self._solve(eta * torch.addcmul(errors, self.gamma_before, read_keys))
            gamma = self.log_gamma[..., -1].exp()[..., None, None]
            end = gamma * state.weight - content.mT @ (self.to_end * self.keys)
            return Written(DeltaState(end), self, state, content, None)
        return self.momentum.write(self, state, read_keys, eta * errors)

    def with_keys(self, keys: Tensor) -> "DeltaChunk":
        """The same tokens and gates with other keys; for what does not erase."""
        assert not self.erase
        other = copy.copy(self)
        other.keys = keys
        return other

    def select(self, index: int) -> "DeltaChunk":
        """The chunk of memory `index` where keys are [B, H, N, C, K] and gates [B, H, 1, C]: what reads need."""
        picked = copy.copy(self)
        picked.keys, picked.log_gamma = self.keys[:, :, index], self.log_gamma[:, :, 0]
        picked.momentum = None if self.momentum is None else self.momentum.select(0)
        return picked

    def _solve_apart(self, written: Tensor, read_keys: Tensor) -> Tensor:
        """u_t + eta_t e_t where the erase rate is not the write rate: u erases what is left of both."""
        return self._solve(written + self.gates.erase_rate.unsqueeze(-1) * self.gamma_before * read_keys)

    def _solve(self, right: Tensor) -> Tensor:
        assert self.system is not None
        solved: Tensor = torch.linalg.solve_triangular(self.system, right, upper=False, unitriangular=True)
        return solved


@dataclass(frozen=True)
class DeltaState:
    """A fast weight: W [..., V, K] and, with momentum, S of the same shape."""

    weight: Tensor
    momentum: Tensor | None = None


@dataclass(frozen=True)
class Written:
    """The outcome of one chunk: the end state, and the reads of every state inside the chunk."""

    state: DeltaState
    chunk: DeltaChunk
    start: DeltaState
    content: Tensor
    """[..., C, V]: what token s took out of the state, u_s (with no momentum: u_s + eta_s e_s)."""
    written: Tensor | None
    """[..., C, V]: eta_s e_s, apart from u_s, under momentum."""

    def read(self, queries: Tensor, read_queries: Tensor) -> Tensor:
        """W_t q_t for every token t of the chunk (W_t includes t's own write).

        Args:
            queries: [..., C, K].
            read_queries: W_0 q_t, [..., C, V].
        Returns: [..., C, V].
        """
        chunk = self.chunk
        scores = queries @ chunk.keys.mT
        out = chunk.log_gamma.exp().unsqueeze(-1) * read_queries
        if chunk.erase or self.written is None:
            out = out - (scores * decay_ratios(chunk.log_gamma, chunk.log_gamma, 0)) @ self.content
        if self.written is None or chunk.momentum is None:
            return out
        assert self.start.momentum is not None
        carried = chunk.momentum.carried.unsqueeze(-1) * (queries @ self.start.momentum.mT)
        return out + carried - (scores * chunk.momentum.weights) @ self.written


class MomentumChunk:
    """Decay weights of momentum over a chunk: how much of eta_r e_r x_r^T, and of S_0, has reached W_t."""

    def __init__(self, log_gamma: Tensor, gates: Gates, beta: float | Tensor) -> None:
        valid = torch.ones_like(gates.eta) if gates.valid is None else gates.valid.to(gates.eta.dtype)
        # a number's logarithm is Python's: as a tensor it would be copied from the host, for which no graph can wait
        log_beta = beta.cumsum(-1) if isinstance(beta, Tensor) else valid.cumsum(-1) * math.log(beta)
        decay = decay_ratios(log_gamma, log_gamma, 0)
        kept = decay_ratios(log_beta, log_beta, 0) * valid.unsqueeze(-1)  # S_s is added only at real tokens
        self.weights = decay @ kept
        self.carried = (decay @ (log_beta.exp() * valid).unsqueeze(-1)).squeeze(-1)
        self.end_carried = log_beta[..., -1].exp()
        self.to_end = (log_beta[..., -1:] - log_beta).exp().unsqueeze(-1)

    def select(self, index: int) -> "MomentumChunk":
        picked = copy.copy(self)
        picked.weights, picked.carried = self.weights[:, :, index], self.carried[:, :, index]
        return picked

    def write(self, chunk: DeltaChunk, state: DeltaState, read_keys: Tensor, written: Tensor) -> Written:
        start = torch.zeros_like(state.weight) if state.momentum is None else state.momentum
        state = DeltaState(state.weight, start)
        content = torch.zeros_like(written)
        if chunk.erase:
            erase = chunk.gates.erase_rate.unsqueeze(-1)
            shifted = torch.nn.functional.pad(self.weights, (0, 0, 1, -1))  # row t holds the weights at t-1
            carried = torch.nn.functional.pad(self.carried, (1, -1)).unsqueeze(-1)
            scores = chunk.keys @ chunk.keys.mT
            inflow = carried * (chunk.keys @ start.mT) - (scores * shifted) @ written
            content = chunk._solve(erase * (chunk.gamma_before * read_keys + inflow))
        gamma = chunk.log_gamma[..., -1].exp()[..., None, None]
        last = self.weights[..., -1, :].unsqueeze(-1)
        end = (
            gamma * state.weight
            + self.carried[..., -1][..., None, None] * start
            - (chunk.to_end * content + last * written).mT @ chunk.keys
        )
        momentum = self.end_carried[..., None, None] * start - (self.to_end * written).mT @ chunk.keys
        return Written(DeltaState(end, momentum), chunk, state, content, written)
