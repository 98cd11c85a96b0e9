"""The loop of `mlp` memories: stages as formulas and as kernels against the plain loop in float64.

The formulas (benchmarks/mlp_stages.py) are the whole adjoint without autograd, and each stage's reference. Kernels run
in triton's interpreter. Whole mixers are compared, with the cases of test_fused_memory.py. On a GPU
benchmarks/mlp_kernels.py says how close the kernels are.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from interpreted import GPU, VARIABLE, calls, rounded_products
from test_fused_memory import CASES, CHUNK, assert_close, mixer_of, results

from hope.memory.kernels import ScanChoice
from hope.memory.two_layer import loop, ops, stages
from hope.mixers import self_modifying

ROOT = Path(__file__).parents[2]
MLP = {"memory": "mlp", "eta_max": 0.5}
QUICK = "an unfinished chunk", "documents, carried, one that goes on"
interpreted = pytest.mark.skipif(GPU, reason="kernels are compiled for the GPU, not interpreted")
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(ops, "GROUP", 2)  # three chunks are then two groups, the last of them shorter
    yield from calls(monkeypatch)


def choice(operands: torch.dtype) -> ScanChoice:
    return ScanChoice(partial(ops.two_layer_scan, operands=operands, precision="ieee"), "fused", operands=operands)


def both(monkeypatch, case: str, dtype: torch.dtype, width: int, chunk: int, **memory):
    """(what the loop of stages gives in `dtype`, what the plain loop gives in float64)."""
    slow = results(mixer_of(width, chunk, torch.float64, **MLP, **memory), *CASES[case])
    monkeypatch.setattr(self_modifying, "scan_for", lambda *_: choice(dtype))
    return results(mixer_of(width, chunk, dtype, **MLP, **memory), *CASES[case]), slow


@pytest.fixture
def formulas(monkeypatch):
    from mlp_stages import Formulas

    monkeypatch.setattr(ops, "_stages", Formulas)


@pytest.mark.usefixtures("formulas")
@pytest.mark.parametrize("case", list(CASES))
def test_formulas_are_the_plain_loop_and_its_adjoint(case, monkeypatch):
    assert_close(*both(monkeypatch, case, torch.float64, 8, CHUNK), tolerance=1e-12)


@pytest.mark.usefixtures("formulas")
@pytest.mark.parametrize(
    "memory", [{"static": "identity"}, {"static": "none"}, {"static": "projected"}, {"contribution": 1.0}]
)
def test_formulas_of_variants(memory, monkeypatch):
    assert_close(*both(monkeypatch, "an unfinished chunk", torch.float64, 8, CHUNK, **memory), tolerance=1e-12)


@interpreted
@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES])
def test_kernels_equal_the_plain_loop_in_float64(case, monkeypatch):
    assert_close(*both(monkeypatch, case, torch.float32, 32, CHUNK))


@interpreted
@pytest.mark.parametrize("spoiled", ["unfinished_chunks", "groups"])
def test_what_is_spoiled_would_be_seen(spoiled, monkeypatch):
    """The end state taken a chunk too late; adjoints of groups from states that are a group too early."""
    monkeypatch.setattr(ops, "GROUP", 1)
    if spoiled == "groups":
        original = loop.groups
        early = lambda *sizes: [(max(number - 1, 0), *rest) for number, *rest in original(*sizes)]
        monkeypatch.setattr(loop, "groups", early)
    else:
        monkeypatch.setattr(ops, spoiled, lambda *_: None)
    fast, slow = both(monkeypatch, "an unfinished chunk", torch.float32, 16, CHUNK)
    with pytest.raises(AssertionError, match=r"e-\d\d"):
        assert_close(fast, slow)


@interpreted
@pytest.mark.slow
def test_two_runs_are_bit_equal(monkeypatch):
    monkeypatch.setattr(self_modifying, "scan_for", lambda *_: choice(torch.float32))
    mixer = lambda: mixer_of(16, CHUNK, torch.float32, **MLP)
    first, second = (results(mixer(), *CASES["an unfinished chunk"]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@interpreted
def test_every_stage_in_bf16(monkeypatch):
    """With a chunk and heads of 64, every stage from what the kernels themselves stored, then the loop from its inputs:
    within the bounds of benchmarks/mlp_kernels.py, whose own check this is."""
    import mlp_kernels

    rounded_products(monkeypatch)
    found = mlp_kernels.check({"B": 1, "H": 1, "L": 192, "group": 2, "documents": 1, "device": "cpu"})
    assert found["bad"] == []
    assert len(found["stages"]) > 40
    assert found["errors"].keys() >= {"y", "s1", "s2", "dx", "dq", "dw1_main", "dw2_k", "dalpha_bias", "ds1", "ds2"}


@interpreted
@pytest.mark.parametrize("name", ["project", "write", "read_outer", "systems_backward", "errors_backward"])
def test_the_benchmarks_check_names_a_wrong_stage(name, monkeypatch):
    import mlp_kernels

    class Wrong(stages.Kernels):
        pass

    def wrong(table, rule, n, place):
        getattr(stages.Kernels, name)(table, rule, n, place)
        changed = {"project": "eta", "write": "s1", "read_outer": "y", "systems_backward": "g2"}.get(name, "dw1")
        table[changed].mul_(1.05)

    setattr(Wrong, name, staticmethod(wrong))
    monkeypatch.setattr(mlp_kernels, "Kernels", Wrong)
    case = {"B": 1, "H": 1, "L": 32, "K": 16, "chunk": 16, "group": 2, "device": "cpu", "kind": "ieee"}
    assert any(bad.startswith(f"{name} ") for bad in mlp_kernels.check(case)["bad"])


def test_the_benchmarks_check_names_a_stage_that_crashes(monkeypatch, capsys):
    import mlp_kernels

    class Crashing(stages.Kernels):
        @staticmethod
        def write(*_):
            raise RuntimeError("an illegal memory access was encountered")

        @staticmethod
        def project(table, rule, n, place):
            from mlp_stages import Formulas

            Formulas().project(table, rule, n, place)

    monkeypatch.setattr(mlp_kernels, "Kernels", Crashing)
    with pytest.raises(RuntimeError, match="illegal"):
        mlp_kernels.check({"B": 1, "H": 1, "L": 32, "K": 16, "chunk": 16, "device": "cpu", "kind": "ieee"})
    said = capsys.readouterr().out.splitlines()
    assert said == ["  project begins", "  write begins", "  write failed in chunk 0"]


def operands(requires_grad: bool = True):
    """What the custom op takes, small: one row, one head, three chunks of 16 in groups of two."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).requires_grad_(requires_grad)
    tiles, logits = [draw(1, 1, 48, 16) for _ in range(4)], [draw(1, 1, 48) for _ in range(2)]
    weights, states = [draw(1, 5, 16, 16) for _ in range(2)], [draw(1, 1, 5, 16, 16) for _ in range(2)]
    marks = [torch.ones(1, 48), *(torch.tensor(v, dtype=torch.int32) for v in ([[0, 1, 0]], [2]))]
    return *tiles, *logits, *weights, draw(1, 2, 16), *states, *marks, 16, 2, 0.0625, 0.3, "ieee"


