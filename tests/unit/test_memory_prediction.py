"""Predicted bytes: exact where they can be counted on a CPU. Peaks on a GPU are compared in docs/performance.md."""

from functools import partial
from pathlib import Path

import pytest
import torch
from interpreted import GPU, calls
from models import named
from optims import with_dmgd

from hope.config import CmsConfig, ModelConfig
from hope.heads import ops
from hope.heads.kernels import HeadsChoice
from hope.memory.config import MemoryConfig
from hope.memory.fused_scan import fused_scan
from hope.memory.kernels import ScanChoice
from hope.memory.two_layer import ops as two_layer
from hope.mixers import self_modifying
from hope.model import Model, Slice, next_token_loss
from hope.optim.build import build_optimizer
from hope.optim.config import MuonConfig, OptimConfig
from hope.optim.levels import parameter_groups
from parallel.layout.memory import StepShape, activation_bytes, build_part, part_activations, rank_memory


def config(kind: str = "hope", memory: str = "matrix", layers: int = 4) -> ModelConfig:
    memories = MemoryConfig(memory=memory, projection_chunk=4, main_chunk=8)
    cms = CmsConfig(periods=[1, 4], hidden=16)
    return named(kind, memory=memories, vocab_size=64, width=32, layers=layers, heads=4, cms=cms)


slow = partial(pytest.param, marks=pytest.mark.slow)
KINDS = [("hope", "matrix"), ("hope", "mlp"), ("hope_attention", "matrix"), ("transformer", "matrix")]


@pytest.mark.parametrize("recompute", ["none", *map(slow, ("memory", "mlp")), "block"])
@pytest.mark.parametrize(("kind", "memory"), KINDS)
def test_one_block_stands_for_all_of_them(kind, memory, recompute):
    model, shape = config(kind, memory), StepShape(64, 2, False, recompute=recompute)  # 8 chunks
    for part in (Slice(0, 4), Slice(0, 2), Slice(1, 3), Slice(3, 4)):
        assert part_activations(model, part, shape) == activation_bytes(build_part(model, part, shape), shape)


def really_kept(settings: ModelConfig, length: int) -> int:
    """Bytes that autograd keeps for the backward pass of two sequences."""
    model = Model(settings).initialise(0)
    kept: dict[int, torch.Tensor] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    tokens = torch.zeros(length, 2, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        loss = next_token_loss(model(tokens)[0], tokens)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), tokens)}
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


@pytest.mark.parametrize("memory", ["matrix", "mlp"])
def test_activations_are_what_autograd_really_keeps(memory):
    settings = config(memory=memory)
    predicted = part_activations(settings, Slice(0, 4), StepShape(16, 2, False))
    assert predicted == pytest.approx(really_kept(settings, 16), rel=0.02)


@pytest.fixture
def interpreter(monkeypatch):
    yield from calls(monkeypatch)


@pytest.mark.skipif(GPU, reason="kernels are compiled for the GPU, not interpreted")
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow")
@pytest.mark.parametrize("chunk", [64, slow(128)])
def test_a_fused_run_is_predicted_with_what_its_kernels_keep(chunk, monkeypatch, interpreter):
    """A GPU has the kernels, the machine that predicts may not. With TF32, as fp32 heads take them."""
    monkeypatch.setattr("hope.memory.kernels.CHUNKS", (64, 128))
    cms, memory = CmsConfig(periods=[1], hidden=16), MemoryConfig(projection_chunk=chunk, main_chunk=chunk)
    settings = named("hope", memory=memory, vocab_size=64, width=128, layers=2, heads=2, cms=cms)
    predict = lambda: part_activations(settings, Slice(0, 2), StepShape(128, 2, False))
    plain = predict()  # fp32 products without TF32: the kernels refuse them
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    fused = predict()
    choice = ScanChoice(partial(fused_scan, operands=torch.float32, precision="ieee"), "fused")
    monkeypatch.setattr(self_modifying, "scan_for", lambda *_: choice)
    heads = HeadsChoice(ops.memory_input, ops.merge_heads, "fused")
    monkeypatch.setattr(self_modifying, "heads_for", lambda *_: heads)
    assert fused == pytest.approx(really_kept(settings, 128), rel=0.02)
    assert fused < 0.8 * plain


