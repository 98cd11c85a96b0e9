"""The dense parts that `train.compile=dense` fuses, one by one: whether they are right on this device, and their time.

    python benchmarks/dense_forms.py --json docs/measurements/dense_forms.json
    python benchmarks/dense_forms.py --only memory_input,merge_heads --blocks 2048,4,64,512,4,1 1024,4,128,256,4,4

A line per part, at the sizes of a layer: the norm-relative error against float64 of the worst of its output and
gradients, as it is and compiled, from the same bf16 inputs; then ms forward + backward of both, as a caller waits for
them, and in brackets what the device alone computed. BAD: the compiled one is further off than twice the other. The
part with the wrong line is the wrong one.

Parts that have kernels have a line more for each of `--blocks` (fields of `hope.heads.fused.Blocks`). BAD: as above; or
from fp32 inputs the output is more than 1e-6 off, or a gradient more than 1e-5; or a second run is not bit-equal. The
line "at the edges" is the worst of other head widths and of sequences down to one token, at the last of the blocks.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from kept import keep
from torch import Tensor

from hope.arguments import result_file, whole
from hope.dense import Compiled, Form, eager
from hope.heads import ops
from hope.layers import gated, rms_norm, rotated, rotation
from hope.loss import LARGEST, block_alone
from hope.mixers.self_modifying import memory_input, merge_heads
from hope.pipe import piped

Case = tuple[Callable[..., Any], list[Any]]
KERNELS = {memory_input: ops.memory_input, merge_heads: ops.merge_heads}
OUTPUT, GRADIENT = 1e-6, 1e-5  # of the kernels in fp32
EDGES = {"length": (1, 2, 77), "head": (32, 64, 128)}


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
    changed = lambda t: small(t) or (isinstance(t, Tensor) and t.is_floating_point() and dtype == torch.float64)
    turn = lambda t: t.to(dtype) if changed(t) else dtype if isinstance(t, torch.dtype) else t
    leaves = [turn(t).detach().requires_grad_() for t in given if small(t)]
    fill = iter(leaves)
    words = [next(fill) if small(t) else turn(t) for t in given]
    if function is block_alone:  # its gradient is an output
        with torch.no_grad():
            return [t.detach() for t in form(function)(*words)]
    found = form(function)(*words)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(found)
    return [found.detach(), *torch.autograd.grad(found, leaves, weight)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Norm-relative, of outputs and gradients; 0 where both are zero."""
    smallest = torch.finfo(torch.float32).tiny
    return [((a.double() - b).norm() / b.norm().clamp_min(smallest)).item() for a, b in zip(found, exact, strict=True)]


def step_of(case: Case, form: Form) -> Callable[[], None]:
    """Forward and backward."""
    function, given = case
    words = [t.detach().requires_grad_(t.dtype == torch.bfloat16) if isinstance(t, Tensor) else t for t in given]
    leaves = [t for t in words if isinstance(t, Tensor) and t.requires_grad]
    gradient: list[Tensor] = []

    def step() -> None:
        if function is block_alone:
            with torch.no_grad():
                form(function)(*words)
            return
        found = form(function)(*words)
        if not gradient:
            gradient.append(torch.ones_like(found))
        torch.autograd.grad(found, leaves, gradient)

    return step


def milliseconds(case: Case, form: Form, repeat: int, device: str) -> tuple[float, float]:
    """Of forward and backward together: the median of what a caller waits, and the device's own time (0: unknown)."""
    step, times = step_of(case, form), []
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(repeat + 3):
        wait()
        began = time.perf_counter()
        step()
        wait()
        times.append(1000 * (time.perf_counter() - began))
    if device != "cuda":
        return statistics.median(times[3:]), 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeat):
            step()
        wait()
    computed = sum(event.self_device_time_total for event in profile.key_averages())
    return statistics.median(times[3:]), computed / 1000 / repeat


