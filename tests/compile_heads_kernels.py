"""`python tests/compile_heads_kernels.py 64,bf16 128,fp32,documents ...`: compile `hope.heads.fused` ahead of time.

For a GPU of compute capability 9.0, with triton's own ptxas: no GPU is needed. A word is a head width, a type, and
`documents` for the form that looks at them. One line per kernel: its name, the word, registers, bytes spilled, bytes of
shared memory, and bits of the widest load.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this clone, not an installed one

import torch
import triton
import triton.language as tl
from compile_memory_kernels import HOPPER, assembled
from triton.compiler import ASTSource

from hope.heads import fused

TYPES = {"bf16": tl.bfloat16, "fp32": tl.float32}
EXACT = {"partial_p": "*fp32", "same_p": "*u8"}
STRIDES = ("z_token", "z_row", "y_row", "y_head", "y_token", "gate_token", "gate_row")
TILES = (fused._input_forward, fused._merge_forward, fused._merge_backward)


def source(kernel: triton.JITFunction, width: int, kind: str, documents: bool) -> ASTSource:
    rows = max(1, fused.BLOCKS.row // width)
    constants = {"K": width, "BLOCK": fused.BLOCKS.tokens(width), "ROWS": rows, "SEGMENT": fused.BLOCKS.segment}
    constants |= {"UNROLL": fused.BLOCKS.unroll, "LAGS": 4, "SAME": documents, "TYPE": TYPES[kind], "GATE": "silu"}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = EXACT.get(name, f"*{kind}") if name.endswith("_p") else "i32"
        if name.endswith("_p") or name in STRIDES:
            attributes[(place,)] = [["tt.divisibility", 16]]  # what torch allocates, and D
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return ASTSource(kernel, signature, used, attributes)


def compiled(kernel: triton.JITFunction, word: str) -> str:
    width, kind, *others = word.split(",")
    warps = fused.BLOCKS.tile_warps if kernel in TILES else fused.BLOCKS.row_warps
    found = triton.compile(source(kernel, int(width), kind, bool(others)), target=HOPPER, options={"num_warps": warps})
    ptx = found.asm["ptx"]
    widths = [int(count or 1) * int(bits) for count, bits in re.findall(r"ld\.global(?:\.v(\d))?\.b(\d+)", ptx)]
    return " ".join(map(str, (kernel.__name__, word, *assembled(ptx), found.metadata.shared, max(widths))))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        for one in (*TILES, fused._input_backward):
            print(compiled(one, argument), flush=True)
