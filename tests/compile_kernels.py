"""`python tests/compile_kernels.py '{"memory": "mlp"}' ...`: compile the fused optimizer kernels ahead of time.

For a GPU of compute capability 9.0, with triton's own ptxas: no GPU is needed. One argument per `DmgdConfig`, its
settings as JSON, those of its mlp in a mapping. Prints per kernel its name, the bytes of machine code and the PTX
target.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this clone, not an installed one

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hope.optim import fused
from hope.optim.config import DmgdConfig, MlpConfig, OptimConfig
from hope.optim.rules import UpdateRule

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = dict.fromkeys(("p", "s", "v", "g", "networks", "rms", "partial"), "*fp32")
POINTERS |= {"starts": "*i64", "numels": "*i32", "tensors": "*i32", "bounds": "*i32", "total": "*fp64"}
RATES = ("scale", "lr", "keep", "beta1", "gain1", "beta2", "gain2", "eps")
RATES += ("correct1", "correct2", "correct1_before", "correct2_before")
TYPES = {**POINTERS, **dict.fromkeys(RATES, "fp32"), "programs": "i32", "numbers": "i32"}


def compiled(kernel: triton.JITFunction, constants: dict[str, object]) -> str:
    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps")}
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in kernel.arg_names}
    found = triton.compile(ASTSource(kernel, signature, constants), target=HOPPER, options=options)
    target = re.search(r"\.target (\w+)", found.asm["ptx"])
    return f"{kernel.__name__} {len(found.asm['cubin'])} {target and target[1]}"


def main(settings: list[str]) -> None:
    nothing = torch.empty(0)
    table = fused.Table(nothing, nothing, nothing, nothing, nothing, aligned=True)
    for words in settings:
        chosen = json.loads(words)
        dmgd = DmgdConfig(**{**chosen, "mlp": MlpConfig(**chosen.get("mlp", {}))})
        rule = UpdateRule.of(OptimConfig(dmgd=dmgd))
        choices = {"CLIP": rule.clip, "ERASE": rule.erase, **fused._choices(rule, table, "update")}
        print(compiled(fused._update, choices))
        print(compiled(fused._sums, {"L2": rule.l2, **fused._choices(rule, table, "sums")}))
    print(compiled(fused._add_up, {"BLOCK": 256, "num_warps": 4}))


if __name__ == "__main__":
    main(sys.argv[1:])
