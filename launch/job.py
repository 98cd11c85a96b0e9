"""What the batch script asks: `python -m launch.job begin` may this attempt run, `... end` what happens now,
`... stop` that none can.

An attempt is one start of the job, `JOB.RESTART`. `end` reads how every rank ended (exit/RANK.json; srun's own code is
143 whenever it killed a task), writes the verdict to control/verdict.json and prints one word for the script: done,
stop, or requeue. Starts without a newer checkpoint are counted: `launch.attempts` of them in a row and it stops.
Standard library only, and nothing newer than Python 3.9: it runs on the host, outside any container.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import slurm
from launch.folder import RunFolder, append_line, read_json, write_json

DONE, STOP, REQUEUE, CANCELLED = "done", "stop", "requeue", "cancelled"
EXIT_DONE, EXIT_STOP = 10, 93
CAUSES = {2: "configuration or data error", 93: "the program says: do not restart"}


@dataclass(frozen=True)
class Verdict:
    """What becomes of the run after an attempt.

    Attributes:
        word: done, stop, requeue or cancelled.
        cause: why, in one line.
        first: exit record of the rank that ended first or holds the others up; empty if there is none.
    """

    word: str
    cause: str
    first: dict[str, Any] = field(default_factory=dict)


def classify(control: Path, world: int, code: int, *, signalled: bool) -> Verdict:
    """The verdict that the control folder of an attempt of `world` ranks supports.

    `code`: what the starter (srun, torchrun) returned, used only in words; `signalled`: the batch script got USR1.
    """
    exits = [read_json(path) for path in sorted((control / "exit").glob("[0-9]*.json"))]
    exits = [e for e in exits if e]
    for fatal, cause in CAUSES.items():
        for e in exits:
            if e["code"] == fatal:
                return Verdict(STOP, e.get("why", cause), e)
    if (control / "parity.json").exists():
        return Verdict(STOP, "the referee finds this layout different from one device, see the log")
    if (control / "bad_nodes.json").exists():
        bad = read_json(control / "bad_nodes.json", {})
        return Verdict(REQUEUE, "preflight: " + "; ".join(f"{node}: {why}" for node, why in bad.items()))
    culprits = read_json(control / "culprits.json")
    if culprits or any(e["how"] == "hang" for e in exits):
        who = (culprits or {}).get("culprits") or [{}]
        records = (culprits or {}).get("nccl")
        return Verdict(REQUEUE, "hang" + (f", collectives in {records}" if records else ""), who[0])
    failed = sorted((e for e in exits if e["how"] == "failed"), key=lambda e: e["time"])
    if failed:
        what = failed[0].get("signal") or f"exit code {failed[0]['code']}"
        return Verdict(REQUEUE, f"rank {failed[0]['rank']} on {failed[0]['host']}: {what}", failed[0])
    if signalled and not exits:
        return Verdict(REQUEUE, "USR1 came before training began")
    saved = [e for e in exits if e["code"] == 85]
    if saved:
        name = next((e["signalled"] for e in saved if e["signalled"]), None) or ("USR1" if signalled else None)
        return Verdict(REQUEUE, f"saved on signal {name}" if name else "the program asks to be started again")
    silent = sorted(set(range(world)) - {e["rank"] for e in exits})
    if silent:
        shown = ", ".join(map(str, silent[:8])) + (" ..." if len(silent) > 8 else "")
        return Verdict(REQUEUE, f"no exit record of {len(silent)} ranks ({shown}); the starter returned {code}")
    return Verdict(DONE, "every rank finished")


def begin(run: RunFolder, attempt: str, env: dict[str, str]) -> int:
    """Open an attempt; 0 if it may run, EXIT_DONE or EXIT_STOP if the run is over."""
    job = read_json(run.job, {})
    last = read_json(run.verdict, {})
    if run.cancelled.exists() or last.get("verdict") in (DONE, STOP, CANCELLED):
        print(f"launch: this run is over ({last.get('verdict', CANCELLED)}: {last.get('cause', '')}); "
              "`python -m launch resume RUN` starts it again")  # fmt: skip
        return EXIT_DONE if last.get("verdict") == DONE else EXIT_STOP
    budget = read_json(run.budget, {"step": run.saved_step(), "left": job["attempts"], "open": None})
    if budget["open"] and budget["open"] != attempt:  # no verdict: node failure, time limit, or killed while saving
        lost = Verdict(REQUEUE, "the attempt ended without a verdict (node failure or time limit)")
        spent = spend(run, budget, lost, job["attempts"])
        _write(run, budget["open"], spent, budget)
        if spent.word == STOP:
            return EXIT_STOP
    write_json(run.budget, {**budget, "open": attempt})
    control = run.attempt(attempt)
    control.mkdir(parents=True, exist_ok=True)
    write_json(control / "limits.json", job["limits"])
    facts = {"attempt": attempt, "began": time.time(), "nodes": env.get("SLURM_JOB_NODELIST", os.uname().nodename)}
    write_json(control / "attempt.json", facts)
    resumes = f"resumes from step {run.saved_step()}" if run.saved_step() >= 0 else "starts from step 0"
    print(f"launch: attempt {attempt} on {facts['nodes']} {resumes}; {budget['left']} starts left without progress")
    return 0


def spend(run: RunFolder, budget: dict[str, Any], verdict: Verdict, attempts: int) -> Verdict:
    """Count this attempt in `budget`, which is changed; the verdict, or STOP when the budget is used up."""
    step = run.saved_step()
    if step > budget["step"]:
        budget.update(step=step, left=attempts)
    elif verdict.word == REQUEUE:
        budget["left"] -= 1
        if budget["left"] <= 0:
            return Verdict(STOP, verdict.cause, verdict.first)
    return verdict


def end(run: RunFolder, attempt: str, code: int, *, signalled: bool, in_slurm: bool) -> str:
    """Close an attempt and write its verdict, whose word is returned.

    `code`, `signalled`: see `classify`; `in_slurm`: also ask SLURM whether the job was cancelled.
    """
    job = read_json(run.job, {})
    budget = read_json(run.budget, {"step": -1, "left": job["attempts"], "open": attempt})
    verdict = classify(run.attempt(attempt), job["world"], code, signalled=signalled)
    if verdict.word != DONE and (run.cancelled.exists() or (in_slurm and _is_cancelled(attempt))):
        verdict = Verdict(CANCELLED, "cancelled by the user", verdict.first)
    elif verdict.word == DONE and run.saved_step() < job.get("steps", 0):  # Ctrl-C and the file STOP end with 0 too
        verdict = Verdict(CANCELLED, f"ended on request at step {run.saved_step()} of {job['steps']}", verdict.first)
    spent = spend(run, budget, verdict, job["attempts"])
    if spent.word != verdict.word:
        cause = f"{job['attempts']} starts in a row made no checkpoint newer than step {budget['step']}"
        spent = Verdict(spent.word, f"{spent.cause}; {cause}", spent.first)
    budget["open"] = None
    _write(run, attempt, spent, budget)
    return spent.word


def stop(run: RunFolder, attempt: str, cause: str) -> None:
    """The verdict of a job that cannot start a program at all: its site's own lines fail, and would again."""
    budget = read_json(run.budget, {"step": run.saved_step(), "left": read_json(run.job, {}).get("attempts", 0)})
    _write(run, attempt, Verdict(STOP, cause), {**budget, "open": None})


