"""The kernels of the memory loop against the plain loop in float64, through triton's interpreter.

On a GPU, where chunks of 16 are not right and fp32 products take minutes to compile, benchmarks/memory_kernels.py says
how close they are. Operands are fp32 (the interpreter's bf16 products are broken). Whole mixers are compared, so that
layouts of documents, unfinished chunks, carried states and everything outside of the kernels are in it.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from interpreted import GPU, calls

from hope.documents import Documents
from hope.memory.config import MemoryConfig
from hope.memory.fused_scan import fused_scan, memory_loop
from hope.memory.kernels import CHUNKS, ScanChoice
from hope.memory.scan import GATE_SCALE
from hope.mixers import Trunk, self_modifying
from hope.mixers.self_modifying import SelfModifyingTitans
from hope.parameters import initialise

CHUNK, HEADS, BATCH, TOLERANCE = 16, 2, 2, 1e-5
FUSED = ScanChoice(partial(fused_scan, operands=torch.float32, precision="ieee"), "fused")
interpreted = pytest.mark.skipif(GPU, reason="kernels are compiled for the GPU, not interpreted")
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    yield from calls(monkeypatch)


def mixer_of(width: int, chunk: int, dtype: torch.dtype, **memory) -> SelfModifyingTitans:
    config = MemoryConfig(projection_chunk=chunk, main_chunk=chunk, **{"eta_max": 0.5, **memory})
    mixer = SelfModifyingTitans(Trunk(HEADS * width, HEADS, 1), config)
    initialise(mixer, 0)
    with torch.no_grad():  # away from special initial values: identity convolutions, saturated gates
        generator = torch.Generator().manual_seed(1)
        for parameter in mixer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        mixer.alpha_bias.copy_(torch.tensor([1.0, 4.0]))
    return mixer.to(dtype)


def starts(length: int, *places: tuple[int, int]) -> torch.Tensor:
    marks = torch.zeros(length, BATCH, dtype=torch.bool)
    for token, row in places:
        marks[token, row] = True
    return marks


def results(mixer: SelfModifyingTitans, pieces: list[int], documents: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Outputs, end state, gates and every gradient, of outputs and end state; calls of `pieces` tokens each."""
    dtype, length, state, outputs, first = mixer.eta_bias.dtype, sum(pieces), None, [], 0
    draw = lambda seed, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x = draw(2, length, BATCH, mixer.width).requires_grad_()
    mixer.watched = True
    for size in pieces:
        marks = None if documents is None else Documents(documents[first : first + size])
        y, state = mixer(x[first : first + size], state, marks)
        outputs.append(y)
        first += size
    y, end = torch.cat(outputs), state.main[0].weight
    mixer.zero_grad()
    ((y * draw(3, *y.shape)).sum() + (end * draw(4, *end.shape)).sum()).backward()
    gradients = {name: p.grad.clone() for name, p in mixer.named_parameters()}
    return {"y": y.detach(), "end": end.detach(), **mixer.report().histograms, "x": x.grad, **gradients}


def both(monkeypatch, pieces, documents=None, width: int = 32, chunk: int = CHUNK, **memory):
    slow = results(mixer_of(width, chunk, torch.float64, **memory), pieces, documents)
    monkeypatch.setattr(self_modifying, "scan_for", lambda *_: FUSED)
    return results(mixer_of(width, chunk, torch.float32, **memory), pieces, documents), slow


def scale(name: str, exact: dict[str, torch.Tensor]) -> torch.Tensor:
    """What an error is compared with: the norm, and of a gate's bias at least what its gradient is a sum of. That may
    cancel. Its terms are seen in the gradient of the gate's weight, where each is times 8 and a unit vector."""
    norm = exact[name].norm()
    weight = exact.get(name.replace("_bias", "_weight"))
    return torch.maximum(norm, weight.norm() / GATE_SCALE) if name.endswith("_bias") and weight is not None else norm


def assert_close(fast: dict[str, torch.Tensor], slow: dict[str, torch.Tensor], tolerance: float = TOLERANCE) -> None:
    assert fast.keys() == slow.keys()
    for name, expected in slow.items():
        assert expected.norm() > 0, f"{name}: nothing is compared"
        error = (fast[name].double() - expected).norm() / scale(name, slow)
        assert error <= tolerance, f"{name}: {error:.1e}"


PACKED = starts(40, (0, 0), (5, 0), (37, 0), (0, 1), (16, 1))
CASES = {
    "whole chunks": ([48], None),
    "an unfinished chunk": ([27], None),
    "carried, cut inside chunks": ([21, 19], None),
    "documents": ([40], PACKED),
    # row 0 has written a chunk when the next document begins, with the second call
    "documents, carried, one that goes on": ([23, 17], starts(40, (5, 0), (23, 0), (30, 1))),
}


