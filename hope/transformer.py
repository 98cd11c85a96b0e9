"""Softmax attention with rotary embedding: the mixer of Transformer++ (the control) and of HOPE-Attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hope.config import ModelConfig
from hope.documents import Documents
from hope.flops import Flops
from hope.layers import Linear, rotate


class Attention(nn.Module):
    """Causal multi-head attention, x [T, B, D] -> y [T, B, D]; documents of a packed row do not see each other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_base, width = config.head_dim, config.rope_base, config.width
        self.query, self.key, self.value = Linear(width, width), Linear(width, width), Linear(width, width)
        self.output = Linear(width, width)
        self.enter, self.leave = nn.Identity(), nn.Identity()

    def forward(self, x_TBD: Tensor, state: None = None, documents: Documents | None = None) -> tuple[Tensor, None]:
        """Raises ValueError if a state is handed in: attention keeps none between calls."""
        if state is not None:
            raise ValueError("attention carries no state between calls; pass state=None")
        x_TBD = self.enter(x_TBD)
        heads = lambda z: z.unflatten(-1, (-1, self.head_dim)).permute(1, 2, 0, 3)
        q = rotate(heads(self.query(x_TBD)), self.rope_base)
        k = rotate(heads(self.key(x_TBD)), self.rope_base)
        v = heads(self.value(x_TBD))
        mask = None if documents is None else documents.attention_mask()
        y_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        merged = y_BHTK.permute(2, 0, 1, 3).flatten(-2)
        return self.leave(self.output(merged)), None

    def flops(self, length: int) -> Flops:
        """Per token, forward; causal scores count half of the square."""
        dense = self.query.flops() + self.key.flops() + self.value.flops() + self.output.flops()
        return dense + Flops(2.0 * length * torch.numel(self.query.weight[0]))
