"""What cuts the trunk into heads and merges them: its kernels against the plain forms in float64, through triton's
interpreter, and the choice between the two.

On a GPU benchmarks/dense_forms.py says how close the compiled kernels are.
"""

import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreted import GPU, VARIABLE, calls
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hope.dense import eager, set_form
from hope.documents import Documents
from hope.heads import fused, kernels, ops
from hope.heads.kernels import HeadsChoice, heads_for
from hope.memory.config import MemoryConfig
from hope.mixers import Trunk, self_modifying
from hope.mixers.self_modifying import SelfModifyingTitans, memory_input, merge_heads
from hope.parameters import initialise

BF16, FP32 = torch.bfloat16, torch.float32
OUTPUTS, GRADIENTS = 1e-6, 1e-5
FUSED = HeadsChoice(ops.memory_input, ops.merge_heads, "fused")
interpreted = pytest.mark.skipif(GPU, reason="kernels are compiled for the GPU, not interpreted")
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    yield from calls(monkeypatch)


@pytest.fixture
def head_dim() -> int:
    return 16


@pytest.fixture(autouse=True)
def small_programs(monkeypatch, head_dim):
    """So that a few tokens of three heads are several programs of each kind, the last of them not full."""
    monkeypatch.setattr(fused, "BLOCKS", fused.Blocks(tile=8 * head_dim, segment=8, row=2 * head_dim))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def results(function, dtype: torch.dtype, tensors: list[Tensor], *others) -> list[Tensor]:
    """The output, and the gradients of all tensors."""
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    found = function(*leaves, *others)
    weight = draw(99, *found.shape).to(found.dtype)
    gradients = torch.autograd.grad(found, leaves, weight, materialize_grads=True)
    return [found.detach(), *gradients]


def assert_close(fast: list[Tensor], slow: list[Tensor], output: float = OUTPUTS, gradient: float = GRADIENTS) -> None:
    for place, (found, expected) in enumerate(zip(fast, slow, strict=True)):
        assert found.shape == expected.shape
        if expected.numel():
            assert expected.norm() > 0, f"{place}: nothing is compared"
            error = (found.double() - expected).norm() / expected.norm()
            assert error <= (gradient if place else output), f"{place}: {error:.1e}"


def inputs(length: int, head_dim: int, taps: int = 4, heads: int = 3, batch: int = 2) -> list[Tensor]:
    width = heads * head_dim
    return [draw(1, length, batch, width), draw(2, width, taps), draw(3, taps - 1, batch, width)]


def same_document(length: int, taps: int = 4, batch: int = 2) -> Tensor:
    """Documents that begin anywhere; one goes on from before the row."""
    starts = torch.rand(length, batch, generator=torch.Generator().manual_seed(4)) < 0.3
    starts[0] = torch.tensor([True, False])
    return Documents(starts).same(taps)


def both_inputs(tensors: list[Tensor], same: Tensor | None, head_dim: int) -> tuple[list[Tensor], list[Tensor]]:
    fast = results(ops.memory_input, FP32, tensors, same, head_dim, FP32)
    return fast, results(memory_input, torch.float64, tensors, same, head_dim, torch.float64)


@interpreted
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("length", [1, 3, 8, 17])
def test_any_length_with_a_history(length, documents):
    """Shorter than the taps, one program exactly, and several."""
    same = same_document(length) if documents else None
    assert_close(*both_inputs(inputs(length, 16), same, 16))


@interpreted
@pytest.mark.parametrize("head_dim", kernels.HEADS)
def test_heads_of_any_width(head_dim):
    assert_close(*both_inputs(inputs(11, head_dim), same_document(11), head_dim))


@interpreted
@pytest.mark.parametrize("taps", [1, 2, 3])
def test_fewer_taps(taps):
    same = same_document(11, taps) if taps > 1 else None
    assert_close(*both_inputs(inputs(11, 16, taps), same, 16))