@interpreted
@pytest.mark.parametrize("case", list(CASES))
def test_equals_the_plain_loop_in_float64(case, monkeypatch):
    assert_close(*both(monkeypatch, *CASES[case]))


@interpreted
@pytest.mark.parametrize("case", list(CASES))
def test_projected_static_paths(case, monkeypatch):
    assert_close(*both(monkeypatch, *CASES[case], static="projected", output_gate="sigmoid"))


@pytest.mark.parametrize(
    "memory", [{"static": "identity"}, {"static": "none", "erase": "input"}, {"contribution": 1.0}]
)
@interpreted
def test_variants(memory, monkeypatch):
    assert_close(*both(monkeypatch, [24], **memory))


@interpreted
def test_a_chunk_and_heads_of_sixty_four(monkeypatch):
    assert_close(*both(monkeypatch, [128], width=64, chunk=64))


@interpreted
def test_a_spoiled_kernel_would_be_seen(monkeypatch):
    """With the end state taken a chunk too late the comparison fails."""
    monkeypatch.setattr("hope.memory.fused_scan.unfinished_chunks", lambda *_: None)
    fast, slow = both(monkeypatch, *CASES["documents"])
    with pytest.raises(AssertionError, match="end"):
        assert_close(fast, slow)


@interpreted
def test_two_runs_are_bit_equal(monkeypatch):
    monkeypatch.setattr(self_modifying, "scan_for", lambda *_: FUSED)
    first, second = (results(mixer_of(32, CHUNK, torch.float32), *CASES["documents"]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def operands(requires_grad: bool = True, chunk: int = 16):
    """What the custom op takes, small: one row, one head, two chunks."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).requires_grad_(requires_grad)
    length = 2 * chunk
    tiles, logits = [draw(1, 1, length, 16) for _ in range(4)], [draw(1, 1, length) for _ in range(2)]
    weights, vectors = [draw(1, 16, 16) for _ in range(2)], [draw(1, 16) for _ in range(2)]
    marks = [
        torch.ones(1, length),
        *(torch.tensor(v, dtype=torch.int32) for v in ([[0, 1]], [1])),
    ]
    return *tiles, *logits, *weights, *vectors, draw(1, 1, 16, 16), *marks, chunk, 0.25, "ieee"


@interpreted
def test_the_op_is_what_the_library_expects_of_one():
    """Schema, fake and autograd registration; that fakes have the shapes and types of what the kernels return, and the
    gradients under the compiler's tracing those of eager."""
    assert set(torch.library.opcheck(memory_loop, operands()).values()) == {"SUCCESS"}


@interpreted
def test_torch_compile_sees_one_node(monkeypatch):
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    given = operands()
    loss = lambda *tensors: sum((t * t).sum() for t in memory_loop(*tensors)[:2])
    compiled = torch.compile(loss, backend=backend, fullgraph=True)(*given)
    assert sum("memory_loop" in target for target in seen) == 1
    torch.testing.assert_close(compiled, loss(*given))
    compiled.backward()
    assert all(t.grad is not None for t in given if isinstance(t, torch.Tensor) and t.requires_grad)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("documents", [0, 1])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_stage_on_a_gpu(chunk, documents):
    program = Path(__file__).parents[2] / "benchmarks" / "memory_kernels.py"
    case = f'{{"K": 64, "chunk": {chunk}, "L": 512, "documents": {documents}}}'
    done = subprocess.run([sys.executable, program, "one", "check", case], capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines()[-1:] == ["RESULT ok"], done.stdout + done.stderr


@interpreted
def test_operands_with_gaps_are_copied():
    """A compiler may lay them out otherwise."""
    batch, heads, length, width = 1, 2, 32, 32
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))
    tiles = [draw(batch, heads, length, width) / 6 for _ in range(4)]
    rows = [draw(batch, heads, length) for _ in range(2)]
    others = [draw(heads, width, width) / 6, draw(heads, width, width) / 6, draw(heads, width), draw(heads, width)]
    state = draw(batch, heads, width, width) / 6
    dense = [*tiles, *rows, *others, state]
    gaps = [torch.stack([t, t], -1)[..., 0] for t in dense]
    assert not any(t.is_contiguous() for t in gaps)
    one, other = (memory_loop(*given, None, None, None, CHUNK, 0.25, "ieee") for given in (dense, gaps))
    assert all(map(torch.equal, one, other))
