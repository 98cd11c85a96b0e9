"""Triton's kernels on a machine without a GPU: run by triton's interpreter, on CPU tensors, in this process only."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
GPU = torch.cuda.is_available()
VARIABLE = "TRITON_INTERPRET"


def define_kernels() -> None:
    """Import every `fused.py` of hope/ with its kernels interpreted. With a GPU do nothing: there they are compiled.

    Kernels are interpreted for good if the variable is set when they are defined. That holds for triton's own too, such
    as `tl.sum`: this must come before anything else imports triton.
    """
    if GPU or importlib.util.find_spec("triton") is None:
        return
    with interpreting():
        for path in sorted((ROOT / "hope").rglob("fused.py")):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """For definitions of kernels and for calls, in which triton 3.9 defines more of its own. No child inherits it."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For a fixture of tests that call kernels. Nothing with a GPU.

    Triton 3.6's interpreter makes a number of an array [1], which numpy 2.4 refuses.
    """
    if GPU:
        yield
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    with interpreting():
        yield


def rounded_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bf16 operands as a GPU makes them, with sums in fp32, and fp32 rounded to the nearest bf16.

    Triton's interpreter multiplies the bits of bf16 numbers as integers, and cuts fp32 off.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast = builder.cast_impl

    def widened(tensor):
        if tensor.dtype.scalar != tl.bfloat16:
            return tensor.data
        return (tensor.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self, a, b, d, *_):
        return handle(np.matmul(widened(a), widened(b), dtype=np.float32) + d.data, d.dtype.scalar)

    def rounded(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        return handle(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), tl.bfloat16)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    for name in ("cast_impl", "create_fp_trunc", "create_fp_ext"):
        monkeypatch.setattr(builder, name, rounded)
