"""The fused kernels against the plain rules: on a GPU, and through triton's interpreter where there is none."""

import pytest
import torch
from interpreted import GPU, calls
from optims import with_dmgd

from hope.optim import coordinate_memory as memory
from hope.optim import dmgd, fused, kernels
from hope.optim.config import OptimConfig
from hope.optim.dmgd import Dmgd
from hope.optim.kernels import Choice, Kernels
from hope.optim.rules import Rates, Stretch, UpdateRule, Whole
from hope.optim.segments import Piece, Segments

# numpy's, for the branch of a `where` that is not taken
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")
devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no CUDA device")]),
        pytest.param("cpu", marks=pytest.mark.skipif(GPU, reason="kernels are compiled for the GPU, not interpreted")),
    ],
)

MLP = with_dmgd(memory="mlp", mlp_lr=0.2, lr=0.02, eps=1e-6, mlp_width=3)
CONFIGS = {
    "linear": with_dmgd(MLP, memory="linear"),
    "linear dot": with_dmgd(MLP, memory="linear", objective="dot", preconditioner="none"),
    "linear value": with_dmgd(MLP, memory="linear", normalise="value"),
    "linear clip": with_dmgd(MLP, memory="linear", output="rms_clip", output_bound=1.0),
    "linear erase": with_dmgd(MLP, memory="linear", erase=0.5, bias_correction=False),
    "memory": MLP,
    "memory dot": with_dmgd(MLP, objective="dot"),
    "memory value": with_dmgd(MLP, normalise="value"),
    "memory none": with_dmgd(MLP, preconditioner="none"),
    "gradient": with_dmgd(MLP, mlp_key="gradient"),
    "gradient value": with_dmgd(MLP, mlp_key="gradient", normalise="value"),
    "gradient none dot": with_dmgd(MLP, mlp_key="gradient", preconditioner="none", objective="dot"),
    "all": with_dmgd(MLP, output="rms_clip", erase=0.5, bias_correction=False, normalise="value"),
    "all gradient": with_dmgd(MLP, mlp_key="gradient", output="rms_clip", erase=0.5, bias_correction=False),
    "default width": with_dmgd(MLP, mlp_width=8),
    "more than one division": with_dmgd(MLP, mlp_width=11),
    "one unit": with_dmgd(MLP, mlp_width=1),
}

# Tensor 0 in two pieces, tensor 2 silent, tensor 3 without a piece here, padding between and behind.
UNEVEN = Segments(4, (Piece(0, 3, 300), Piece(1, 303, 141), Piece(2, 444, 50), Piece(0, 507, 217)))
ALIGNED = Segments(4, (Piece(1, 16, 144), Piece(0, 160, 320), Piece(2, 496, 48), Piece(0, 544, 160)))
cases = pytest.mark.parametrize(
    ("name", "segments"),
    [pytest.param(name, UNEVEN, id=name) for name in CONFIGS]
    + [pytest.param(name, ALIGNED, id=f"{name}, aligned") for name in ("linear clip", "default width")],
)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    yield from calls(monkeypatch)


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    """So that small tensors have several programs, and these several blocks."""
    monkeypatch.setattr(fused, "_SPAN", {"network": 160, "linear": 160})
    blocks = {"update": 64, "sums": 64}
    monkeypatch.setattr(fused, "_BLOCK", {"network": blocks, "linear": blocks})


def problem(
    config: OptimConfig, segments: Segments, device: str, numel: int = 733
) -> tuple[UpdateRule, Stretch, Rates, Whole]:
    """The middle of a training, drawn."""
    rule, generator = UpdateRule.of(config), torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    g = draw(numel) * 1e-3
    g[310], g[320] = 1.0, 0.0  # beyond the features' bounds; a silent coordinate
    s, v = draw(numel) * 1e-3, (1e-3 * (0.5 + draw(numel).abs())).square()
    for piece in segments.pieces:
        if piece.tensor == 2:
            for t in (g, s, v):
                t[piece.start : piece.start + piece.numel] = 0
    networks = draw(4, 0)
    if rule.width:
        networks = memory.initial(rule.features, rule.width, torch.device("cpu")) + 0.3 * draw(4, rule.size)
    x = Stretch(draw(numel) * 0.02, s, v if rule.adam else None, g)
    whole = Whole(networks, torch.tensor([1.1e-3, 9e-4, 0.0, 1e-3]))
    rates = Rates.of(config, {"lr": 0.02, "weight_decay": 0.1, "updates": 5}, 0.7)
    return rule, to(x, device=device), rates, to(whole, device=device)


def to(tensors, **kwargs):
    """A copy, `Stretch` or `Whole`, elsewhere or in another type."""
    return type(tensors)(*(None if t is None else t.to(copy=True, **kwargs) for t in tensors))


@devices
@cases
def test_update_is_the_rules(name, segments, device):
    check_update(*problem(CONFIGS[name], segments, device), segments)


@devices
@cases
def test_sums_are_the_rules(name, segments, device):
    check_sums(*problem(CONFIGS[name], segments, device), segments)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("name", ["linear", "linear clip", "default width", "gradient"])
@pytest.mark.parametrize("factor", [1000, 1001], ids=["aligned", "uneven"])
def test_large_tensors_in_the_kernels_own_spans_and_blocks(name, factor, monkeypatch):
    monkeypatch.undo()
    pieces = (Piece(p.tensor, p.start * factor, p.numel * factor) for p in UNEVEN.pieces)
    segments = Segments(UNEVEN.tensors, tuple(pieces))
    check_update(*problem(CONFIGS[name], segments, "cuda", 733 * factor), segments)
    check_sums(*problem(CONFIGS[name], segments, "cuda", 733 * factor), segments)


