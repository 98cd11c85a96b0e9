"""One block of the trunk (Eq. 94-97): a mixer over time, then the CMS chain, each behind its norm and residual."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hope.cms import build_cms
from hope.config import ModelConfig
from hope.documents import Documents
from hope.flops import Flops
from hope.layers import RMSNorm
from hope.self_modifying import MixerState, SelfModifyingTitans
from hope.transformer import Attention


class Block(nn.Module):
    """x [T, B, D] -> (x [T, B, D], state); the state is None for attention mixers.

    `recompute`: what the backward pass computes again instead of keeping it. "none"; "block", all of it; "memory", the
    mixer only: the chunk loop keeps tens of times more per token than an MLP does. The inner writes are repeated
    exactly: they are a function of the block's input, and no random numbers are involved.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width)
        self.mixer = SelfModifyingTitans(config) if config.kind == "hope" else Attention(config)
        self.cms = build_cms(config)
        self.recompute = "none"

    def forward(
        self, x: Tensor, state: MixerState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, MixerState | None]:
        if self.recompute == "block" and torch.is_grad_enabled():
            return checkpoint(self._forward, x, state, documents, use_reentrant=False)
        return self._forward(x, state, documents)

    def _forward(
        self, x: Tensor, state: MixerState | None, documents: Documents | None
    ) -> tuple[Tensor, MixerState | None]:
        normed = self.norm(x)
        if self.recompute == "memory" and torch.is_grad_enabled():
            mixed, state = checkpoint(self.mixer, normed, state, documents, use_reentrant=False)
        else:
            mixed, state = self.mixer(normed, state, documents)
        return self.cms(x + mixed), state

    def flops(self, length: int) -> Flops:
        return self.mixer.flops(length) + self.cms.flops()
