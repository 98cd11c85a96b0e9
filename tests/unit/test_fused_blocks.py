"""Chunks that the kernels of the memory loop take in blocks, against the plain loop in float64.

As in test_fused_memory.py, through triton's interpreter, with whole mixers. Blocks are of 64 tokens where a chunk is
128, and made smaller for chunks of 32 and 64.
"""

import pytest
import torch
from interpreted import GPU, calls
from test_fused_memory import assert_close, both, operands, starts

from hope.memory.fused_scan import memory_loop

pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow"),
    pytest.mark.skipif(GPU, reason="kernels are compiled for the GPU, not interpreted"),
]
# Of chunks of 32. What is left at the end of a row: half a block, a block and a half, nothing; a chunk is unfinished
# before, between and behind the padding of the other row.
CASES = {
    "whole chunks": ([64], None),
    "unfinished in its first block": ([40], None),
    "unfinished in its second block": ([59], None),
    "carried, cut inside chunks": ([45, 43], None),
    "documents": ([88], starts(88, (0, 0), (5, 0), (69, 0), (0, 1), (32, 1))),
    "documents, carried, one that goes on": ([47, 33], starts(80, (5, 0), (47, 0), (60, 1))),
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    yield from calls(monkeypatch)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("hope.memory.fused_scan.BLOCK", 16)


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", list(CASES))
def test_two_blocks_equal_the_plain_loop_in_float64(case, monkeypatch):
    assert_close(*both(monkeypatch, *CASES[case], chunk=32))


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("static", ["learned", "projected"])
def test_four_blocks(static, monkeypatch):
    assert_close(*both(monkeypatch, [70, 58], chunk=64, static=static))


@pytest.mark.parametrize("width", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_a_chunk_of_a_hundred_and_twenty_eight(width, monkeypatch):
    """With documents, padding, an unfinished chunk, and a state that is carried in and out."""
    documents = starts(300, (5, 0), (170, 0), (180, 1))
    assert_close(*both(monkeypatch, [170, 130], documents, width=width, chunk=128))


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("spoiled", ["end", "keys"])
def test_a_spoiled_kernel_would_be_seen(spoiled, monkeypatch):
    """With the end state taken a chunk too late, or with keys made from every block's own state, as chunks of 16 do."""
    if spoiled == "end":
        monkeypatch.setattr("hope.memory.fused_scan.unfinished_chunks", lambda *_: None)
        fast, slow = both(monkeypatch, *CASES["unfinished in its second block"], chunk=32)
    else:
        _, slow = both(monkeypatch, *CASES["whole chunks"], chunk=32)
        fast, _ = both(monkeypatch, *CASES["whole chunks"], chunk=16)
    with pytest.raises(AssertionError, match=r"end|y|eta"):
        assert_close(fast, slow)


@pytest.mark.usefixtures("small_blocks")
def test_the_fakes_have_the_shapes_of_what_the_kernels_return():
    checks = "test_schema", "test_faketensor"
    assert set(torch.library.opcheck(memory_loop, operands(chunk=32), test_utils=checks).values()) == {"SUCCESS"}