def check_update(rule: UpdateRule, x: Stretch, rates: Rates, whole: Whole, segments: Segments) -> None:
    start, exact = to(x), to(x, dtype=torch.float64)
    fused.update(rule, x, segments, rates, whole)
    kernels.update(rule, exact, segments, rates, to(whole, dtype=torch.float64))
    assert not torch.equal(x.p, start.p)
    for found, expected, before in zip(x, exact, start, strict=True):
        if found is not None:
            size = (expected - before).abs().median().item()  # of what an update changes
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * size)
    padding = torch.ones_like(x.p, dtype=torch.bool)
    for piece in segments.pieces:
        padding[piece.start : piece.start + piece.numel] = False
    assert padding.any()
    assert all(torch.equal(a[padding], b[padding]) for a, b in zip(x, start, strict=True) if a is not None)


def check_sums(rule: UpdateRule, x: Stretch, rates: Rates, whole: Whole, segments: Segments) -> None:
    start = to(x)
    found = fused.sums(rule, x, segments, rates, whole)
    expected = kernels.sums(rule, to(x, dtype=torch.float64), segments, rates, to(whole, dtype=torch.float64))
    assert found.dtype == torch.float64
    assert torch.equal(found[:, 0], expected[:, 0])
    torch.testing.assert_close(found[:, :3], expected[:, :3], rtol=1e-5, atol=0)
    assert ((found - expected)[:, 3:].norm(dim=1) <= 1e-5 * expected[:, 3:].norm(dim=1)).all()
    assert torch.equal(found, fused.sums(rule, x, segments, rates, whole))  # a resumed run is bit-equal
    assert all(torch.equal(a, b) for a, b in zip(x, start, strict=True) if a is not None)


@devices
@pytest.mark.parametrize("key", ["memory", "gradient"])
def test_turning_all_signs_turns_the_update(key, device):
    rule, x, rates, whole = problem(with_dmgd(MLP, mlp_key=key), UNEVEN, device)
    turned = Stretch(-x.p, -x.s, x.v.clone(), -x.g)
    fused.update(rule, x, UNEVEN, rates, whole)
    fused.update(rule, turned, UNEVEN, rates, whole)
    assert torch.equal(turned.p, -x.p)


def descend(config: OptimConfig, device: str) -> list[torch.Tensor]:
    """Parameters, states and statistics after four steps, the third of them watched."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)
    master, vector = torch.nn.Parameter(draw(733)), torch.nn.Parameter(draw(37))
    optimizer = Dmgd([{"params": [master], "weight_decay": 0.1}, {"params": [vector], "vectors": True}], config)
    optimizer.segments[master] = UNEVEN
    statistics = []
    for step in range(4):
        master.grad, vector.grad = draw(733) + master.detach(), draw(37) + vector.detach()
        optimizer.watch(step == 2)
        optimizer.step()
        statistics += list(optimizer.measured.values())
    states = [t for p in (master, vector) for t in optimizer.state[p].values()]
    return [t.double() for t in (master.detach(), vector.detach(), *states, *statistics)]


@devices
@pytest.mark.parametrize("name", ["linear", "memory", "all gradient"])
def test_a_training_is_the_same(name, device, monkeypatch):
    monkeypatch.setattr(dmgd, "kernels_for", lambda rule, x: Choice(Kernels(kernels.update, kernels.sums), "plain"))
    plain = descend(CONFIGS[name], device)
    monkeypatch.setattr(dmgd, "kernels_for", lambda rule, x: Choice(Kernels(fused.update, fused.sums), "fused"))
    found = descend(CONFIGS[name], device)
    assert len(plain) == len(found)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-5, atol=5e-5 * b.abs().max().item())


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_offsets_beyond_two_to_the_31(monkeypatch):
    """Also the kernels' own spans and blocks."""
    monkeypatch.undo()
    start, numel = 2**31 + 5, 100_001
    if torch.cuda.mem_get_info()[0] < 4 * 4 * (start + numel) + 2**30:
        pytest.skip("less than 36 GB of free GPU memory")
    segments, rates = Segments(1, (Piece(0, start, numel),)), problem(MLP, UNEVEN, "cuda")[2]
    tensors = [torch.empty(start + numel, device="cuda") for _ in range(4)]
    here = Stretch(*(t[start:] for t in tensors))
    for t in here:
        t.normal_(std=1e-3)
    here.v.square_()
    rule = UpdateRule.of(MLP)
    whole = Whole(torch.randn(1, rule.size, device="cuda"), torch.full((1,), 1e-3, device="cuda"))
    exact, alone = to(here, dtype=torch.float64), Segments.single(here.p)
    expected = kernels.sums(rule, exact, alone, rates, to(whole, dtype=torch.float64))
    kernels.update(rule, exact, alone, rates, to(whole, dtype=torch.float64))
    found = fused.sums(rule, Stretch(*tensors), segments, rates, whole)
    assert (found - expected)[:, 2:].norm() <= 1e-5 * expected[:, 2:].norm()
    fused.update(rule, Stretch(*tensors), segments, rates, whole)
    torch.testing.assert_close(here.p.double(), exact.p, rtol=1e-5, atol=1e-7)
