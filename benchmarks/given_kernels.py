"""The kernels of the linear family on a GPU: whether they are right, and how long one loop takes.

    python benchmarks/given_kernels.py --json docs/measurements/given_kernels.json

Outputs, end state and all gradients against the plain form in float64 on the CPU, relative in norm, two runs with each
other, and every stage of the forward pass with formulas on what the stages before it have stored. The plain form in
float64 on the GPU itself is compared too: its triangular solution comes from another library there.
Times are of forward and backward of the loop alone, bf16, against the plain form in fp32 with TF32 products, medians of
`--steps`. Width 1536 in heads of K, 8 x 4096 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from kept import keep
from memory_stages import relative
from torch import Tensor

from hope.arguments import result_file, whole
from hope.memory.given.ops import fused_memory
from hope.memory.linear import linear_memory
from hope.pipe import piped

# (outputs, gradients), relative in norm, as in benchmarks/memory_kernels.py
BOUNDS = {"bf16": (1e-2, 2e-2), "tf32": (4e-3, 4e-3)}
CASES = [
    {"K": K, "kind": kind, "L": L, "erase": erase, "decay": decay}
    for K, kind in ((64, "bf16"), (128, "bf16"), (64, "tf32"))
    for L in (1024, 4096)
    for erase, decay in ((True, True), (True, False), (False, True))
]
TIMES = [{"K": K, "erase": erase} for K in (64, 128) for erase in (True, False)]


def inputs(B: int, H: int, L: int, K: int, decay: bool, dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
    """q, unit keys, values, a decay of about 0.98 per token, a write rate and a state, leaves on `device`."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(B, H, *shape, generator=generator, dtype=torch.float64)
    given = {
        "q": torch.nn.functional.normalize(draw(L, K), dim=-1),
        "k": torch.nn.functional.normalize(draw(L, K), dim=-1),
        "v": draw(L, K),
        "log_decay": -0.02 * draw(L, 1).exp() if decay else None,
        "write": draw(L).sigmoid(),
        "state": 0.3 * draw(K, K),
    }
    return {name: None if t is None else t.to(device, dtype).requires_grad_() for name, t in given.items()}


def results(loop: Callable[..., tuple[Tensor, Tensor]], given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    y, end = loop(**given)
    weights = lambda t, seed: torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)).to(t)
    ((y * weights(y, 1)).sum() + (end * weights(end, 2)).sum()).backward()
    found = {"y": y.detach(), "end": end.detach()}
    for name, leaf in given.items():
        if leaf is not None:
            assert leaf.grad is not None
            found[f"d{name}"], leaf.grad = leaf.grad, None
    return found


def stages(case: dict[str, Any], operands: torch.dtype, device: str) -> dict[str, float]:
    """Errors of every stage of the forward pass against float64, from what the stages before it have stored."""
    from hope.memory.given import fused

    C, given = 64, inputs(2, 3, case["L"], case["K"], case["decay"], torch.float32, device)
    q, k, v = (given[name].detach().to(operands).contiguous() for name in ("q", "k", "v"))  # type: ignore[union-attr]
    b, start = (given[name].detach().contiguous() for name in ("write", "state"))  # type: ignore[union-attr]
    ell = torch.zeros_like(b) if given["log_decay"] is None else given["log_decay"].detach().squeeze(-1).contiguous()
    made = fused.forward(q, k, v, ell, b, start, case["erase"], C, "tf32")
    made = {name: t.cpu() for name, t in made.items()}
    cut = lambda t: t.cpu().double().unflatten(2, (-1, C))
    Q, K, V, G, rate, u = (cut(t) for t in (q, k, v, ell, b, made["u"]))
    G, rate, S = G.cumsum(-1), rate.unsqueeze(-1), made["states"].double()
    ratio = (G.unsqueeze(-1) - G.unsqueeze(-2)).tril().exp().tril()
    expected = {}
    if case["erase"]:
        T = (rate * (K @ K.mT) * ratio).tril(-1)
        X = cut(made["inverse"])
        eye = torch.eye(C, dtype=torch.float64)
        expected["inverse"] = torch.linalg.solve_triangular(T, eye.expand_as(T), upper=False, unitriangular=True)
        expected["u0"], expected["w"] = -X @ (rate * V), X @ (rate * G.exp().unsqueeze(-1) * K)
        expected["u"] = cut(made["w"]) @ S + cut(made["u0"])
    end = (G[..., -1:] - G).exp().unsqueeze(-1)
    after = G[..., -1, None, None].exp() * S - K.mT @ (end * u)
    expected["y"] = G.exp().unsqueeze(-1) * (Q @ S) - (Q @ K.mT * ratio) @ u
    found = {name: cut(made[name]) for name in expected}
    expected["states"], found["states"] = after[:, :, :-1], S[:, :, 1:]
    expected["end"], found["end"] = after[:, :, -1], made["end"].double()
    return {name: relative(found[name], expected[name]) for name in expected}


