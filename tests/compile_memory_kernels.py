"""`python tests/compile_memory_kernels.py 64,bf16 128,bf16,documents ...`: compile the memory's kernels ahead of time.

For a GPU of compute capability 9.0, with triton's own ptxas: no GPU is needed. A word is a head width, a type,
`documents` for the form with padding, resets and unfinished chunks, or `given` for the kernels of the linear family,
and a chunk that is not 64, such as 128.
One line per kernel: its name, the word, registers, bytes spilled, bytes of shared memory, matrix products, and products
whose left operand is transposed in registers.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this clone, not an installed one

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from hope.memory import fused
from hope.memory.fused_scan import BLOCK
from hope.memory.given import fused as given

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {"bf16": tl.bfloat16, "fp32": tl.float32}
SINGLE = ("ge_p", "ga_p", "ee_p", "ea_p", "s0_p", "valid_p", "rk_p", "rv_p", "eta_p", "ell_p", "end_p", "o_p")
SINGLE += ("dend_p", "dle_p", "dla_p", "ds0_p", "trace_p", "b_p", "db_p", "dell_p")
MARKS = ("resets_p", "last_p")
KERNELS = (fused._sequential, fused._outputs, fused._outputs_backward, fused._sequential_backward)
GIVEN = (given._prepare, given._sequential, fused._outputs, fused._outputs_backward, given._sequential_backward,
         given._writes_backward)  # fmt: skip
PASSED = {"ttg.convert_layout", "ttg.local_alloc", "ttg.local_load", "arith.truncf"}


def source(kernel: triton.JITFunction, width: int, kind: str, form: str, blocks: int = 1) -> ASTSource:
    """blocks: of a chunk."""
    constants = {"K": width, "C": BLOCK, "LOG_C": BLOCK.bit_length() - 1, "TYPE": TYPES[kind], "PRECISION": "tf32"}
    constants |= {"BLOCKS": blocks}
    constants |= dict.fromkeys(("VALID", "RESETS", "PARTIAL"), form == "documents") | {"TRACE": False}
    constants |= {"GIVEN": form == "given", "ERASE": True, "V": given.COLUMNS}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_p"):
            signature[name] = "*i32" if name in MARKS else "*fp32" if name in SINGLE else f"*{kind}"
            attributes[(place,)] = [["tt.divisibility", 16]]  # what torch allocates
        else:
            signature[name] = "fp32" if name == "eta_max" else "i32"
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return ASTSource(kernel, signature, used, attributes)


def transposed_on_the_left(ir: str) -> tuple[int, int]:
    """(matrix products, those whose left operand comes from a transpose in registers), of Triton's GPU dialect."""
    maker = {}
    for line in ir.splitlines():
        if found := re.match(r"\s*(%[\w-]+)(?::\d+)? = (\S+) (.*)", line):
            maker[found[1]] = (found[2], re.findall(r"%[\w-]+", found[3].split(" : ")[0]))
    products = [operands[0] for name, operands in maker.values() if name in ("ttng.warp_group_dot", "tt.dot")]
    return len(products), sum(_from_transpose(maker, operand) for operand in products)


def _from_transpose(maker: dict[str, tuple[str, list[str]]], value: str) -> bool:
    for _ in range(8):
        name, operands = maker.get(value, ("", []))
        if "trans" in name:
            return True
        if name not in PASSED or not operands:
            return False
        value = operands[0]
    return False


def assembled(ptx: str) -> tuple[int, int]:
    """(registers, bytes spilled) of a kernel."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(HOPPER.arch).path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    number = lambda pattern: int(re.search(pattern, said)[1])
    return number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores")


def compiled(kernel: triton.JITFunction, word: str) -> str:
    width, kind, *others = word.split(",")
    blocks = int(others.pop()) // BLOCK if others and others[-1].isdigit() else 1
    options = fused._OPTIONS | (given.wide(int(width)) if kernel is given._writes_backward else {})
    if kernel is fused._sequential:
        options = fused.forward_options(int(width), blocks)
    if kernel is fused._sequential_backward:
        options = fused.backward_options(int(width), torch.bfloat16 if kind == "bf16" else torch.float32, blocks)
    found = triton.compile(source(kernel, int(width), kind, "".join(others), blocks), target=HOPPER, options=options)
    facts = *assembled(found.asm["ptx"]), found.metadata.shared
    return " ".join(map(str, (kernel.__name__, word, *facts, *transposed_on_the_left(found.asm["ttgir"]))))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        for one in GIVEN if argument.endswith(",given") else KERNELS:
            print(compiled(one, argument), flush=True)
