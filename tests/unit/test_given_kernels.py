"""The kernels of the linear family against the plain chunk-parallel form in float64, through triton's interpreter.

On a GPU benchmarks/given_kernels.py says how close they are. Operands are fp32, as in test_fused_memory.py.
"""

from functools import partial

import pytest
import torch
from interpreted import GPU, calls

from hope.memory.given.ops import fused_memory, given_loop
from hope.memory.linear import in_squares, linear_memory

B, H, CHUNK, BOUND = 2, 2, 16, 1e-5
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow"),
    pytest.mark.skipif(GPU, reason="kernels are compiled for the GPU, not interpreted"),
]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    yield from calls(monkeypatch)


def inputs(length: int, K: int, decay: bool, write: bool, strength: float = 1.0) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(B, H, *shape, generator=generator, dtype=torch.float64)
    return {
        "q": draw(length, K),
        "k": torch.nn.functional.normalize(draw(length, K), dim=-1),
        "v": draw(length, K),
        "log_decay": -strength * draw(length, 1).exp() if decay else None,
        "write": draw(length).sigmoid() if write else None,
        "state": draw(K, K),
    }


def results(function, given, dtype, weigh_state: bool = True, **settings) -> dict[str, torch.Tensor]:
    leaves = {name: None if t is None else t.to(dtype).requires_grad_() for name, t in given.items()}
    y, state = function(**leaves, **settings)
    weigh = lambda t: (t * torch.linspace(-1, 1, t.numel(), dtype=torch.float64).view_as(t)).sum()
    (weigh(y) + (weigh(state) if weigh_state else 0.0)).backward()
    return {"y": y.detach(), "end": state.detach(), **{n: t.grad for n, t in leaves.items() if t is not None}}


def assert_equals_plain(length: int, K: int, erase: bool, given, **settings):
    fast = results(
        fused_memory, given, torch.float32, erase=erase, chunk=CHUNK, operands=torch.float32, precision="ieee",
        **settings,
    )  # fmt: skip
    slow = results(linear_memory, given, torch.float64, erase=erase, chunk=CHUNK, **settings)
    assert fast.keys() == slow.keys()
    for name, expected in slow.items():
        error = (fast[name] - expected).norm() / expected.norm()
        assert error < BOUND, f"{name}: {error:.1e}"
    return fast, slow


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize(("decay", "write"), [(True, True), (True, False), (False, True), (False, False)])
def test_outputs_state_and_gradients(decay, write, erase):
    fast, _ = assert_equals_plain(48, 32, erase, inputs(48, 32, decay, write))
    assert fast["y"].shape == (B, H, 48, 32)


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("length", [1, 15, 37])
def test_lengths_that_end_inside_a_chunk(length, erase):
    assert_equals_plain(length, 32, erase, inputs(length, 32, True, True))


def test_keys_wider_than_values_are_cut():
    """Mamba-2's state of two heads' width."""
    given = inputs(37, 32, True, True)
    given |= {name: torch.cat([given[name], given[name].flip(-1)], -1) for name in ("q", "k", "state")}
    cut = partial(in_squares, partial(fused_memory, operands=torch.float32, precision="ieee"))
    fast = results(cut, given, torch.float32, erase=False, chunk=CHUNK)
    slow = results(linear_memory, given, torch.float64, erase=False, chunk=CHUNK)
    assert fast["end"].shape == (B, H, 32, 64)
    for name, expected in slow.items():
        assert (fast[name] - expected).norm() < BOUND * expected.norm(), name


def test_values_divided_over_programs():
    assert_equals_plain(32, 64, True, inputs(32, 64, True, True))


@pytest.mark.parametrize("strength", [1e-3, 8.0])  # far beyond, the gradient of a decay is what large terms leave
def test_weak_and_strong_decays(strength):
    assert_equals_plain(40, 32, True, inputs(40, 32, True, True, strength))


def test_gradients_of_outputs_alone():
    assert_equals_plain(32, 32, True, inputs(32, 32, True, True), weigh_state=False)


def test_a_write_of_nothing_has_no_gradient_that_is_not_finite():
    given = inputs(16, 32, True, True)
    given["write"][..., 3:6] = 0.0
    fast = results(fused_memory, given, torch.float32, erase=True, chunk=CHUNK, operands=torch.float32)
    assert all(t.isfinite().all() for t in fast.values())


def test_cuts_of_a_sequence_at_chunks_are_the_whole():
    given = inputs(48, 32, True, True)
    settings = {"erase": True, "chunk": CHUNK, "operands": torch.float32, "precision": "ieee"}
    whole, end = fused_memory(**{n: t.float() for n, t in given.items()}, **settings)
    state, rows = given.pop("state").float(), []
    for first, last in ((0, 16), (16, 48)):
        y, state = fused_memory(**{n: t[:, :, first:last].float() for n, t in given.items()}, state=state, **settings)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 2), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-6)


def test_a_longer_chunk_is_taken_in_blocks(monkeypatch):
    """The result does not depend on the chunk, so that the kernels are the same."""
    given = {n: t.float() for n, t in inputs(40, 32, True, True).items()}
    settings = {"erase": True, "operands": torch.float32, "precision": "ieee"}
    monkeypatch.setattr("hope.memory.given.ops.BLOCK", CHUNK)
    one, other = (fused_memory(**given, chunk=chunk, **settings) for chunk in (CHUNK, 2 * CHUNK))
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("erase", [False, True])
def test_the_op_is_one_node_and_its_fake_has_its_shapes(erase):
    given = {name: t.float() for name, t in inputs(32, 32, True, True).items()}
    args = (*(given[n] for n in ("q", "k", "v")), given["log_decay"].squeeze(-1), given["write"], given["state"])
    torch.library.opcheck(given_loop, (*args, erase, CHUNK, "ieee"), test_utils=("test_schema", "test_faketensor"))
