"""Tokenizing with 1 and with 2 workers in turn: wall time, CPU time, MB/s, and whether the files are equal.

python benchmarks/tokenize_speed.py --tokenizer data/main/tokenizer.model --input data/main/*/train.jsonl

Runs alternate, so that other work on the machine hits both alike; the load average is printed with every run, and the
ratio is the median of the ratios of runs that followed each other.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def measure(inputs: list[str], tokenizer: str, workers: int, folder: str) -> tuple[float, float, str]:
    """(wall seconds, CPU seconds, digest of .bin) of one run in a process of its own."""
    from data_prep.files import sha256_file

    prefix = f"{folder}/tokens"
    command = [sys.executable, "-m", "data_prep", "tokenize", "--tokenizer", os.path.abspath(tokenizer)]
    command += ["--out", prefix, "--workers", str(workers), "--input", *map(os.path.abspath, inputs)]
    before, started = _cpu(), time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    wall, cpu = time.monotonic() - started, _cpu() - before
    digest = sha256_file(f"{prefix}.bin")
    Path(f"{prefix}.manifest.json").unlink()  # else the next run finds its work done
    return wall, cpu, digest


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Print every run and the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    megabytes = sum(map(os.path.getsize, args.input)) / 1e6
    print(f"{megabytes:.1f} MB of input, {os.cpu_count()} cores")
    walls: dict[int, list[float]] = {workers: [] for workers in args.workers}
    cpus: dict[int, list[float]] = {workers: [] for workers in args.workers}
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for workers in args.workers:
                wall, cpu, digest = measure(args.input, args.tokenizer, workers, folder)
                walls[workers].append(wall)
                cpus[workers].append(cpu)
                digests.add(digest)
                load = os.getloadavg()[0]
                print(
                    f"{workers} workers  {wall:6.1f} s  {megabytes / wall:5.2f} MB/s  "
                    f"CPU {cpu:6.1f} s  load {load:.1f}",
                    flush=True,
                )
    for workers in args.workers:
        wall, cpu = statistics.median(walls[workers]), statistics.median(cpus[workers])
        print(
            f"median of {args.rounds}: {workers} workers {wall:.1f} s, {megabytes / wall:.2f} MB/s,"
            f" CPU {cpu:.1f} s, {megabytes / cpu:.2f} MB per CPU second"
        )
    first = args.workers[0]
    for workers in args.workers[1:]:
        ratios = [one / more for one, more in zip(walls[first], walls[workers], strict=True)]
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{workers} workers are {statistics.median(ratios):.2f} times as fast as {first} (rounds: {listed})")
    print("files equal in all runs" if len(digests) == 1 else f"FILES DIFFER: {digests}")


if __name__ == "__main__":
    main()
