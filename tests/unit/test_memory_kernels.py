"""Which form of the memory loop is taken, and the reason that it gives for the plain one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreted import VARIABLE

from hope.memory import kernels
from hope.memory.config import MemoryConfig
from hope.memory.kernels import linear_for, scan_for
from hope.memory.linear import linear_memory
from hope.memory.linear_config import LinearConfig
from hope.memory.scan import scan
from hope.memory.two_layer.ops import two_layer_scan

BF16, FP32 = torch.bfloat16, torch.float32


def chosen(device: str = "cuda", dtype: torch.dtype = BF16, head_dim: int = 64, **memory) -> kernels.ScanChoice:
    return scan_for(MemoryConfig(**memory), torch.device(device), dtype, head_dim)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("static", ["learned", "projected", "identity", "none"])
def test_a_bf16_model_on_a_gpu_takes_the_kernels(head_dim, static):
    choice = chosen(head_dim=head_dim, static=static)
    assert str(choice) == "fused"
    assert choice.scan.keywords["operands"] == BF16


@pytest.mark.parametrize(
    ("reason", "settings"),
    [
        ("CPU", {"device": "cpu"}),
        ("XPU", {"device": "xpu"}),
        ("as configured", {"kernel": "plain"}),
        ("forget zero", {"forget": "zero"}),
        ("chunk 128", {"projection_chunk": 128, "main_chunk": 128}),
        ("chunks 64 and 128", {"main_chunk": 128}),
        ("heads of 32", {"head_dim": 32}),
        ("read boundary", {"read": "boundary"}),
        ("momentum", {"momentum": 0.5}),
        ("adaptive query", {"adaptive_query": True}),
        ("self_made not_k", {"self_made": "not_k"}),
        ("erase objective", {"erase": "objective"}),
        ("erase none", {"erase": "none"}),
        ("an erase rate of its own", {"erase_max": 1.9}),
        ("values not normalised", {"normalise_values": False}),
        ("fp64", {"dtype": torch.float64}),
        ("fp16", {"dtype": torch.float16}),
        ("fp32 heads of 128", {"dtype": FP32, "head_dim": 128}),
        ("fp32 without TF32", {"dtype": FP32}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_all_else_is_plain_and_says_why(reason, settings):
    choice = chosen(**settings)
    assert str(choice) == f"plain ({reason})"
    assert choice.scan is scan


@pytest.mark.parametrize("static", ["learned", "projected", "identity", "none"])
@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_mlp_memories_take_kernels_of_their_own(device, static):
    choice = chosen(device, memory="mlp", static=static)
    assert str(choice) == "fused"
    assert choice.scan.func is two_layer_scan
    assert choice.scan.keywords == {"operands": BF16, "precision": "tf32"}


@pytest.mark.parametrize(
    ("reason", "settings"),
    [
        ("CPU", {"device": "cpu"}),
        ("as configured", {"kernel": "plain"}),
        ("expansion 2", {"expansion": 2}),
        ("forget zero", {"forget": "zero"}),
        ("chunk 32", {"projection_chunk": 32, "main_chunk": 32}),
        ("chunks 64 and 128", {"main_chunk": 128}),
        ("chunk 128", {"projection_chunk": 128, "main_chunk": 128}),
        ("heads of 128", {"head_dim": 128}),
        ("read boundary", {"read": "boundary"}),
        ("momentum", {"momentum": 0.5}),
        ("adaptive query", {"adaptive_query": True}),
        ("self_made gates", {"self_made": "gates"}),
        ("erase input", {"erase": "input"}),
        ("erase none", {"erase": "none"}),
        ("an erase rate of its own", {"erase_max": 1.9}),
        ("values not normalised", {"normalise_values": False}),
        ("fp32", {"dtype": FP32}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_all_other_mlp_memories_are_plain_and_say_why(reason, settings):
    choice = chosen(**{"memory": "mlp", **settings})
    assert str(choice) == f"plain ({reason})"
    assert choice.scan is scan


def test_an_fp32_model_may_where_torch_may_use_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        choice = chosen(dtype=FP32)
    finally:
        torch.set_float32_matmul_precision(before)
    assert str(choice) == "fused"
    assert choice.scan.keywords == {"operands": FP32, "precision": "tf32"}


def chosen_linear(device: str = "cuda", dtype: torch.dtype = BF16, head_dim: int = 64, **section):
    return linear_for(LinearConfig(**section), torch.device(device), dtype, head_dim)


@pytest.mark.parametrize("rule", ["retnet", "ssd", "gated_deltanet", "deltanet"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_linear_family_on_a_gpu_takes_its_kernels(rule, head_dim):
    choice = chosen_linear(rule=rule, head_dim=head_dim)
    assert str(choice) == "fused"
    assert choice.memory.keywords == {"operands": BF16}


@pytest.mark.parametrize(
    ("reason", "settings"),
    [
        ("CPU", {"device": "cpu"}),
        ("as configured", {"kernel": "plain"}),
        ("decay per channel", {"rule": "kda", "erase": False}),
        ("a normaliser", {"rule": "linear_attention"}),
        ("chunk 128", {"chunk": 128}),
        ("heads of 32", {"head_dim": 32}),
        ("fp64", {"dtype": torch.float64}),
        ("fp32 heads of 128", {"dtype": FP32, "head_dim": 128}),
        ("fp32 without TF32", {"dtype": FP32}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_rest_of_the_linear_family_is_plain_and_says_why(reason, settings):
    choice = chosen_linear(**{"rule": "ssd", **settings})
    assert str(choice) == f"plain ({reason})"
    assert choice.memory is linear_memory


def test_chunks_of_128_take_the_kernels_where_that_is_opened(monkeypatch):
    """They wait for their check on a GPU. Those of `mlp` memories have none."""
    monkeypatch.setattr(kernels, "CHUNKS", (64, 128))
    chunks = {"projection_chunk": 128, "main_chunk": 128}
    assert [str(chosen(head_dim=width, **chunks)) for width in (64, 128)] == ["fused", "fused"]
    assert str(chosen_linear(rule="ssd", chunk=128)) == "fused"
    assert str(chosen(memory="mlp", **chunks)) == "plain (chunk 128)"
    assert str(chosen(projection_chunk=96, main_chunk=96)) == "plain (chunk 96)"


def test_without_triton(monkeypatch):
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    assert str(chosen()) == "plain (no triton)"
    assert str(chosen("meta")) == "fused"  # where memory is predicted triton may be missing


def test_no_kernel_is_imported_before_one_is_called():
    program = "import sys, hope.model; print('hope.memory.fused' in sys.modules, 'triton.language' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["False", "False"], done.stderr


# Bytes that a kernel may spill, by its name. Triton 3.6 and 3.9: 96 and 132, 692 and 508, nothing of the others. With
# one stage the last one spilled 488 and 444, and took a quarter longer on an H100.
SPILLS = {"_sequential": 256, "_outputs": 0, "_outputs_backward": 0, "_sequential_backward": 704}
# Chunks of 128, in blocks of 64, at heads of 64 and of 128 (8 warps in both sequential kernels). Triton 3.9: 356 and
# 652, 2296 and 3816. With chunks of 64, heads of 128 spill 2800 and 3324 of 4 warps.
IN_BLOCKS = {**SPILLS, "_sequential": 448, "_sequential_backward": 768}
IN_BLOCKS_OF_128 = {**SPILLS, "_sequential": 2560, "_sequential_backward": 4096}
# Triton 3.9: 20, nothing of the others.
OF_GIVEN = {"_prepare": 0, "_sequential": 0, "_outputs": 0, "_outputs_backward": 0, "_sequential_backward": 0,
            "_writes_backward": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "spills", "fewest"),
    [
        ("64,bf16,documents", SPILLS, 3),
        ("64,bf16,given", OF_GIVEN, 2),
        pytest.param("64,bf16,documents,128", IN_BLOCKS, 3, marks=pytest.mark.slow),
        pytest.param("128,bf16,documents,128", IN_BLOCKS_OF_128, 3, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_hopper(tmp_path, form, spills, fewest):
    """With documents or with given keys, in a process of its own, since kernels are interpreted here.

    A product with a transposed left operand gives wrong gradients on Triton 3.4 to 3.7, and nothing says so.
    """
    program = Path(__file__).parents[1] / "compile_memory_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, program, form],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    found = {name: list(map(int, numbers)) for name, _, *numbers in map(str.split, done.stdout.splitlines())}
    assert found.keys() == spills.keys()
    for name, (registers, spilled, shared, products, transposed) in found.items():
        assert registers <= 255
        assert spilled <= spills[name], name
        assert shared <= 227 * 1024  # what a block of an H100 can have
        assert (products >= fewest, transposed) == (True, 0), name
