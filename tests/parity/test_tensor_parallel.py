"""Tensor and sequence parallelism against one device: every gradient, joined over the ranks, in float64.

float64 leaves no room for a small error to hide: the sums differ in order only. The loss of a sharded vocabulary is
megatron-core's, in fp32, so its tests allow fp32's rounding.
"""

import pytest
import torch
from models import named
from multirank import run_ranks
from spoilers import forget

from hope.config import CmsConfig, ModelConfig
from hope.memory.config import MemoryConfig
from hope.memory.in_context_config import InContextConfig
from hope.mixers.attention import AttentionConfig
from hope.model import Model, next_token_loss
from parallel.compute.gradients import combine_over_tensor_ranks
from parallel.compute.tensor import shard_model, sharded_loss
from parallel.layout.plan import layout_of
from parallel.layout.topology import ParallelConfig
from parallel.start import groups

TENSOR = {"fp64": 1e-12, "fp32": 2e-5}


def config(kind: str, memory: str = "matrix", variant: str = "sequential", **mixer) -> ModelConfig:
    return named(
        kind,
        vocab_size=64,
        width=32,
        layers=2,
        heads=4,
        memory=MemoryConfig(memory=memory, projection_chunk=4, main_chunk=8, **mixer),
        cms=CmsConfig(variant, [1, 2]),
    )


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (17, 2), generator=torch.Generator().manual_seed(0))


def starts() -> torch.Tensor:
    found = torch.zeros(16, 2, dtype=torch.bool)
    found[0], found[5, 1] = True, True
    return found


def hidden_loss(model: Model, ids: torch.Tensor, begin: torch.Tensor | None, tp_size: int, dtype: torch.dtype):
    """In float64 a loss over this rank's scores that sums to one over all scores; in fp32 the real one."""
    logits, _ = model(ids[:-1], starts=begin)
    if dtype == torch.float32:
        return sharded_loss(logits, ids[1:], tp_size)
    first = model.embedding.first_row
    weight = torch.linspace(-1, 1, 64, dtype=logits.dtype)[first : first + logits.shape[-1]]
    return (logits.square() * weight).sum()


def reference(settings: ModelConfig, dtype: torch.dtype, begin: torch.Tensor | None) -> dict[str, torch.Tensor]:
    model = Model(settings).initialise(3).to(dtype)
    ids = tokens()
    if dtype == torch.float32:
        loss = next_token_loss(model(ids[:-1], starts=begin)[0], ids[1:])
    else:
        loss = hidden_loss(model, ids, begin, 1, dtype)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def on_rank(
    settings: ModelConfig, size: int, sequence: bool, dtype: torch.dtype, packed: bool, spoil: str = ""
) -> float:
    """Worst relative gradient error over all parameters; `spoil` is a parameter pattern whose rule is broken."""
    torch.set_num_threads(1)
    with groups.start(ParallelConfig(tensor=size, sequence=sequence)) as ranks:
        if spoil:
            forget(spoil)()
        rank = ranks.rank % size
        model = shard_model(Model(settings).initialise(3).to(dtype), rank, size, sequence)
        hidden_loss(model, tokens(), starts() if packed else None, size, dtype).backward()
        group = groups.tensor_group()
        combine_over_tensor_ranks([model], lambda p: p.grad, sequence, group)
        worst, whole = 0.0, reference(settings, dtype, starts() if packed else None)
        for name, parameter in model.named_parameters():
            parts = [torch.empty_like(parameter.grad) for _ in range(size)]
            torch.distributed.all_gather(parts, parameter.grad.contiguous(), group=group)
            layout = layout_of(parameter, name)
            joined = parts[0] if layout.dim is None else layout.join(parts)
            for part in parts if layout.dim is None else [joined]:
                error = (part.reshape_as(whole[name]) - whole[name]).norm() / whole[name].norm()
                worst = max(worst, error.item())
        return worst


CASES = [
    ("hope", "matrix", "sequential"),
    ("hope", "mlp", "independent"),
    ("hope_attention", "matrix", "independent"),
    ("transformer", "matrix", "sequential"),
]


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize(("kind", "memory", "variant"), CASES, ids=lambda v: str(v))
def test_gradients_equal_one_device(kind, memory, variant, sequence):
    args = (config(kind, memory, variant), 2, sequence, torch.float64, False)
    assert max(run_ranks(on_rank, 2, *args, timeout=120)) <= TENSOR["fp64"]


@pytest.mark.parametrize("packed", [False, True])
def test_normed_queries_and_keys_in_a_window(packed):
    """Each rank has the gradient of the two norms from its own heads only."""
    settings = config("hope_attention")
    settings.mixers = {"attention": AttentionConfig(qk_norm=True, window=5)}
    assert max(run_ranks(on_rank, 2, settings, 2, True, torch.float64, packed, timeout=120)) <= TENSOR["fp64"]


LEVELS = {
    "sequential": [InContextConfig(chunk=4, rate=0.5), InContextConfig(chunk=5, objective="target", read="causal")],
    "independent": [InContextConfig(chunk=3, objective="target", hidden=5), InContextConfig(chunk=8, rate=0.5)],
    "nested": [InContextConfig(chunk=chunk, rate=0.5) for chunk in (2, 6)],
}


@pytest.mark.parametrize(
    "variant", ["nested", *(pytest.param(v, marks=pytest.mark.slow) for v in ("sequential", "independent"))]
)
def test_levels_in_context_and_packed_documents(variant):
    settings = config("hope_attention")
    settings.cms = CmsConfig(variant, [1, 2], in_context=LEVELS[variant])
    assert max(run_ranks(on_rank, 2, settings, 2, True, torch.float64, True, timeout=120)) <= TENSOR["fp64"]


PARTS = {"static": "projected", "output_gate": "sigmoid", "alpha_spread": 2.0, "erase_max": 1.9}


@pytest.mark.parametrize("memory", ["matrix", "mlp"])
def test_every_part_that_is_off_by_default_and_packed_documents(memory):
    """Each head has an alpha of its own to start from, so that a rank with another head's would be seen."""
    settings = config("hope", memory, **PARTS)
    assert max(run_ranks(on_rank, 2, settings, 2, True, torch.float64, True, timeout=120)) <= TENSOR["fp64"]


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "tp+sp"])
def test_four_ranks_packed_documents_and_the_real_loss(sequence):
    assert max(run_ranks(on_rank, 4, config("hope"), 4, sequence, torch.float64, True, timeout=120)) <= TENSOR["fp64"]
    assert max(run_ranks(on_rank, 4, config("hope"), 4, sequence, torch.float32, True, timeout=120)) <= TENSOR["fp32"]


SUMMED = ["norm.weight", "blocks.*.norm.weight", "blocks.*.mixer.norm.weight", "blocks.*.cms.levels.*.norm.weight",
          "blocks.*.cms.aggregate"]  # fmt: skip


@pytest.mark.parametrize("pattern", SUMMED)
def test_a_forgotten_sum_is_seen(pattern):
    """Under sequence parallelism every replicated parameter has a partial gradient; leaving out one sum is an error."""
    args = (config("hope", "matrix", "independent"), 2, True, torch.float64, False, pattern)
    assert max(run_ranks(on_rank, 2, *args, timeout=120)) > 1e-3
