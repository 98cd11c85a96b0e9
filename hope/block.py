"""One block of the trunk (Eq. 94-97): a mixer over time, then the CMS chain, each behind its norm and residual."""

from torch import Tensor, nn

from hope.cms import build_cms
from hope.config import ModelConfig
from hope.documents import Documents
from hope.flops import Flops
from hope.layers import RMSNorm
from hope.self_modifying import MixerState, SelfModifyingTitans
from hope.transformer import Attention


class Block(nn.Module):
    """x [T, B, D] -> (x [T, B, D], state); the state is None for attention mixers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width)
        self.mixer = SelfModifyingTitans(config) if config.kind == "hope" else Attention(config)
        self.cms = build_cms(config)

    def forward(
        self, x: Tensor, state: MixerState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, MixerState | None]:
        mixed, state = self.mixer(self.norm(x), state, documents)
        return self.cms(x + mixed), state

    def flops(self, length: int) -> Flops:
        return self.mixer.flops(length) + self.cms.flops()
