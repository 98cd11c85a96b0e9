"""The optimizer's kernels compile for a GPU, on any machine: the interpreter accepts more than the compiler does."""

import json
import os
import subprocess
import sys
from pathlib import Path

from interpreted import VARIABLE

# Between them every branch of the kernels, and a network of the default width.
SETTINGS = [
    {"output": "rms_clip", "erase": 0.5, "bias_correction": False},
    {"memory": "mlp", "mlp": {"width": 3}, "normalise": "value", "objective": "dot"},
    {"memory": "mlp", "mlp": {"width": 8}},
    {"memory": "mlp", "mlp": {"width": 3, "key": "gradient"}},
]


def test_kernels_compile_for_hopper(tmp_path):
    """In a process of its own, since kernels are interpreted here; with an empty cache, so that all are compiled."""
    program = Path(__file__).parents[1] / "compile_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, program, *map(json.dumps, SETTINGS)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _, _ in lines] == ["_update", "_sums"] * len(SETTINGS) + ["_add_up"]
    assert all(int(size) > 1000 and target == "sm_90a" for _, size, target in lines), lines
