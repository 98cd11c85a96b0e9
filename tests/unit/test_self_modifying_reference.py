"""The chunk-parallel mixer equals the token-by-token reference: outputs and all gradients, in float64.

hope-math invariants 1 (chunk-parallel = token loop), 2 (C = 1), 9 (causality), 10 (state carry), 11 (batch).
"""

import itertools

import pytest
import torch
from reference import mixer_reference

from hope.memory.config import MemoryConfig
from hope.mixers import Trunk
from hope.mixers.self_modifying import SelfModifyingTitans
from hope.parameters import initialise

TOLERANCE = 1e-12


def build(seed: int = 0, **memory) -> SelfModifyingTitans:
    memory.setdefault("eta_max", 0.5)  # larger than the default, so that writes matter in a short sequence
    mixer = SelfModifyingTitans(Trunk(12, 2, 1), MemoryConfig(**memory)).double()
    initialise(mixer, seed)
    with torch.no_grad():  # away from the special initial values: identity convolutions, unit norms, saturated alpha
        generator = torch.Generator().manual_seed(seed)
        for p in mixer.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        mixer.alpha_bias.copy_(torch.tensor([1.0, 3.0]))
    return mixer


def inputs(length: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, batch, 12, generator=generator, dtype=torch.float64)


def outputs_and_gradients(function, mixer, x):
    x = x.clone().requires_grad_()
    mixer.zero_grad()
    y = function(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    return {"y": y.detach(), "x": x.grad, **{n: p.grad.clone() for n, p in mixer.named_parameters()}}


def assert_equal(fast: dict, slow: dict, tolerance: float = TOLERANCE) -> None:
    assert fast.keys() == slow.keys()
    for name in slow:
        scale = slow[name].abs().max()
        assert scale > 0, f"{name}: the reference is zero, nothing is compared"
        error = (fast[name] - slow[name]).abs().max() / scale
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


CASES = [
    pytest.param({"projection_chunk": p, "main_chunk": m}, length, id=f"C{p}-{m}-T{length}")
    for p, m, length in [
        (1, 1, 9),
        (2, 2, 10),
        (5, 5, 13),
        (16, 16, 13),
        (4, 8, 19),
        (8, 4, 19),
        (1, 4, 9),
        (6, 2, 13),
    ]
]
VARIANTS = [
    {"read": "boundary"},
    {"static": "identity"},
    {"static": "none"},
    {"static": "projected"},
    {"static": "projected", "normalise_values": False, "eta_max": 0.05, "main_chunk": 8, "output_gate": "sigmoid"},
    {"output_gate": "sigmoid"},
    {"normalise_values": False, "eta_max": 0.05},
    {"erase": "input"},
    {"erase": "objective"},
    {"erase": "none"},
    {"erase_max": 1.9},
    {"erase_max": 1.9, "erase": "input", "main_chunk": 8, "momentum": 0.7, "eta_max": 0.2},
    {"adaptive_query": True},
    {"self_made": "not_k"},
    {"self_made": "not_v", "adaptive_query": True},
    {"self_made": "gates", "static": "projected"},
    {"momentum": 0.7, "eta_max": 0.2},
    {"momentum": 0.7, "eta_max": 0.2, "erase": "none"},
    {"momentum": 0.7, "eta_max": 0.2, "read": "boundary", "main_chunk": 8},
    {"expansion": 2},
]
FORGET = pytest.mark.parametrize("forget", ["initial", "zero"])


@FORGET
@pytest.mark.parametrize("kind", ["matrix", "mlp"])
@pytest.mark.parametrize(("chunks", "length"), CASES)
def test_equals_token_loop(kind, chunks, length, forget):
    mixer = build(memory=kind, forget=forget, **chunks)
    fast = outputs_and_gradients(lambda x: mixer(x)[0], mixer, inputs(length))
    slow = outputs_and_gradients(lambda x: mixer_reference(mixer, x), mixer, inputs(length))
    assert_equal(fast, slow)


@FORGET
@pytest.mark.parametrize("kind", ["matrix", "mlp"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()))
def test_variants_equal_token_loop(kind, variant, forget):
    mixer = build(memory=kind, forget=forget, **{"projection_chunk": 4, "main_chunk": 4, **variant})
    fast = outputs_and_gradients(lambda x: mixer(x)[0], mixer, inputs(11))
    slow = outputs_and_gradients(lambda x: mixer_reference(mixer, x), mixer, inputs(11))
    assert_equal(fast, slow)


@pytest.mark.parametrize("kind", ["matrix", "mlp"])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("chunks", [(4, 4), (2, 4), (4, 2)])
@FORGET
def test_state_carried_across_a_split(kind, momentum, chunks, forget):
    """forward(x) equals forward(x[:a]) then forward(x[a:], state) where a is a multiple of both chunks."""
    clocks = {"projection_chunk": chunks[0], "main_chunk": chunks[1]}
    mixer = build(memory=kind, forget=forget, momentum=momentum, eta_max=0.2, **clocks)

    def split(x):
        first, state = mixer(x[:8])
        second, _ = mixer(x[8:], state)
        return torch.cat([first, second])

    whole = outputs_and_gradients(lambda x: mixer(x)[0], mixer, inputs(18))
    assert_equal(outputs_and_gradients(split, mixer, inputs(18)), whole)


@pytest.mark.parametrize("kind", ["matrix", "mlp"])
@pytest.mark.parametrize("variant", [{}, {"momentum": 0.6}, {"static": "projected"}, {"erase_max": 1.9}], ids=str)
@FORGET
def test_packed_documents_equal_documents_alone(kind, variant, forget):
    from hope.documents import Documents

    clocks = {"projection_chunk": 4, "main_chunk": 4}
    mixer = build(memory=kind, forget=forget, eta_max=0.2, **clocks, **variant)
    starts = torch.zeros(17, 2, dtype=torch.bool)
    for t, b in [(0, 0), (5, 0), (6, 0), (14, 0), (0, 1), (9, 1)]:
        starts[t, b] = True

    def alone(x):
        rows = []
        for b, cuts in enumerate([(0, 5, 6, 14, 17), (0, 9, 17)]):
            pieces = [mixer_reference(mixer, x[s:e, b : b + 1]) for s, e in itertools.pairwise(cuts)]
            rows.append(torch.cat(pieces))
        return torch.cat(rows, 1)

    packed = outputs_and_gradients(lambda x: mixer(x, None, Documents(starts))[0], mixer, inputs(17))
    assert_equal(packed, outputs_and_gradients(alone, mixer, inputs(17)))


def test_unmarked_row_start_continues_the_carried_state():
    """A document that goes on from the previous call keeps its memories; a start in the middle drops them."""
    from hope.documents import Documents

    mixer = build(projection_chunk=4, main_chunk=4)
    x = inputs(20, batch=1)
    whole, _ = mixer(x[:14])
    last = mixer(x[14:])[0]
    first, state = mixer(x[:8])
    starts = torch.zeros(12, 1, dtype=torch.bool)
    starts[6] = True
    second, _ = mixer(x[8:], state, Documents(starts))
    torch.testing.assert_close(torch.cat([first, second]), torch.cat([whole, last]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["matrix", "mlp"])
@pytest.mark.parametrize("read", ["causal", "boundary"])
def test_causal(kind, read):
    """Outputs at t do not move when later tokens are edited."""
    mixer, x = build(memory=kind, projection_chunk=4, main_chunk=8, read=read), inputs(16)
    edited = x.clone()
    edited[10:] += 1.0
    before, after = mixer(x)[0], mixer(edited)[0]
    assert torch.equal(before[:10], after[:10])
    assert (before[10:] - after[10:]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["matrix", "mlp"])
def test_boundary_read_sees_no_write_of_its_own_chunk(kind):
    """Inside a chunk a boundary read depends on earlier tokens through the convolution only, a causal one through M."""
    moved = {}
    for read in ("boundary", "causal"):
        mixer = build(memory=kind, projection_chunk=8, main_chunk=8, read=read, conv_width=1)
        x = inputs(8)
        edited = x.clone()
        edited[2] += 1.0
        moved[read] = (mixer(x)[0] - mixer(edited)[0])[3:].abs().max().item()
    assert moved["boundary"] == 0.0
    assert moved["causal"] > 1e-4


@pytest.mark.parametrize("kind", ["matrix", "mlp"])
def test_sequences_do_not_share_memories(kind):
    """Permuting the batch permutes outputs and states."""
    mixer, x = build(memory=kind, projection_chunk=4, main_chunk=4), inputs(9, batch=3)
    order = torch.tensor([2, 0, 1])
    y, state = mixer(x)
    y_permuted, state_permuted = mixer(x[:, order])
    torch.testing.assert_close(y_permuted, y[:, order], rtol=0, atol=1e-14)
    torch.testing.assert_close(state_permuted.main[0].weight, state.main[0].weight[order], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("self_made", "boxes"),
    [("all", "k v eta alpha"), ("not_k", "v eta alpha"), ("not_v", "k eta alpha"), ("gates", "eta alpha")],
)
def test_what_is_not_self_made_has_no_memory(self_made, boxes):
    mixer = build(self_made=self_made)
    names = {name.removeprefix("initial.") for name, _ in mixer.memories.named_parameters()}
    assert names == {*boxes.split(), "main"}
