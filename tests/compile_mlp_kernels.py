"""`python tests/compile_mlp_kernels.py [documents] [warps=8]`: compile the kernels of `mlp` memories ahead of time.

In bf16, for heads and chunks of 64, for a GPU of compute capability 9.0, with triton's own ptxas: no GPU is needed.
`documents`: the form with padding, resets and unfinished chunks. One line per kernel and form: its name, the form,
registers, bytes spilled, bytes of shared memory, matrix products, and products whose left operand is transposed in
registers.
"""

from __future__ import annotations

import sys

from compile_memory_kernels import HOPPER, assembled, transposed_on_the_left  # puts this clone first

# isort: split
import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource

from hope.memory.two_layer.backward import fused as backward
from hope.memory.two_layer.forward import fused as forward
from hope.memory.two_layer.loop import READ_BOXES

ALWAYS_SINGLE = ("ge_p", "ga_p", "ro_p", "s1_p", "s2_p", "valid_p", "rk_p", "rv_p", "eta_p", "ell_p", "norm_p", "o_p",
                 "read_o_p", "ds1_p", "ds2_p", "dw1_p", "dw2_p", "written_p", "dell_p", "dge_p", "dga_p",
                 "dro_p")  # fmt: skip
SINGLE = {"_systems": (*ALWAYS_SINGLE, "ds_p")}  # `_reads` leaves adjoints of states in the operands' type, as ds_p
MARKS = ("resets_p", "last_p")
LAYERS = {"inner": {"OUTER": False}, "outer": {"OUTER": True}}
FORMS = [
    (forward._project, {"-": {}}),
    (forward._write, {"forward": {"ALL": False}, "backward": {"ALL": True}}),
    (forward._read, LAYERS),
    (backward._reads, LAYERS),
    (backward._systems, LAYERS),
    (backward._errors, {"-": {}}),
    (backward._keys, {"-": {}}),
    (backward._gates, {"-": {}}),
]


def source(kernel: triton.JITFunction, flags: dict[str, bool]) -> ASTSource:
    constants = {"K": 64, "C": 64, "N": READ_BOXES + 1, "LOG_C": 6, "TYPE": tl.bfloat16, "PRECISION": "tf32"}
    constants |= {"BOXES": READ_BOXES, "OF_U": READ_BOXES + 1, "OF_X1": READ_BOXES + 1, **flags}
    single = SINGLE.get(kernel.__name__, ALWAYS_SINGLE)
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_p"):
            signature[name] = "*i32" if name in MARKS else "*fp32" if name in single else "*bf16"
            attributes[(place,)] = [["tt.divisibility", 16]]  # what torch allocates
        else:
            signature[name] = "fp32" if name in ("eta_max", "scale") else "i32"
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return ASTSource(kernel, signature, used, attributes)


def main(words: list[str]) -> None:
    marks = dict.fromkeys(("VALID", "RESETS", "PARTIAL"), "documents" in words)
    warps = [int(word.removeprefix("warps=")) for word in words if word.startswith("warps=")]
    options = forward.OPTIONS | ({"num_warps": warps[0]} if warps else {})
    for kernel, forms in FORMS:
        for form, flags in forms.items():
            found = triton.compile(source(kernel, marks | flags), target=HOPPER, options=options)
            facts = *assembled(found.asm["ptx"]), found.metadata.shared
            numbers = (*facts, *transposed_on_the_left(found.asm["ttgir"]))
            print(kernel.__name__, form, *numbers, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