def kernel_row(name: str, case: Case, plain: float, blocks: str, args: argparse.Namespace) -> dict[str, Any]:
    """A part's kernels with programs of these sizes. plain: the error of the plain form."""
    fused = importlib.import_module("hope.heads.fused")
    fused.BLOCKS = fused.Blocks(*map(int, blocks.split(","))) if blocks else fused.Blocks()
    half, single, repeated = kernel_errors(case)
    ms, device_ms = milliseconds(case, kernels, args.repeat, args.device)
    bad = not (max(half) <= 2 * plain + 1e-6 and single[0] <= OUTPUT and max(single[1:]) <= GRADIENT and repeated)
    said = f"error {max(half):.1e}, in fp32 {single[0]:.1e} and {max(single[1:]):.1e}{'' if repeated else ', CHANGES'}"
    used = ",".join(map(str, fused.BLOCKS))
    print(f"{name:26s} {said}{' BAD' if bad else ''}  ms {ms:.3f} ({device_ms:.3f})  kernels {used}", flush=True)
    return {"part": name, "blocks": used, "kernel_error": max(half), "kernel_errors_fp32": single, "kernel_ms": ms,
            "kernel_device_ms": device_ms, "bad": bad}  # fmt: skip


def kernels(function: Callable[..., Any], /) -> Callable[..., Any]:
    """The form of parts that have kernels."""
    return KERNELS[function]


def kernel_errors(case: Case) -> tuple[list[float], list[float], bool]:
    """In bf16, in fp32, and whether a second run is bit-equal."""
    exact = results(case, eager, torch.float64)
    once, again = (results(case, kernels, torch.bfloat16) for _ in range(2))
    half, repeated = errors(once, exact), all(map(torch.equal, once, again))
    return half, errors(results(case, kernels, torch.float32), exact), repeated


def edge_row(args: argparse.Namespace) -> dict[str, Any]:
    """The worst of the kernels' errors in fp32, over `EDGES`."""
    worst, where = [0.0, 0.0], ["", ""]
    for length, head in itertools.product(EDGES["length"], EDGES["head"]):
        sizes = argparse.Namespace(**{**vars(args), "length": length, "head": head, "width": 3 * head, "batch": 2})
        for name, case in cases(sizes).items():
            if case[0] in KERNELS:
                single = kernel_errors(case)[1]
                for place, error in enumerate((single[0], max(single[1:]))):
                    if not error <= worst[place]:
                        worst[place], where[place] = error, f"{name}, {length} tokens, heads of {head}"
    bad = not (worst[0] <= OUTPUT and worst[1] <= GRADIENT)
    said = f"in fp32 {worst[0]:.1e} and {worst[1]:.1e}{' BAD' if bad else ''}"
    print(f"{'at the edges':26s} {said}  ({'; '.join(where)})", flush=True)
    return {"part": "at the edges", "kernel_errors_fp32": worst, "where": where, "bad": bad}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--length", type=whole(), default=4096)
    parser.add_argument("--batch", type=whole(), default=8)
    parser.add_argument("--width", type=whole(), default=1536)
    parser.add_argument("--head", type=whole(), default=64)
    parser.add_argument("--vocabulary", type=whole(), default=32000)
    parser.add_argument("--repeat", type=whole(), default=10)
    parser.add_argument("--only", help="parts by their first words, such as memory_input,merge_heads")
    parser.add_argument("--blocks", nargs="*", help="sizes of the kernels' programs; on a GPU those of a run")
    parser.add_argument("--json", type=result_file)
    args = parser.parse_args(argv)
    blocks = args.blocks if args.blocks is not None else [""] if args.device == "cuda" else []
    compiled, rows = Compiled(args.backend), []
    for name, case in cases(args).items():
        if args.only and name.split(",")[0] not in args.only.split(","):
            continue
        exact = results(case, eager, torch.float64)
        plain, fused = (max(errors(results(case, form, torch.bfloat16), exact)) for form in (eager, compiled))
        del exact
        before, after = (milliseconds(case, form, args.repeat, args.device) for form in (eager, compiled))
        bad = not fused <= 2 * plain + 1e-6
        rows.append({"part": name, "error": plain, "compiled_error": fused, "ms": before[0], "compiled_ms": after[0],
                     "device_ms": before[1], "compiled_device_ms": after[1], "bad": bad})  # fmt: skip
        said = f"error {plain:.1e}, compiled {fused:.1e}{' BAD' if bad else ''}"
        times = f"ms {before[0]:.3f} ({before[1]:.3f}), compiled {after[0]:.3f} ({after[1]:.3f})"
        print(f"{name:26s} {said}  {times}", flush=True)
        if case[0] in KERNELS:
            rows += [kernel_row(name, case, plain, one, args) for one in blocks]
    if blocks:
        rows.append(edge_row(args))
    if args.json:
        gpu = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        keep(args.json, [{**row, "gpu": gpu} for row in rows])
    return int(any(row["bad"] for row in rows))


if __name__ == "__main__":
    sys.exit(piped(main))
