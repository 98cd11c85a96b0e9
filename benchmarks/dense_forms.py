"""The dense parts that `train.compile=dense` fuses, one by one: whether they are right on this device, and their time.

    python benchmarks/dense_forms.py --json docs/measurements/dense_forms.json

A line per part, at the sizes of a layer: the norm-relative error against float64 of the worst of its output and
gradients, as it is and compiled, from the same bf16 inputs; then ms forward + backward of both. BAD: the compiled one
is further off than twice the other. The part with the wrong line is the wrong one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from hope.dense import Compiled, Form, eager
from hope.layers import gated, rms_norm, rotated, rotation
from hope.loss import LARGEST, block_alone
from hope.mixers.self_modifying import memory_input, merge_heads

Case = tuple[Callable[..., Any], list[Any]]


def cases(args: argparse.Namespace) -> dict[str, Case]:
    """Every part with its arguments in bf16."""
    generator = torch.Generator(args.device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=args.device).bfloat16()
    length, batch, width, head = args.length, args.batch, args.width, args.head
    trunk, heads = (length, batch, width), (batch, width // head, length, head)
    same = torch.rand(3, length, batch, generator=generator, device=args.device) < 0.9
    taps, history = draw(width, 4), draw(3, batch, width)
    rows = min(4096, LARGEST // args.vocabulary, length * batch)
    row = torch.randint(0, args.vocabulary, (rows,), generator=generator, device=args.device)
    count = torch.rand(rows, generator=generator, device=args.device)
    return {
        "rms_norm": (rms_norm, [draw(*trunk), draw(width)]),
        "gated": (
            gated,
            [draw(length, batch, 8 * width // 3 // 64 * 64), draw(length, batch, 8 * width // 3 // 64 * 64)],
        ),
        "memory_input": (memory_input, [draw(*trunk), taps, history, None, head, torch.bfloat16]),
        "memory_input, documents": (memory_input, [draw(*trunk), taps, history, same, head, torch.bfloat16]),
        "merge_heads": (merge_heads, [draw(*heads), draw(*trunk), draw(head)]),
        "rotated": (rotated, [draw(*heads), *rotation(draw(*heads), 10000.0)]),
        "block_alone": (block_alone, [4 * draw(rows, args.vocabulary), row, count]),
    }


def results(case: Case, form: Form, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and gradients of all bf16 inputs, computed in `dtype`."""
    function, given = case
    small = lambda t: isinstance(t, Tensor) and t.dtype == torch.bfloat16
    turn = lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and dtype == torch.float64 else t
    words = [dtype if isinstance(t, torch.dtype) and dtype == torch.float64 else turn(t) for t in given]
    leaves = [t.detach().requires_grad_() for t in (turn(t) for t in given if small(t))]
    fill = iter(leaves)
    words = [next(fill) if small(t) else word for t, word in zip(given, words, strict=True)]
    if function is block_alone:  # its gradient is an output
        with torch.no_grad():
            return [t.detach() for t in form(function)(*words)]
    found = form(function)(*words)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found)
    return [found.detach(), *torch.autograd.grad(found, leaves, weight)]


def worst(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))


def milliseconds(case: Case, form: Form, repeat: int, device: str) -> float:
    """Median of forward and backward together."""
    function, given = case
    words = [t.detach().requires_grad_(t.dtype == torch.bfloat16) if isinstance(t, Tensor) else t for t in given]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    leaves = [t for t in words if isinstance(t, Tensor) and t.requires_grad]
    times, gradient = [], None
    for _ in range(repeat + 3):
        wait()
        began = time.perf_counter()
        if function is block_alone:
            with torch.no_grad():
                form(function)(*words)
        else:
            found = form(function)(*words)
            gradient = torch.ones_like(found) if gradient is None else gradient
            torch.autograd.grad(found, leaves, gradient)
        wait()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--head", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    compiled, rows = Compiled(args.backend), []
    for name, case in cases(args).items():
        exact = results(case, eager, torch.float64)
        plain, fused = (worst(results(case, form, torch.bfloat16), exact) for form in (eager, compiled))
        del exact
        before, after = (milliseconds(case, form, args.repeat, args.device) for form in (eager, compiled))
        bad = not fused <= 2 * plain + 1e-6
        rows.append(
            {"part": name, "error": plain, "compiled_error": fused, "ms": before, "compiled_ms": after, "bad": bad}
        )
        said = f"error {plain:.1e}, compiled {fused:.1e}{' BAD' if bad else ''}  ms {before:.3f}, compiled {after:.3f}"
        print(f"{name:26s} {said}", flush=True)
    if args.json:
        gpu = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        args.json.write_text(json.dumps([{**row, "gpu": gpu} for row in rows], indent=1) + "\n")
    return int(any(row["bad"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
