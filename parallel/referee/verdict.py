"""The verdict: every quantity of a layout against one device, each within its bound or within rounding.

A gradient may be a sum that cancels. Its relative error is then rounding that the sum amplifies, on one device as on
many, and no fixed bound fits it. So a quantity beyond its bound is settled: one device computes it again in a wider
type, and a few times in the task's own precision from weights that differ in the last place only. How far those stray
from the wide result is what rounding does to this quantity on one device. The layout may stray `ROUNDING_FACTOR` times
as far. A missing sum does not become smaller in a wider type, and is not excused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from parallel.referee.evidence import Evidence, Task
from parallel.referee.one_device import single_device

# Relative error of a gradient tensor (Frobenius norms) or a memory state. fp32: sums in another order. bf16: parameters
# and activations carry 8 bits. An initial memory state's in a model of width 32 was seen to move by 9e-2.
TOLERANCE = {"fp32": 1e-5, "bf16": 1.5e-1}
# Of weights after the steps. fp32: each tensor. bf16: all weights together, because a gate bias that starts at zero has
# moved by a few steps of noisy sign and parts by half of its size.
WEIGHT_TOLERANCE = {"fp32": 1e-4, "bf16": 8e-2}
LOSS_TOLERANCE = {"fp32": 2e-6, "bf16": 5e-3}

WIDER = {"fp32": torch.float64, "bf16": torch.float32}
DRAWS = 4
# The worst of 4 draws against a right layout's own draw. docs/parallelism.md has the largest ratio that was seen.
ROUNDING_FACTOR = 4.0

Quantity = tuple[str, str]
"""(kind, name): kind is gradient, weight, loss, norm, state or weights (all of them together)."""


@dataclass(frozen=True)
class Settled:
    """A quantity beyond its bound: its error against the wider reference, and what rounding does on one device."""

    quantity: Quantity
    error: float
    rounding: float

    @property
    def allowed(self) -> float:
        return ROUNDING_FACTOR * self.rounding


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """|ours - reference| / |reference| in fp64; for a reference of zero, |ours|. NaN counts as infinite."""
    reference = reference.double()
    scale = reference.norm().item()
    error = (ours.double() - reference).norm().item() / (scale or 1.0)
    return error if error == error else float("inf")


def errors(reference: Evidence, found: Evidence, names: list[str]) -> dict[Quantity, float]:
    """The relative error of every quantity of parameters `names`, the worst over its copies."""
    result: dict[Quantity, float] = {}
    for name in names:
        copies = [relative(g, reference.gradients[name][0]) for g in found.gradients[name]]
        result["gradient", name] = max(copies, default=0.0)
        result["weight", name] = max(relative(w, reference.weights[name][0]) for w in found.weights[name])
    result["weights", "all"] = relative(*(_flat([side.weights[n][0] for n in names]) for side in (found, reference)))
    for kind, ours, theirs in (
        ("loss", found.losses, reference.losses),
        ("norm", found.grad_norms, reference.grad_norms),
    ):
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1):
            result[kind, f"step {step}"] = relative(torch.tensor(a), torch.tensor(b))
    for name in reference.state_norms.keys() | found.state_norms.keys():
        here, there = (torch.tensor(side.state_norms.get(name, 0.0)) for side in (found, reference))
        result["state", name] = relative(here, there)
    return result


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def bound_of(quantity: Quantity, precision: str, tolerance: float | None) -> float | None:
    """The largest error at which a quantity is equal without further questions; None: it is shown, not judged."""
    kind, name = quantity
    exact = tolerance or TOLERANCE[precision]
    if kind == "loss":
        return max(tolerance or 0.0, LOSS_TOLERANCE[precision])
    moved = max(tolerance or 0.0, WEIGHT_TOLERANCE[precision])
    if precision == "bf16":  # later gradients are as noisy as the first
        return {"weight": None, "weights": moved}.get(kind, exact)
    if kind == "norm":  # in fp32 later gradients follow the weights
        return exact if name == "step 1" else moved
    return {"weight": moved, "weights": None}.get(kind, exact)


def judge(task: Task, found: Evidence, device: torch.device, tolerance: float | None = None) -> dict[str, Any]:
    """The verdict on `found`, with its references computed on `device`."""
    reference = single_device(task, device)

    def settle() -> Callable[[Quantity], Settled]:
        names = _common(reference, found)
        exact = single_device(task, device, dtype=WIDER[task.precision])
        draws = [errors(exact, single_device(task, device, draw=number), names) for number in range(DRAWS)]
        ours = errors(exact, found, names)
        return lambda quantity: Settled(quantity, ours[quantity], max(draw[quantity] for draw in draws))

    return compare(reference, found, task.precision, tolerance, settle)


def _common(reference: Evidence, found: Evidence) -> list[str]:
    return [name for name in reference.weights if name in found.weights]


def compare(
    reference: Evidence,
    found: Evidence,
    precision: str,
    tolerance: float | None = None,
    settle: Callable[[], Callable[[Quantity], Settled]] | None = None,
) -> dict[str, Any]:
    """The verdict, ready for JSON: `equal`, per parameter the worst errors over its copies, losses, norms, states.

    `worst` is the largest error over what is allowed for its quantity: at most 1 where the layout is right. `settled`
    lists the quantities that were settled by rounding. Without `settle` none is.
    """
    names, missing = _common(reference, found), sorted(set(reference.weights) ^ set(found.weights))
    found_errors = errors(reference, found, names)
    bounds = {q: b for q in found_errors if (b := bound_of(q, precision, tolerance)) is not None}
    shares = {q: found_errors[q] / bound for q, bound in bounds.items()}
    beyond = [q for q, share in shares.items() if share > 1]
    settled: list[Settled] = []
    if beyond and settle is not None and tolerance is None and math.isfinite(max(shares.values())) and not missing:
        by_rounding = settle()
        settled = [by_rounding(q) for q in beyond]
        shares |= {s.quantity: min(shares[s.quantity], s.error / s.allowed) for s in settled if s.allowed}
    worst = max(shares.values())
    pairs = list(zip(reference.losses, found.losses, strict=True))
    return {
        "equal": not missing and worst <= 1,
        "worst": worst,
        "tolerance": tolerance or TOLERANCE[precision],
        "weight_tolerance": max(tolerance or 0.0, WEIGHT_TOLERANCE[precision]),
        "loss_tolerance": max(tolerance or 0.0, LOSS_TOLERANCE[precision]),
        "parameters": _rows(found_errors, found, names),
        "missing": missing,
        "settled": [_settled_row(s, bounds) for s in settled],
        "losses": [
            {"one_device": a, "layout": b, "error": found_errors["loss", f"step {step}"]}
            for step, (a, b) in enumerate(pairs, start=1)
        ],
        "weights_error": found_errors["weights", "all"],
        "grad_norm_error": max(e for (kind, _), e in found_errors.items() if kind == "norm"),
        "state_norm_error": max((e for (kind, _), e in found_errors.items() if kind == "state"), default=None),
    }


def _rows(found_errors: dict[Quantity, float], found: Evidence, names: list[str]) -> list[dict[str, Any]]:
    rows = [
        {
            "name": name,
            "gradient": found_errors["gradient", name],
            "weight": found_errors["weight", name],
            "copies": len(found.weights[name]),
        }
        for name in names
    ]
    return sorted(rows, key=lambda row: -row["gradient"])


def _settled_row(settled: Settled, bounds: dict[Quantity, float]) -> dict[str, Any]:
    kind, name = settled.quantity
    return {
        "kind": kind,
        "name": name,
        "error": settled.error,
        "rounding": settled.rounding,
        "allowed": max(settled.allowed, bounds[settled.quantity]),
    }


def table(verdict: dict[str, Any], rows: int) -> str:
    """The verdict as a table, worst parameters first."""
    lines = [f"{'parameter':<48} {'gradient':>10} {'weight':>10}  copies"]
    for row in verdict["parameters"][:rows]:
        lines.append(f"{row['name']:<48} {row['gradient']:>10.1e} {row['weight']:>10.1e}  {row['copies']:>6}")
    left = len(verdict["parameters"]) - rows
    if left > 0:
        lines.append(f"... and {left} parameters with smaller errors")
    for step, loss in enumerate(verdict["losses"], start=1):
        lines.append(
            f"step {step}  one device {loss['one_device']:.7f}  layout {loss['layout']:.7f}  {loss['error']:.1e}"
        )
    states = verdict["state_norm_error"]
    sums = f"all weights {verdict['weights_error']:.1e}  gradient norm {verdict['grad_norm_error']:.1e}"
    lines.append(f"{sums}  memory states {'none compared' if states is None else f'{states:.1e}'}")
    lines += [_settled_line(s) for s in verdict["settled"]]
    if verdict["missing"]:
        lines.append("on one side only: " + ", ".join(verdict["missing"]))
    word = "EQUAL" if verdict["equal"] else "DIFFERENT"
    bounds = ("tolerance", "weight_tolerance", "loss_tolerance")
    lines.append(f"{word}  tolerances: gradients {verdict[bounds[0]]:g}, weights {verdict[bounds[1]]:g}, "
                 f"losses {verdict[bounds[2]]:g}")  # fmt: skip
    return "\n".join(lines)


def _settled_line(settled: dict[str, Any]) -> str:
    inside = settled["error"] <= settled["allowed"]
    return (
        f"{settled['kind']} of {settled['name']}: {settled['error']:.1e} from the wider type, "
        f"one device rounds by {settled['rounding']:.1e}, allowed {settled['allowed']:.1e}: "
        f"{'rounding' if inside else 'NOT rounding'}"
    )