@interpreted
def test_operands_need_not_lie_without_gaps(head_dim):
    """Of the trunk only neighbours in D must be neighbours, and even those are made so."""
    length = 5
    z, weight, history = inputs(length, head_dim)
    gaps = lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]]
    turned = lambda t: t.mT.contiguous().mT
    expected = results(memory_input, torch.float64, [z, weight, history], None, head_dim, torch.float64)
    for change in (gaps, turned):
        other = lambda z, w, h, *rest, change=change: ops.memory_input(change(z), change(w), change(h), *rest)
        found = results(other, FP32, [z, weight, history], None, head_dim, FP32)
        assert_close(found, expected)
    y, gate, norm = merged(length, head_dim)
    expected = results(merge_heads, torch.float64, [y, gate, norm])
    for change in (gaps, turned):
        other = lambda y, g, w, change=change: ops.merge_heads(change(y), change(g), w)
        assert_close(results(other, FP32, [y, gate, norm]), expected)


@interpreted
def test_a_zero_vector_has_a_gradient():
    tensors = [t.zero_() if place != 1 else t for place, t in enumerate(inputs(5, 16))]
    found = results(ops.memory_input, FP32, tensors, None, 16, FP32)
    assert_close(found[1:2], results(memory_input, torch.float64, tensors, None, 16, torch.float64)[1:2], 1e-5)
    assert not found[0].any()


def merged(length: int, head_dim: int, heads: int = 3, batch: int = 2) -> list[Tensor]:
    return [draw(5, batch, heads, length, head_dim), draw(6, length, batch, heads * head_dim), draw(7, head_dim)]


@interpreted
@pytest.mark.parametrize("length", [1, 19])
@pytest.mark.parametrize("head_dim", kernels.HEADS)
def test_merged_heads(head_dim, length):
    tensors = merged(length, head_dim)
    fast, slow = results(ops.merge_heads, FP32, tensors), results(merge_heads, torch.float64, tensors)
    assert_close(fast, slow)


@interpreted
def test_a_gate_may_be_a_sigmoid():
    def plain(y, gate, weight):
        return torch.sigmoid(gate) * F.rms_norm(y, y.shape[-1:], weight, 1e-6).permute(2, 0, 1, 3).flatten(-2)

    tensors = merged(19, 16)
    assert_close(results(ops.merge_heads, FP32, tensors, "sigmoid"), results(plain, torch.float64, tensors))


@interpreted
def test_bf16_is_rounded_once():
    """Operands in bf16: what float64 makes of the same operands, but for one rounding, where the interpreter cuts off.
    The plain forms round at every operation."""
    half, cut_off = lambda tensors: [t.bfloat16().double() for t in tensors], 2.0**-7
    given, same = half(inputs(11, 32)), same_document(11)
    found = results(ops.memory_input, BF16, given, same, 32, BF16)
    assert {t.dtype for t in found} == {BF16}
    assert_close(found, results(memory_input, torch.float64, given, same, 32, torch.float64), cut_off, cut_off)
    given = half(merged(11, 32))
    found = results(ops.merge_heads, BF16, given)
    assert {t.dtype for t in found} == {BF16}
    assert_close(found, results(merge_heads, torch.float64, given), cut_off, cut_off)


@interpreted
def test_a_spoiled_kernel_would_be_seen(monkeypatch):
    """With a convolution that looks at another document's token, or without the last program's part of dweight."""
    tensors, same = inputs(11, 16), same_document(11)
    slow = both_inputs(tensors, same, 16)[1]
    blind = results(ops.memory_input, FP32, tensors, torch.ones_like(same), 16, FP32)
    with pytest.raises(AssertionError, match="0: "):
        assert_close(blind, slow)
    original = fused.input_backward

    def spoiled(*args):
        dz, dweight, dhistory = original(*args)
        return dz, 0.999 * dweight, dhistory

    monkeypatch.setattr(fused, "input_backward", spoiled)
    with pytest.raises(AssertionError, match="2: "):
        assert_close(both_inputs(tensors, same, 16)[0], slow)