def _write(run: RunFolder, attempt: str, verdict: Verdict, budget: dict[str, Any]) -> None:
    facts = {"attempt": attempt, "verdict": verdict.word, "cause": verdict.cause, "step": budget["step"],
             "left": budget["left"], "first": verdict.first, "time": round(time.time(), 3)}  # fmt: skip
    write_json(run.budget, budget)
    write_json(run.verdict, facts)
    append_line(run.history, facts)
    print(f"launch: {verdict.word.upper()} {verdict.cause}; newest checkpoint: step {budget['step']}; "
          f"{budget['left']} starts left without progress", file=sys.stderr, flush=True)  # fmt: skip


def _is_cancelled(attempt: str) -> bool:
    """Whether a user ended this job on purpose: then requeueing would start it again.

    SLURM shows COMPLETING to the script of a job that it is ending. It has counted one restart more if it means to
    start it again (preempted beyond its grace time, a lost node); else it was cancelled, or ran out of time.
    """
    number, _, restart = attempt.rpartition(".")
    shown = slurm.fields(number)
    if shown.get("JobState") not in ("COMPLETING", "CANCELLED") or shown.get("Restarts") != restart:
        return False
    ran, limit = (slurm.seconds(shown.get(name, "")) for name in ("RunTime", "TimeLimit"))
    return ran is None or limit is None or ran < limit


def main(argv: list[str]) -> int:
    """Open or close an attempt; the exit code, which the batch script reads after `begin`."""
    parser = argparse.ArgumentParser(prog="launch.job", description=__doc__)
    parser.add_argument("act", choices=("begin", "end", "stop"))
    parser.add_argument("--run", required=True)
    parser.add_argument("--attempt", required=True)
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--signalled", default="", help="the signal that the batch script got")
    parser.add_argument("--parity", action="store_true", help="the referee's step, not the trainer's, ended")
    parser.add_argument("--cause", default="", help="of stop")
    args = parser.parse_args(argv)
    run = RunFolder(args.run)
    if args.act == "stop":
        stop(run, args.attempt, args.cause)
        return 0
    if args.act == "begin":
        return begin(run, args.attempt, dict(os.environ))
    if args.parity and not args.signalled:
        write_json(run.attempt(args.attempt) / "parity.json", {"code": args.code})
    in_slurm = "SLURM_JOB_ID" in os.environ
    print(end(run, args.attempt, args.code, signalled=bool(args.signalled), in_slurm=in_slurm))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
