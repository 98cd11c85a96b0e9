"""Tokenizing with 1 and with 2 workers in turn: wall time, CPU time, MB/s, and whether the files are equal.

python benchmarks/tokenize_speed.py --tokenizer data/main/tokenizer.model --input data/main/*/train.jsonl

Runs alternate. The ratio is that of the two runs of a round, and its median is taken over the rounds in which other
programs left the workers their cores (they used less than `--others` cores, and half of those that the run had to
spare): on a busy machine a second worker has no core of its own, and the ratio would say nothing about the program. All
rounds are printed.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hope.arguments import count, finite, whole
from hope.pipe import piped

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class TimedRun:
    """One run: wall and CPU seconds, cores that other programs used meanwhile, and the digest of .bin."""

    wall: float
    cpu: float
    others: float
    digest: str


def measure(inputs: list[str], tokenizer: str, workers: int, folder: str) -> TimedRun:
    """Tokenize in a process of its own."""
    from data_prep.files import sha256_file

    prefix = f"{folder}/tokens"
    command = [sys.executable, "-m", "data_prep", "tokenize", "--tokenizer", os.path.abspath(tokenizer)]
    command += ["--out", prefix, "--workers", str(workers), "--input", *map(os.path.abspath, inputs)]
    cpu, busy, started = _cpu(), _busy(), time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    wall, cpu, busy = time.monotonic() - started, _cpu() - cpu, _busy() - busy
    digest = sha256_file(f"{prefix}.bin")
    Path(f"{prefix}.manifest.json").unlink()  # else the next run finds its work done
    return TimedRun(wall, cpu, max(busy - cpu, 0.0) / wall, digest)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _busy() -> float:
    """CPU seconds that all programs of this machine have used; nan where /proc/stat does not exist."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return float("nan")
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(most: float, patience: float) -> None:
    """Wait for 3 seconds in which all programs used less than `most` cores, at most `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        before = _busy()
        time.sleep(3)
        if (_busy() - before) / 3 < most:
            return


def main() -> int:
    """Print every run and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", nargs=2, type=count, default=[1, 2])
    parser.add_argument("--rounds", type=whole(), default=3)
    parser.add_argument("--others", type=finite, default=0.2, help="most cores of other programs (default 0.2)")
    parser.add_argument("--patience", type=finite, default=0, help="seconds to wait for others before each round")
    args = parser.parse_args()
    megabytes = sum(map(os.path.getsize, args.input)) / 1e6
    print(f"{megabytes:.1f} MB of input, {os.cpu_count()} cores")
    rounds: list[list[TimedRun]] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            rounds.append([])
            wait_until_quiet(args.others, args.patience)
            for workers in args.workers:
                run = measure(args.input, args.tokenizer, workers, folder)
                rounds[-1].append(run)
                print(
                    f"{workers} workers  {run.wall:6.1f} s  {megabytes / run.wall:5.2f} MB/s  CPU {run.cpu:6.1f} s"
                    f"  others {run.others:.2f} cores",
                    flush=True,
                )
    report(rounds, args.workers, args.others, megabytes)
    return 0


def report(rounds: list[list[TimedRun]], workers: list[int], most: float, megabytes: float) -> None:
    """Print the medians over the quiet rounds."""
    ratios = [first.wall / second.wall for first, second in rounds]
    print("ratio of every round: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))
    spare = [max((os.cpu_count() or 1) - count, 0) / 2 for count in workers]
    quiet = [pair for pair in rounds if all(run.others < most + free for run, free in zip(pair, spare, strict=True))]
    print(f"{len(quiet)} of {len(rounds)} rounds were quiet")
    for number, several in enumerate(workers):
        if quiet:
            wall, cpu = (statistics.median(getattr(pair[number], name) for pair in quiet) for name in ("wall", "cpu"))
            print(
                f"{several} workers, median: {wall:.1f} s, {megabytes / wall:.2f} MB/s,"
                f" CPU {cpu:.1f} s, {megabytes / cpu:.2f} MB per CPU second"
            )
    if quiet:
        ratio = statistics.median(first.wall / second.wall for first, second in quiet)
        print(f"{workers[1]} workers are {ratio:.2f} times as fast as {workers[0]}")
    digests = {run.digest for pair in rounds for run in pair}
    print("files equal in all runs" if len(digests) == 1 else f"FILES DIFFER: {digests}")


if __name__ == "__main__":
    sys.exit(piped(main))