def operands() -> tuple:
    z, weight, history = (t.float().requires_grad_() for t in inputs(9, 16))
    return z, weight, history, same_document(9), 16, FP32


@interpreted
@pytest.mark.parametrize("same", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_ops_are_what_the_library_expects_of_them(same):
    """Schema, fake and autograd registration; shapes, strides and types of fakes; gradients under tracing."""
    given = operands()
    given = given if same else (*given[:3], None, *given[4:])
    checked = [torch.library.opcheck(ops.memory_input, given)]
    given = [t.float().requires_grad_() for t in merged(9, 16)]
    checked.append(torch.library.opcheck(ops.merge_heads, given))
    checked.append(torch.library.opcheck(ops.merge_heads, given, {"activation": "sigmoid"}))
    for found in checked:
        assert set(found.values()) == {"SUCCESS"}, found


@interpreted
def test_two_runs_are_bit_equal():
    tensors, same = inputs(11, 16), same_document(11)
    first, second = (results(ops.memory_input, FP32, tensors, same, 16, FP32) for _ in range(2))
    assert all(map(torch.equal, first, second))
    tensors = merged(11, 16)
    first, second = (results(ops.merge_heads, FP32, tensors) for _ in range(2))
    assert all(map(torch.equal, first, second))


@interpreted
def test_a_second_derivative_is_refused():
    given = operands()
    (gradient,) = torch.autograd.grad(ops.memory_input(*given).square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="memory_input_backward"):
        gradient.sum().backward()


def test_kernels_compile_for_hopper(tmp_path):
    """Without a spill, and with wide loads, in a process of its own, since kernels are interpreted here."""
    program, words = Path(__file__).parents[1] / "compile_heads_kernels.py", ["64,bf16,documents", "128,fp32"]
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, program, *words],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    kinds = ("_input_forward", "_merge_forward", "_merge_backward", "_input_backward")
    assert [(name, word) for name, word, *_ in found] == [(name, word) for word in words for name in kinds]
    for name, word, *numbers in found:
        registers, spilled, shared, load = map(int, numbers)
        assert (registers <= 128, spilled, shared <= 48 * 1024) == (True, 0, True), (name, word)
        assert load >= 64, (name, word)


def mixed(form, dtype: torch.dtype, pieces: list[int]) -> list[Tensor]:
    """Outputs of a mixer with documents, in calls of `pieces` tokens, and all gradients."""
    mixer = SelfModifyingTitans(Trunk(32, 2, 1), MemoryConfig(projection_chunk=4, main_chunk=4))
    initialise(mixer, 0)
    mixer = mixer.to(dtype)
    set_form(mixer, form)
    x, state, outputs = draw(8, sum(pieces), 2, 32).to(dtype).requires_grad_(), None, []
    starts = torch.zeros(sum(pieces), 2, dtype=torch.bool)
    starts[5, 0] = starts[0, 1] = starts[10, 1] = True
    for part, marks in zip(x.split(pieces), starts.split(pieces), strict=True):
        y, state = mixer(part, state, Documents(marks))
        outputs.append(y)
    found = torch.cat(outputs)
    gradients = torch.autograd.grad(found, [x, *mixer.parameters()], draw(9, *found.shape).to(dtype))
    return [found.detach(), *gradients]


@interpreted
def test_a_mixer_takes_them_whatever_is_compiled(monkeypatch):
    """Across calls, with documents and a history that has a gradient. What is compiled are the other parts."""
    expected, names = mixed(eager, torch.float64, [13]), []

    def form(function):
        names.append(function.__name__)
        return function

    monkeypatch.setattr(self_modifying, "heads_for", lambda *_: FUSED)
    assert_close(mixed(form, FP32, [13]), expected, GRADIENTS)
    assert_close(mixed(form, FP32, [7, 2, 4]), expected, GRADIENTS)
    assert not {"memory_input", "merge_heads"} & set(names)


