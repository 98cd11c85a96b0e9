"""What a run is doing, from its folder and SLURM: status, logs, cancel."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.schema import load
from launch import slurm
from launch.folder import RunFolder, read_json
from launch.local import interrupt
from launch.runs import records

TITLES = ("run", "job", "state", "step", "tok/s", "loss", "eta", "starts", "saved", "verdict")


def find_runs(where: list[str]) -> list[RunFolder]:
    """Run folders, however they were started: the ones given, or all below the folders given.

    Raises:
        NoRun: there is none in one of them.
    """
    found = []
    for word in where:
        path = Path(word)
        inside = [path] if _is_run(path) else [p for p in sorted(path.glob("*")) if _is_run(p)]
        if not inside:
            raise slurm.NoRun(f"no run in {path}: give run folders, or folders that hold them")
        found += [RunFolder(p) for p in inside]
    return found


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("launch/job.json", "metrics.jsonl", "events.jsonl"))


def row(run: RunFolder) -> dict[str, str]:
    """One line of the table, every cell a text."""
    from hope.train.console import duration, short  # brings torch, 2 s that the other commands need not wait for

    jobs = run.job_ids()
    known = slurm.ask(jobs[-1]) if jobs else slurm.Known("ended")
    last = (records(run.root) or [{}])[-1]
    verdict = read_json(run.verdict, {})
    starts = [r for r in records(run.control, "verdicts.jsonl") if "attempt" in r]
    step = last.get("step")
    saved = run.saved_step()
    return {
        "run": run.root.name,
        "job": jobs[-1] if jobs else "local" if run.job.exists() else "-",
        "state": _state(known),
        "step": "-" if step is None else f"{step}/{_steps(run)}",
        "tok/s": "-" if last.get("tokens_per_s") is None else short(last["tokens_per_s"]),
        "loss": "-" if last.get("loss") is None else f"{last['loss']:.4f}",
        "eta": duration(last.get("eta_s")) if last.get("eta_s") is not None else "-",
        "starts": str(len(starts) + (read_json(run.budget, {}).get("open") is not None)),
        "saved": "-" if saved < 0 else str(saved),
        "verdict": f"{verdict.get('verdict')}: {verdict.get('cause')}"
        if verdict
        else "cancelled" * run.cancelled.exists() or "-",
    }


def _state(known: slurm.Known) -> str:
    if known.life == "unknown":
        return "unknown: SLURM does not answer"
    reason = known.facts.get("reason", "None")
    return known.facts.get("state", "-") + (f" ({reason})" if reason != "None" else "")


def _steps(run: RunFolder) -> str:
    for path in (run.config, run.root / "config.yaml"):  # the latter of any run, the former before its first step
        with contextlib.suppress(ConfigError):
            return str(load(str(path), [], check=False).train.total_steps)
    return "?"


def status_table(runs: list[RunFolder]) -> str:
    """All runs, columns as wide as they must be."""
    rows = [dict(zip(TITLES, TITLES, strict=True)), *(row(run) for run in runs)]
    widths = {title: max(len(r[title]) for r in rows) for title in TITLES}
    return "\n".join("  ".join(r[title].ljust(widths[title]) for title in TITLES).rstrip() for r in rows)


def log_file(run: RunFolder, rank: int) -> Path:
    """The newest log: the job's (rank 0 and the batch script), or that of another rank.

    Raises:
        NoRun: there is none.
    """
    if rank:
        files = sorted(run.logs.glob(f"*/rank-{rank:05d}.log"), key=lambda p: p.stat().st_mtime)
    else:
        files = sorted(run.logs.glob("*.out"), key=lambda p: p.stat().st_mtime)
    if not files:
        raise slurm.NoRun(f"no log of rank {rank} in {run.logs}: has the job started?")
    return files[-1]


def last_lines(run: RunFolder, rank: int, lines: int) -> str:
    """The end of the newest log under its name. A run that was started without launch has no log, but its numbers.

    Raises:
        NoRun: there is neither.
    """
    numbers = records(run.root)
    if rank or not numbers or next(run.logs.glob("*.out"), None):
        path = log_file(run, rank)
        return f"==> {path} <==\n{tail(path, lines)}"
    from hope.train.console import console_line  # see `row`
    from hope.train.throughput import Devices

    steps = _steps(run)
    shown = [
        console_line(record, steps=int(steps) if steps != "?" else record["step"] or 1, devices=Devices(1, "device"))
        for record in numbers[-lines:]
    ]
    head = f"==> {run.root / 'metrics.jsonl'} (no log: this run printed to its terminal) <=="
    return "\n".join([head, *shown])


def tail(path: Path, lines: int) -> str:
    """The last lines of a file."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def follow(path: Path) -> None:
    """Print what is added to a file until Ctrl-C."""
    with path.open(errors="replace") as file:
        file.seek(0, 2)
        while True:
            text = file.read()
            if text:
                print(text, end="", flush=True)
            else:
                time.sleep(0.5)


def cancel(run: RunFolder) -> str:
    """End every job of a run for good: the marker first, so that nothing starts it again; what was done.

    Every number is tried, whatever SLURM says of it: one that it seems to have forgotten may still run.

    Raises:
        NoRun: there is no such run.
        SlurmError: a job of it may still run.
    """
    if not run.launch.is_dir():
        raise slurm.NoRun(f"{run.root} is no run that was submitted: it has no folder launch/")
    run.control.mkdir(parents=True, exist_ok=True)
    run.cancelled.touch()
    here = interrupt(run)
    ended, refused = [], []
    for job in run.job_ids():
        over = slurm.ask(job).life == "ended"
        try:
            if slurm.cancel(job) and not over:
                ended.append(job)
        except slurm.SlurmError as error:
            refused.append(f"job {job} may still run: {error}")
    if refused:
        raise slurm.SlurmError("; ".join([*refused, "no other will be started; `cancel` again when SLURM answers"]))
    done = [here] if here else []
    done += [f"cancelled job {', '.join(ended)}"] if ended else []
    return "; ".join(done) or "no job of this run waits or runs"


def facts(run: RunFolder) -> dict[str, Any]:
    """For tools: the row, with the verdict as it was written."""
    return {**row(run), "verdict": read_json(run.verdict, {})}