def test_what_the_kernels_of_mlp_memories_keep_is_predicted(monkeypatch):
    """From the op's fake, on the meta device: as many bytes as autograd keeps, and fewer than of the plain loop. What
    the op keeps does not hang on how its stages are computed: here by formulas."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from mlp_stages import Formulas

    cms = CmsConfig(periods=[1], hidden=16)
    memories = MemoryConfig(memory="mlp", projection_chunk=16, main_chunk=16)
    settings = named("hope", memory=memories, vocab_size=64, width=32, layers=2, heads=2, cms=cms)
    length = 16 * 5 * two_layer.GROUP  # five groups, predicted from two and from three
    predict = lambda: part_activations(settings, Slice(0, 2), StepShape(length, 2, False))
    plain = predict()
    form = partial(two_layer.two_layer_scan, operands=torch.float32, precision="ieee")
    monkeypatch.setattr(self_modifying, "scan_for", lambda *_: ScanChoice(form, "fused"))
    monkeypatch.setattr(two_layer, "_stages", Formulas)
    monkeypatch.setattr(self_modifying, "heads_for", lambda *_: HeadsChoice(None, None, "plain"))  # on both devices
    fused = predict()
    assert fused == pytest.approx(really_kept(settings, length), rel=1e-4)
    assert fused < 0.5 * plain


def test_bytes_of_weights_and_states():
    settings = config()
    numbers = sum(p.numel() for p in Model(settings).parameters())
    slow = sum(p.numel() for n, p in Model(settings).named_parameters() if ".cms.levels.1." in n)
    whole = rank_memory(settings, [Slice(0, 4)], 1, StepShape(16, 2, True), OptimConfig())
    assert whole.weights == 2 * numbers
    assert whole.gradients == 4 * numbers
    assert whole.optimizer == 4 * (3 * numbers + slow)  # master, memory, squares; the slow level's accumulator
    halves = rank_memory(settings, [Slice(0, 4)], 1, StepShape(16, 2, True, data=2), OptimConfig())
    assert halves.optimizer == whole.optimizer // 2
    sharded = rank_memory(settings, [Slice(0, 4)], 1, StepShape(16, 2, True, tensor=2), OptimConfig())
    assert sharded.fast_weights == whole.fast_weights // 2
    assert whole.weights / 2 < sharded.weights < 0.55 * whole.weights  # norms are on every rank
    assert whole.loss == 4 * 16 * 2 * settings.vocab_size
    assert sharded.loss == 0  # made in place of the probabilities


@pytest.mark.parametrize(
    ("optim", "numbers"),
    [
        (OptimConfig(), 2),
        (with_dmgd(objective="dot", preconditioner="none"), 1),
        (with_dmgd(memory="mlp"), 2),
        (with_dmgd(memory="scalar"), 2),
        (with_dmgd(memory="mlp_only", mlp_key="gradient"), 1),
        (OptimConfig(name="muon"), 1),
        (OptimConfig(name="muon", muon=MuonConfig(memory="mlp")), 1),
        (OptimConfig(name="muon", muon=MuonConfig(memory="scalar")), 1),
        (OptimConfig(name="m3"), 5),
    ],
    ids=["adamw", "sgd", "mlp", "scalar", "mlp_only", "muon", "muon mlp", "muon scalar", "m3"],
)
def test_states_of_every_optimizer(optim, numbers):
    """What the optimizer allocates, and how many numbers that is per weight of a matrix in a level that never waits."""
    settings = config()
    model = Model(settings)
    optimizer = build_optimizer(parameter_groups(model, 0.1, optim), optim)
    optimizer.allocate_states()
    size = sum(4 * t.numel() for state in optimizer.state.values() for t in state.values())
    masters = 4 * sum(p.numel() for p in model.parameters())
    assert rank_memory(settings, [Slice(0, 4)], 1, StepShape(16, 2, True), optim).optimizer == size + masters
    matrix = model.blocks["0"].cms.levels[0].mlp.up.weight
    whole = optimizer.per_tensor_keys
    assert sum(t.numel() for k, t in optimizer.state[matrix].items() if k not in whole) == numbers * matrix.numel()


def test_a_level_that_communicates_when_due_keeps_its_sums_undivided():
    settings = config()
    slow = sum(p.numel() for n, p in Model(settings).named_parameters() if ".cms.levels.1." in n)
    shape = StepShape(16, 2, True, data=4)
    sharded, local = (
        rank_memory(settings, [Slice(0, 4)], 1, shape, OptimConfig(accumulate=mode)).optimizer
        for mode in ("sharded", "local")
    )
    assert local - sharded == pytest.approx(4 * slow * 3 / 4, abs=16)