def check(case: dict[str, Any], device: str) -> dict[str, Any]:
    """A row: the worst errors, and what is beyond its bound."""
    torch.backends.cuda.matmul.allow_tf32 = False
    operands = torch.bfloat16 if case["kind"] == "bf16" else torch.float32
    sizes = 2, 3, case["L"], case["K"], case["decay"]
    common = {"erase": case["erase"], "chunk": 64}
    plain = partial(linear_memory, **common)
    expected, there = (results(plain, inputs(*sizes, torch.float64, where)) for where in ("cpu", device))
    fused = partial(fused_memory, operands=operands, **common)
    found, again = (results(fused, inputs(*sizes, torch.float32, device)) for _ in range(2))
    against = lambda other: {name: relative(other[name].cpu(), expected[name]) for name in expected}
    errors, of_plain = against(found), against(there)
    of_outputs, of_gradients = BOUNDS[case["kind"]]
    limit = lambda name: of_outputs if name in ("y", "end") else of_gradients
    bad = [name for name, error in errors.items() if not error <= limit(name)]
    bad += [f"two runs differ: {name}" for name in found if not torch.equal(found[name], again[name])]
    bad += [f"plain in float64: {name}" for name, error in of_plain.items() if not error <= 1e-9]
    found_by = {"errors": errors, "plain": of_plain, "stages": stages(case, operands, device)}
    return {**case, "gpu": _gpu(device), **found_by, "bad": bad}


def time(case: dict[str, Any], device: str, steps: int) -> dict[str, Any]:
    """A row: ms of forward and backward, fused and plain."""
    torch.backends.cuda.matmul.allow_tf32 = True
    row = {**case, "gpu": _gpu(device), "batch": 8, "length": 4096, "width": 1536}
    common = {"erase": case["erase"], "chunk": 64}
    forms = {
        "fused": partial(fused_memory, operands=torch.bfloat16, **common),
        "plain": partial(linear_memory, **common),
    }
    for name, loop in forms.items():
        dtype = torch.bfloat16 if name == "fused" else torch.float32
        given = inputs(8, 1536 // case["K"], 4096, case["K"], True, dtype, "cpu")
        given = {n: None if t is None else t.detach().to(device).requires_grad_() for n, t in given.items()}
        for leaf in ("log_decay", "write", "state"):
            given[leaf] = given[leaf].detach().float().requires_grad_()  # type: ignore[union-attr]
        seconds = []
        for _ in range(steps + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            y, state = loop(**given)
            torch.autograd.backward([y, state], [torch.ones_like(y), torch.ones_like(state)])
            end.record()
            torch.cuda.synchronize()
            seconds.append(begin.elapsed_time(end))
        row[f"{name}_ms"] = statistics.median(seconds[2:])
    return row


def _gpu(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def write(path: Path | None, found: dict[str, list[dict[str, Any]]]) -> None:
    """As rows come: a later case may hang, or have no time."""
    if path is not None:
        keep(path, found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=result_file)
    parser.add_argument("--steps", type=whole(), default=10)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    found: dict[str, list[dict[str, Any]]] = {"check": [], "time": []}
    for case in CASES:
        row = check(case, args.device)
        worst = {name: f"{error:.1e}" for name, error in row["errors"].items()}
        print(case, worst, "BAD: " + ", ".join(row["bad"]) if row["bad"] else "ok", flush=True)
        print("  stages", {name: f"{error:.1e}" for name, error in row["stages"].items()}, flush=True)
        found["check"].append(row)
        write(args.json, found)
    for case in TIMES if args.device == "cuda" else []:
        row = time(case, args.device, args.steps)
        print(row, flush=True)
        found["time"].append(row)
        write(args.json, found)
    return int(any(row["bad"] for row in found["check"]))


if __name__ == "__main__":
    sys.exit(piped(main))
