"""The models that benchmarks/throughput.py compares: sizes, equal parameter counts, and megatron-core's GPTModel."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from hope.batch import Batch
from hope.config import CmsConfig, ModelConfig
from hope.matched import match, parameters
from hope.memory.config import MemoryConfig
from hope.memory.linear_config import RULES, LinearConfig
from hope.memory.titans_config import TitansConfig
from hope.mixers.attention import AttentionConfig
from hope.mixers.mamba2 import Mamba2Config
from hope.mixers.titans_attention import GateConfig, LayerConfig
from hope.mixers.titans_context import ContextConfig
from hope.optim.build import build_optimizer
from hope.optim.config import OptimConfig
from hope.optim.levels import parameter_groups
from hope.parameters import Declaration, constant
from parallel.compute.pipeline import Stage, forward_backward
from parallel.compute.replica import build_replica
from parallel.layout.topology import ParallelConfig
from parallel.optimizer.sharded import ShardedOptimizer
from parallel.optimizer.zero import ZeroOptimizer
from parallel.start import groups

FILES = sorted((Path(__file__).resolve().parents[1] / "configs/sizes").glob("*.yaml"))


def trunk_of(path: Path) -> tuple[int, int, int, int]:
    """Width, layers, heads and vocabulary of a file in configs/sizes."""
    model = yaml.safe_load(path.read_text())["model"]
    return model["width"], model["layers"], model["heads"], model["vocab_size"]


# Width, layers, heads, vocabulary of the Transformer++. The others have its trunk, and MLPs as wide as it takes.
SIZES = {"tiny": (32, 2, 2, 64), **{path.stem: trunk_of(path) for path in FILES}}
PATTERNS = {
    "transformer": ["attention"],
    "hope": ["hope"],
    "hope_hybrid": ["hope", "hope", "hope", "attention"],
    "hope_mlp": ["hope"],
    "hope_attention": ["attention"],
}
# Models after papers, as their presets in configs/models say: sections of the mixers that the pattern names.
FAMILY: dict[str, dict[str, Any]] = {
    **{rule: {"linear": LinearConfig(rule=rule)} for rule in RULES},  # type: ignore[arg-type]
    "ttt_linear": {"titans": TitansConfig(rule="ttt_linear")},
    "ttt_mlp": {"titans": TitansConfig(rule="ttt_mlp")},
    "titans_lmm": {"titans": TitansConfig()},
    "titans_mag": {"titans_mag": GateConfig(window=512)},
    "titans_mal": {"titans_mal": LayerConfig(window=512)},
    "titans_mac": {"titans_mac": ContextConfig(segment=128)},
    "mamba2": {"mamba2": Mamba2Config()},
    "samba": {"mamba2": Mamba2Config(), "attention": AttentionConfig(window=512)},
}
GPT = "megatron_gpt"
MODELS = (*PATTERNS, *FAMILY, GPT)
USUAL = tuple(name for name in MODELS if name not in FAMILY)  # those that are compared unless others are named


@dataclasses.dataclass(frozen=True)
class Choices:
    """What models with memories have otherwise than by default: heads, and keys of `model.mixers.hope`."""

    heads: int = 0
    """0: as many as the Transformer++ of the size."""
    hope: tuple[tuple[str, Any], ...] = ()


def model_config(name: str, size: str, choices: Choices = Choices()) -> ModelConfig:
    """A model of this project, matched to the Transformer++ of its size by the width of its MLPs.

    Raises:
        ValueError: no width comes within 2 % of its parameters.
    """
    width, layers, heads, vocabulary = SIZES[size]
    pattern = [*(list(FAMILY[name]) if name in FAMILY else PATTERNS[name]) * layers][:layers]
    memory = MemoryConfig(**{"memory": "mlp" if name == "hope_mlp" else "matrix", **dict(choices.hope)})
    sections: dict[str, Any] = {"mixers": {"hope": memory}} if "hope" in pattern else {}
    if name in FAMILY:
        sections = {"mixers": FAMILY[name]}
    heads = choices.heads or heads if "hope" in pattern else heads
    levels = [1] if name in FAMILY else [1, 4]
    make = lambda periods, hidden: ModelConfig(
        pattern=pattern, vocab_size=vocabulary, width=width, layers=layers, heads=heads,
        cms=CmsConfig(periods=periods, hidden=hidden), **sections,
    )  # fmt: skip
    return make([1], None) if name == "transformer" else match(make(levels, "matched"))


@dataclasses.dataclass
class Contestant:
    """One built model: what a step is made of."""

    optimizer: ShardedOptimizer
    run: Callable[[Sequence[Batch]], Any]
    reduce: Callable[[], None]
    parameters: int
    close: Callable[[], None]

    def step(self, batches: Sequence[Batch]) -> float:
        """A whole training step; the gradient norm, for which the device has finished the backward pass."""
        self.run(batches)
        self.reduce()
        norm: float = sum(n * n for n in self.optimizer.grad_norms().values()) ** 0.5
        self.optimizer.set_lr(1e-4)
        self.optimizer.step(min(1.0, 1 / (norm + 1e-6)))
        return norm


def build(
    name: str,
    size: str,
    seq: int,
    precision: str,
    ranks: groups.Ranks,
    compile: str,
    recompute: str,
    cuda_graphs: bool = False,
    choices: Choices = Choices(),
) -> Contestant:
    """A model with its optimizer on this device, through the code that a run uses."""
    optim, layout = OptimConfig(), ParallelConfig()
    if name == GPT:
        return _build_gpt(size, seq, precision, ranks, optim, layout)
    config = model_config(name, size, choices)
    replica = build_replica(
        config, optim, layout, ranks, seq_len=seq, precision=precision, seed=1, recompute=recompute, compile=compile,
        cuda_graphs=cuda_graphs,
    )  # fmt: skip
    return Contestant(replica.optimizer, replica.run, replica.reduce, parameters(config), replica.close)


class Gpt(nn.Module):
    """megatron-core's GPTModel by its local layer specification, which needs no TransformerEngine.

    Its own attention keeps T x T scores; torch's fused one stands in its place, as in our Transformer++, so that it is
    no weaker than it has to be. Not compared: TransformerEngine's fused norms and attention, and FP8.
    """

    def __init__(self, size: str, seq: int, precision: str) -> None:
        super().__init__()
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.transformer.spec_utils import ModuleSpec
        from megatron.core.transformer.transformer_config import TransformerConfig

        width, layers, heads, vocabulary = SIZES[size]
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = TransformerConfig(
                num_layers=layers, hidden_size=width, num_attention_heads=heads,
                ffn_hidden_size=model_config("transformer", size).hidden_per_level(),
                gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False, normalization="RMSNorm",
                layernorm_epsilon=1e-6, hidden_dropout=0.0, attention_dropout=0.0, bf16=precision == "bf16",
                params_dtype=dtype, pipeline_dtype=dtype, use_cpu_initialization=True,
                cross_entropy_loss_fusion=True, bias_activation_fusion=False, apply_rope_fusion=False,
            )  # fmt: skip
            spec = get_gpt_layer_local_spec(normalization="RMSNorm")
            spec.submodules.self_attention.submodules.core_attention = ModuleSpec(module=_FusedAttention)
            self.gpt = GPTModel(
                config, spec, vocabulary, seq, position_embedding_type="rope",
                share_embeddings_and_output_weights=True,
            )  # fmt: skip
        self.blocks: dict[str, nn.Module] = {}
        for parameter in self.gpt.parameters():
            parameter.declaration = Declaration(constant(0.0), None, "trunk", "elementwise")  # type: ignore[attr-defined]

    def loss(self, batch: Batch) -> Tensor:
        tokens = batch.tokens_TB.T.contiguous()
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        with nullcontext() if tokens.is_cuda else patch("torch.cuda.current_device", lambda: tokens.device):
            # its rotary embedding asks for the current GPU, also where there is none
            losses: Tensor = self.gpt(tokens, position, None, labels=batch.targets_TB.T.contiguous())
        return losses.mean()


class _FusedAttention(nn.Module):
    """What megatron-core calls a core attention: q, k, v [T, B, H, K] -> [T, B, H K]."""

    def __init__(self, *args: Any, **choices: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **choices: Any) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(2)


def _build_gpt(
    size: str, seq: int, precision: str, ranks: groups.Ranks, optim: OptimConfig, layout: ParallelConfig
) -> Contestant:
    torch.manual_seed(1)
    model = Gpt(size, seq, precision).to(ranks.device)
    levels = parameter_groups([model], optim.weight_decay, optim)  # type: ignore[list-item]
    optimizer = ZeroOptimizer(model, build_optimizer(levels, optim), precision, ranks, zero=layout.zero)
    stage = Stage(model, precision)

    def step_fn(model: Gpt, hidden: Tensor | None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = model.loss(batch)
        return loss, {"loss": loss}

    def reduce() -> None:
        optimizer.prepare()
        optimizer.reduce()

    count = sum(p.numel() for p in model.parameters())
    run = lambda batches: forward_backward(stage, batches, step_fn)
    return Contestant(optimizer, run, reduce, count, optimizer.close)