@interpreted
def test_recomputation_gives_the_same_gradients():
    tensors, same = inputs(5, 16), same_document(5)
    once = lambda *given: checkpoint(ops.memory_input, *given, use_reentrant=False)
    first, second = (results(f, FP32, tensors, same, 16, FP32) for f in (ops.memory_input, once))
    assert all(map(torch.equal, first, second))


@interpreted
@pytest.mark.parametrize("spoiled", ["", "memory_input", pytest.param("changing", marks=pytest.mark.slow)])
def test_the_benchmark_names_a_kernel_that_is_wrong(spoiled, monkeypatch, capsys):
    """Of bf16 the interpreter cuts off what a GPU rounds, which is within twice the plain form's error."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    benchmark = importlib.import_module("dense_forms")
    monkeypatch.setattr(benchmark, "Compiled", lambda backend: eager)
    monkeypatch.setattr(benchmark, "EDGES", {"length": (1,), "head": (32,)})
    original, factor = fused.input_forward, itertools.count()

    def wrong(*args):
        found = original(*args)
        return found * (1 + 2e-6) if spoiled == "memory_input" else found + 1e-2 * next(factor)

    if spoiled:
        monkeypatch.setattr(fused, "input_forward", wrong)
    sizes = ["--length", "5", "--batch", "1", "--width", "32", "--head", "16", "--vocabulary", "50", "--repeat", "1"]
    only = ["--only", "memory_input,merge_heads", "--blocks", "64,4,16,32,4,1", ""]
    assert benchmark.main(["--device", "cpu", *sizes, *only]) == int(bool(spoiled))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("kernels ")[1] for line in lines if "kernels " in line][:2] == [
        "64,4,16,32,4,1",
        "2048,4,64,512,4,1",
    ]
    assert len(lines) == 10
    named = {line.split()[0].rstrip(",") for line in lines if "BAD" in line}
    assert named == ({"memory_input", "at"} if spoiled else set())
    assert any("CHANGES" in line for line in lines) == (spoiled == "changing")


def test_the_table_at_the_start_names_both_where_they_differ(monkeypatch):
    monkeypatch.setattr("hope.memory.kernels.has_triton", lambda: True)
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    said = lambda device="cuda", **memory: SelfModifyingTitans(Trunk(128, 2, 1), MemoryConfig(**memory)).kernels(
        torch.device(device), BF16
    )
    assert said() == "fused"
    assert said("cpu") == "plain (CPU)"
    assert said(forget="zero") == "plain (forget zero), heads fused"
    assert said(conv_width=5) == "fused, heads plain (5 taps)"


def chosen(device: str = "cuda", dtype: torch.dtype = BF16, head_dim: int = 64, **memory) -> HeadsChoice:
    return heads_for(MemoryConfig(**memory), torch.device(device), dtype, head_dim)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("memory", [{}, {"memory": "mlp"}, {"conv_width": 1}])
def test_a_gpu_takes_the_kernels_whatever_the_memory(dtype, memory):
    assert chosen(dtype=dtype, **memory) == FUSED
    assert str(FUSED) == "fused"


@pytest.mark.parametrize(
    ("reason", "settings"),
    [
        ("CPU", {"device": "cpu"}),
        ("XPU", {"device": "xpu"}),
        ("as configured", {"kernel": "plain"}),
        ("fp64", {"dtype": torch.float64}),
        ("fp16", {"dtype": torch.float16}),
        ("heads of 48", {"head_dim": 48}),
        ("5 taps", {"conv_width": 5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_all_else_is_plain_and_says_why(reason, settings):
    choice = chosen(**settings)
    assert str(choice) == f"plain ({reason})"
    assert (choice.memory_input, choice.merge_heads) == (None, None)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    assert str(chosen()) == "plain (no triton)"