@interpreted
def test_the_op_is_what_the_library_expects_of_one():
    """Schema, fake and autograd registration, and that fakes have the shapes and types of what the kernels return."""
    assert set(torch.library.opcheck(ops.two_layer_loop, operands()).values()) == {"SUCCESS"}


@pytest.mark.usefixtures("formulas")
def test_torch_compile_sees_one_node():
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    given = operands()
    loss = lambda *tensors: sum((t * t).sum() for t in ops.two_layer_loop(*tensors)[:3])
    compiled = torch.compile(loss, backend=backend, fullgraph=True)(*given)
    assert sum("two_layer_loop" in target for target in seen) == 1
    torch.testing.assert_close(compiled, loss(*given))
    compiled.backward()
    assert all(t.grad is not None for t in given if isinstance(t, torch.Tensor) and t.requires_grad)


@interpreted
def test_operands_with_gaps_are_copied():
    dense = [t.detach() for t in operands()[:11]]
    gaps = [torch.stack([t, t], -1)[..., 0] for t in dense]
    assert not any(t.is_contiguous() for t in gaps)
    rest = (None, None, None, 16, 2, 0.0625, 0.3, "ieee")
    assert all(map(torch.equal, ops.two_layer_loop(*dense, *rest), ops.two_layer_loop(*gaps, *rest)))


# Bytes that a kernel may spill, by its name. Triton 3.6 and 3.9: 24 and 100 of _systems, 64 and 0 of _errors, else 0.
SPILLS = dict.fromkeys(("_project", "_write", "_read", "_reads", "_keys", "_gates"), 0)
SPILLS |= {"_systems": 128, "_errors": 128}


@pytest.mark.slow
def test_kernels_compile_for_hopper(tmp_path):
    """In a process of its own, since kernels are interpreted here. Every form that a run takes, without documents."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "compile_mlp_kernels.py"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=230,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, *_ in lines} == SPILLS.keys()
    assert len(lines) == 12
    for name, form, *numbers in lines:
        registers, spilled, shared, products, transposed = map(int, numbers)
        assert registers <= 255
        assert spilled <= SPILLS[name], (name, form)
        assert shared <= 227 * 1024  # what a block of an H100 can have
        assert (products >= 3, transposed) == (True, 0), (name, form)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("documents", [0, 1])
def test_every_stage_on_a_gpu(documents):
    case = f'{{"L": 512, "documents": {documents}}}'
    command = [sys.executable, ROOT / "benchmarks" / "mlp_kernels.py", "one", "check", case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=220)
    assert done.stdout.splitlines()[-1:] == ["RESULT ok"], done.stdout + done.stderr
