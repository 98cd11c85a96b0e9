"""One block of the trunk (Eq. 94-97): residual sublayers, a mixer over time first and then the CMS chain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hope.cms import build_cms
from hope.config import ModelConfig
from hope.documents import Documents
from hope.flops import Flops
from hope.layers import RMSNorm
from hope.mixers import Mixer, State
from hope.parameters import scale_outputs
from hope.sublayer import Sublayer

BlockState = tuple[State | None, ...]
"""One state per sublayer, None for those that carry nothing."""


_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
# There are no random numbers, and their generator cannot be asked while a CUDA graph is recorded.
RECOMPUTE = ("none", "memory", "mlp", "sublayer", "block")


class Block(nn.Module):
    """x [T, B, D] -> (x [T, B, D], states of its sublayers).

    Args:
        mixer: name of the mixer, as in `model.pattern`.

    `recompute`: what the backward pass computes again instead of keeping it. "none"; "memory", sublayers in which
    tokens meet, the mixer and levels in context, whose plain chunk loops keep tens of times more per token than an MLP
    does; "mlp", all other sublayers, which are products alone; "sublayer", each sublayer by itself; "block", all of it.
    The inner writes are repeated exactly: they are a function of the block's input, and there are no random numbers.

    `whole`: a compiled `stateless`, or None. It stands in for passes of training that begin every sequence anew, keep
    no state, and have no marks of documents, on which the shapes inside of some mixers depend. All others are made as
    they are: those of evaluation and generation, and of logged steps in which the mixer collects what it reports.
    """

    def __init__(self, config: ModelConfig, mixer: str) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mixer = config.build_mixer(mixer)
        self.cms = build_cms(config)
        if config.depth_scaled_init:
            scale_outputs(self, (config.layers * len(self.sublayers())) ** -0.5)
        self.recompute = "none"
        self.whole: Callable[[Tensor], Tensor] | None = None
        self._reports = type(self.mixer).report is not Mixer.report

    def sublayers(self) -> list[Sublayer]:
        """In order. Made anew for every pass, so that a copy of the block uses its own modules."""
        return [Sublayer(self.norm, self.mixer, mixes=True, start=self.mixer.start), *self.cms.sublayers()]

    def mixing(self) -> dict[str, Mixer]:
        """Every module in which tokens meet, by what to put before names of its own: the mixer, whose are its own, and
        the levels in context."""
        return {"": self.mixer} | {f"in_context{number}.": level.mlp for number, level in enumerate(self.cms.fast())}

    @property
    def compiles_whole(self) -> bool:
        """Whether `train.compile=block` makes one graph of it."""
        return all(part.compiles_whole for part in self.mixing().values())

    def forward(
        self, x: Tensor, states: BlockState | None = None, documents: Documents | None = None, keep_state: bool = True
    ) -> tuple[Tensor, BlockState]:
        """`states`: what the call before returned, or None to start every sequence anew. Without `keep_state` the
        states after the call may be missing."""
        plain = states is None and documents is None and not keep_state
        if self.whole is not None and plain and torch.is_grad_enabled() and not (self.mixer.watched and self._reports):
            if self.recompute == "block":
                return _again(self.whole, x), ()
            return self.whole(x), ()
        before = states or (None,) * len(self.sublayers())
        if self.recompute == "block" and torch.is_grad_enabled():
            again: tuple[Tensor, BlockState] = _again(self._forward, x, before, documents)
            return again
        return self._forward(x, before, documents)

    def stateless(self, x: Tensor) -> Tensor:
        """x after the block, of sequences that begin here."""
        return self._forward(x, (None,) * len(self.sublayers()), None)[0]

    def _forward(self, x: Tensor, states: BlockState, documents: Documents | None) -> tuple[Tensor, BlockState]:
        after = []
        for sublayer, state in zip(self.sublayers(), states, strict=True):
            y, state = self._run(sublayer, x, state, documents)
            x = x + y
            after.append(state)
        return x, tuple(after)

    def _run(
        self, sublayer: Sublayer, x: Tensor, state: State | None, documents: Documents | None
    ) -> tuple[Tensor, State | None]:
        wanted = ("sublayer", "memory" if sublayer.mixes else "mlp")
        result: tuple[Tensor, State | None]
        if self.recompute in wanted and torch.is_grad_enabled():
            result = _again(sublayer, x, state, documents)
        else:
            result = sublayer(x, state, documents)
        return result

    def flops(self, length: int) -> Flops:
        """Per token, forward, at this sequence length."""
        return self.mixer.flops(length) + self.cms.flops(length)
