"""Who is to blame for a hang: pure judgement over what the agents of all ranks report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FROZEN = {"T": "stopped by a signal", "t": "stopped by a debugger", "Z": "dead", "?": "gone"}


def judge(
    reports: Sequence[dict[str, Any]], world: int, found: dict[str, Any], ended: frozenset[int] = frozenset()
) -> dict[str, Any]:
    """The ranks that hold the others up, and why.

    A report has rank, host, step, phase, beats, silent_s and state. In this order: ranks without a report (their node
    is dead), stopped processes, and the ranks with the fewest steps, then beats. All ranks run the same program, so
    that the one with the fewest beats is the one the others wait for; under a pipeline the stages differ by design,
    and the fewest steps decide first. `found`: what the first agent saw; `ended`: ranks whose program has ended.
    """
    silent = sorted(set(range(world)) - {r["rank"] for r in reports} - ended)
    frozen = [r for r in reports if r["state"] in FROZEN]
    if silent or frozen:
        culprits = [{"rank": rank, "host": "?", "why": "no report: its agent or node is dead"} for rank in silent]
        culprits += [_culprit(r, FROZEN[r["state"]]) for r in frozen]
    else:
        least = min(((r["step"], r["beats"]) for r in reports), default=(0, 0))
        behind = [r for r in reports if (r["step"], r["beats"]) == least]
        culprits = [_culprit(r, "behind the others") for r in behind] if len(behind) < len(reports) else []
    return {"step": found.get("step"), "phase": found.get("phase"), "limit_s": found.get("limit_s"), "of": world,
            "culprits": culprits}  # fmt: skip


def _culprit(report: dict[str, Any], why: str) -> dict[str, Any]:
    return {"rank": report["rank"], "host": report["host"], "why": why, "step": report["step"],
            "phase": report["phase"], "silent_s": report["silent_s"]}  # fmt: skip


def line(verdict: dict[str, Any]) -> str:
    """`HANG step=7 phase=backward limit=600s rank=3 node=node2 why='stopped by a signal' ...`, one line."""
    text = f"HANG step={verdict['step']} phase={verdict['phase']} limit={verdict['limit_s']:g}s"
    for who in verdict["culprits"]:
        text += f" rank={who['rank']} node={who['host']} why={who['why']!r}"
        text += f" in={who['phase']} of step {who['step']}" if "phase" in who else ""
    if not verdict["culprits"]:
        text += f" no rank of {verdict['of']} lags: see the stacks"
    return text + (f" nccl={verdict['nccl']}" if "nccl" in verdict else "")
