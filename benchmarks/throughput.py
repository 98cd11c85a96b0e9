"""Training speed of the models side by side: one process, turn by turn (A B A B), medians and spread.

    python benchmarks/throughput.py --size 340m --seq 4096 16384 --json docs/measurements/throughput.json
    python benchmarks/throughput.py --size 17m --seq 1024 --models hope transformer --compile dense --rounds 3
    python benchmarks/throughput.py --models hope transformer --heads 8 --hope static=projected output_gate=sigmoid

Every model has the parameters of the Transformer++ of its size (+- 2 %), sees as many tokens per step at every length,
and takes whole training steps with its optimizer, on random tokens, through the code that a run uses. Its micro-batch
is the fastest of those that fit under --cap GiB: memory is predicted, then halved as long as it does not fit, and the
two largest that do are timed (`--micro-batch 8 4` tries these alone). The cap is enforced by torch's allocator. Models
are built anew for every turn, so that each has the whole memory.

MFU = tokens/s x FLOPs per token of forward and backward (no recomputation) / peak of dense bf16. The share of the
memory loop is of the device's time in one profiled step, with the fused kernels.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from contestants import GPT, MODELS, SIZES, USUAL, Choices, Contestant, build, model_config
from kept import keep, pair, rows_of
from torch.autograd import DeviceType

from hope.arguments import finite, result_file, whole
from hope.batch import Batch
from hope.config import ModelConfig
from hope.dense import COMPILE
from hope.model import Slice
from hope.optim.config import OptimConfig
from hope.pipe import piped
from hope.train.config import TrainConfig
from hope.train.numerics import set_numerics
from hope.train.throughput import GIB, Devices, mfu
from parallel.layout import report
from parallel.layout.memory import StepShape, rank_memory
from parallel.layout.topology import ParallelConfig
from parallel.referee.evidence import micro_batches
from parallel.start import groups

Row = dict[str, Any]
# How far over the cap a prediction may be that is worth a try. It does not know what compiled parts do not keep.
TOO_HIGH = {"none": 1.25, "dense": 2.0, "block": 2.0}
LOOP = ("_sequential", "_outputs", "_outputs_backward", "_sequential_backward")  # kernels of hope.memory.fused
SAME = ("model", "size", "heads", "hope", "seq", "gpu", "compile", "cuda_graphs", "precision", "recompute",
        "tokens_per_step")  # fmt: skip


class Bench:
    """What all turns share: device, memory cap, and the micro-batch that was found for a model and length."""

    def __init__(self, args: argparse.Namespace, ranks: groups.Ranks) -> None:
        self.args, self.ranks, self.cuda = args, ranks, ranks.device.type == "cuda"
        self.gpu = torch.cuda.get_device_name(ranks.device) if self.cuda else "cpu"
        self.devices = Devices.of(ranks.device, 1)
        if self.cuda:
            assert self.devices.memory_gb is not None
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap / self.devices.memory_gb), ranks.device)

    def compile_of(self, model: str) -> str:
        return "none" if model == GPT else str(self.args.compile)

    @contextmanager
    def built(self, model: str, seq: int) -> Iterator[Contestant]:
        """Its optimizer's hooks and its graphs would keep all of the model's memory: they are removed at the end."""
        args, compile = self.args, self.compile_of(model)
        graphs = args.graphs and model != GPT
        one = build(model, args.size, seq, args.precision, self.ranks, compile, args.recompute, graphs, args.choices)
        try:
            yield one
        finally:
            one.close()

    def config(self, model: str) -> ModelConfig:
        """Of the Transformer++ for megatron-core's."""
        return model_config("transformer" if model == GPT else model, self.args.size, self.args.choices)

    def turn(self, model: str, seq: int, micro: int, steps: int) -> Row:
        """Build, warm up, and time `steps` steps. Raises torch.OutOfMemoryError."""
        with self.built(model, seq) as one:
            return self.timed(one, seq, micro, steps, warm=2)

    def timed(self, one: Contestant, seq: int, micro: int, steps: int, warm: int) -> Row:
        """Seconds of `steps` steps after `warm`, and what else a row needs. Raises torch.OutOfMemoryError."""
        args, rows = self.args, self.args.tokens // seq
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        tokens = torch.randint(0, SIZES[args.size][3], (seq + 1, rows), generator=torch.Generator().manual_seed(0))
        batches = micro_batches(Batch(tokens[:-1], tokens[1:]), micro, self.ranks)
        seconds = []
        for _ in range(warm + steps):
            self._wait()
            began = time.perf_counter()
            one.step(batches)
            self._wait()
            seconds.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_reserved() / GIB if self.cuda else None
        share = self._loop_share(one, batches) if steps > 1 else None
        return {"parameters": one.parameters, "seconds": seconds[warm:], "peak_gib": peak, "loop_share": share}

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _loop_share(self, one: Contestant, batches: Sequence[Batch]) -> float | None:
        """Device time inside the fused memory loop over that of a whole step; None without kernels."""
        from torch.profiler import ProfilerActivity, profile

        if not self.cuda:
            return None
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            one.step(batches)
            self._wait()
        return loop_share(found.key_averages())

    def free(self) -> None:
        """Give back what the turn before held."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def fits(self, one: Contestant, seq: int, micro: int) -> float | None:
        """Seconds of a step, or None if it does not fit."""
        seconds = None
        with suppress(torch.OutOfMemoryError):
            seconds = min(self.timed(one, seq, micro, 1, warm=1)["seconds"])
        self.free()  # once nothing holds the error, whose frames hold tensors
        return seconds

    def candidates(self, model: str, seq: int) -> list[int]:
        """Micro-batches worth a try, largest first."""
        rows = self.args.tokens // seq
        if self.args.micro_batch:
            return sorted(self.args.micro_batch, reverse=True)
        sizes = [rows // 2**n for n in range(rows.bit_length()) if rows % 2**n == 0]
        limit = TOO_HIGH[self.compile_of(model)] * self.args.cap
        return [size for size in sizes if self.predicted(model, seq, size) <= limit] or sizes[-1:]

    def micro_batch(self, model: str, seq: int) -> int:
        """The faster of the two largest micro-batches under the cap. Raises ValueError: not even one sequence fits."""
        sizes = self.candidates(model, seq)
        if len(sizes) == 1:
            return sizes[0]
        found: dict[int, float] = {}
        while sizes and len(found) < 2:
            with self.built(model, seq) as one:
                while sizes and len(found) < 2:
                    size = sizes.pop(0)
                    if (seconds := self.fits(one, seq, size)) is None:
                        break  # its step stopped halfway, the next size gets a new one
                    found[size] = seconds
            del one
            self.free()
        if not found:
            raise ValueError(f"{model} at {seq}: one sequence does not fit under {self.args.cap} GiB")
        return min(found, key=lambda size: found[size])

    def predicted(self, model: str, seq: int, micro: int) -> float:
        """GiB of a step, from the configuration alone."""
        config = self.config(model)
        shape = StepShape(seq, micro, self.args.precision == "bf16", recompute=self.args.recompute)
        return rank_memory(config, [Slice(0, config.layers)], 1, shape, OptimConfig()).peak / GIB

    def measured(self, model: str, seq: int) -> Row:
        """What a row is about: all of `SAME`."""
        args = self.args
        return {
            "model": model,
            "size": args.size,
            "heads": self.config(model).heads,
            "hope": dict(args.choices.hope) if "hope" in self.config(model).pattern else {},
            "seq": seq,
            "gpu": self.gpu,
            "compile": self.compile_of(model),
            "cuda_graphs": args.graphs and model != GPT,
            "precision": args.precision,
            "recompute": "none" if model == GPT else args.recompute,
            "tokens_per_step": args.tokens,
        }

    def row(self, model: str, seq: int, micro: int, turns: list[Row]) -> Row:
        """A line of the table: medians over all turns."""
        speeds = [self.args.tokens / second for turn in turns for second in turn["seconds"]]
        config = self.config(model)
        tokens_per_s = statistics.median(speeds)
        peaks = [turn["peak_gib"] for turn in turns if turn["peak_gib"] is not None]
        return {
            **self.measured(model, seq),
            "parameters": turns[0]["parameters"],
            "tokens_per_s": tokens_per_s,
            "smallest": min(speeds),
            "largest": max(speeds),
            "peak_gib": max(peaks) if peaks else None,
            "micro_batch": micro,
            "mfu": mfu(tokens_per_s, report.model_flops(config)(seq).training, self.devices),
            "memory_loop_share": turns[-1]["loop_share"],
            "rounds": len(turns),
            "torch": torch.__version__,
        }


def loop_share(events: Iterable[Any]) -> float | None:
    """Of a profiler's averages. A kernel's time is in them as its own, and where no graph launched it as that of an
    operation on the CPU once more. Only the kernels are counted."""
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in kernels)
    loop = sum(event.self_device_time_total for event in kernels if event.key in LOOP)
    return loop / total if loop and total else None


def compare(bench: Bench, seq: int) -> list[Row]:
    """All models at one length. One that cannot be built or does not fit has a row that says why."""
    rows: dict[str, Row] = {}
    micro: dict[str, int] = {}
    turns: dict[str, list[Row]] = {}
    for model in bench.args.models:
        try:
            micro[model] = bench.micro_batch(model, seq)
            print(f"  {model}: micro-batch {micro[model]}", flush=True)
        except Exception as error:  # the others are still worth their numbers
            rows[model] = _failed(bench, model, seq, error)
        bench.free()
    for number in range(bench.args.rounds):
        for model in [m for m in bench.args.models if m in micro and m not in rows]:
            try:
                turns.setdefault(model, []).append(bench.turn(model, seq, micro[model], bench.args.steps))
                spread = [round(bench.args.tokens / s) for s in turns[model][-1]["seconds"]]
                print(f"  round {number + 1} {model}: {spread} tokens/s", flush=True)
            except Exception as error:
                rows[model] = _failed(bench, model, seq, error)
            bench.free()
    done = {model: bench.row(model, seq, micro[model], turns[model]) for model in turns if model not in rows}
    return [{**rows, **done}[model] for model in bench.args.models]


def _failed(bench: Bench, model: str, seq: int, error: Exception) -> Row:
    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    print(f"  {model}: not compared, {reason}", flush=True)
    return {**bench.measured(model, seq), "not_compared": reason}


def table(rows: list[Row]) -> str:
    """Markdown, with the share of the Transformer++ at the same length."""
    base = {row["seq"]: row["tokens_per_s"] for row in rows if row["model"] == "transformer" and "tokens_per_s" in row}
    speed = "tokens/s (smallest - largest)"
    titles = ("model", "parameters", "seq", "micro-batch", speed, "of transformer", "MFU", "GiB", "loop")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    percent = lambda value: "" if value is None else f"{value:.1%}"
    for row in rows:
        if "not_compared" in row:
            lines.append(f"| {row['model']} | | {row['seq']} | | not compared: {row['not_compared']} | | | | |")
            continue
        ratio = f"{row['tokens_per_s'] / base[row['seq']]:.2f}" if row["seq"] in base else ""
        speed = f"{row['tokens_per_s']:,.0f} ({row['smallest']:,.0f} - {row['largest']:,.0f})"
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        lines.append(
            f"| {row['model']} | {row['parameters'] / 1e6:,.1f}M | {row['seq']} | {row['micro_batch']} | {speed} | "
            f"{ratio} | {percent(row['mfu'])} | {peak} | {percent(row['memory_loop_share'])} |"
        )
    return "\n".join(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="340m")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(USUAL))
    parser.add_argument("--seq", nargs="+", type=whole(), default=[4096], help="lengths; each divides --tokens")
    parser.add_argument("--heads", type=whole(0), default=0, help="of models with memories; 0: as the Transformer++")
    parser.add_argument("--hope", nargs="+", type=pair, default=[], metavar="KEY=VALUE", help="of model.mixers.hope")
    parser.add_argument("--tokens", type=whole(), default=131072, help="per step, at every length")
    parser.add_argument("--compile", choices=COMPILE, default="none", help="train.compile of this project's models")
    parser.add_argument("--graphs", action="store_true", help="train.cuda_graphs of this project's models")
    parser.add_argument("--recompute", choices=["none", "memory", "mlp", "block"], default="none")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--micro-batch", nargs="+", type=whole(), default=[], help="of all models, the faster of these")
    parser.add_argument("--cap", type=finite, default=72.0, help="GiB that a model may reserve")
    parser.add_argument("--rounds", type=whole(), default=3, help="turns of every model")
    parser.add_argument("--steps", type=whole(), default=5, help="timed steps of a turn")
    parser.add_argument("--json", type=result_file, help="rows are added here; an equal measurement is replaced")
    args = parser.parse_args(argv)
    args.choices = Choices(args.heads, tuple(args.hope))
    for seq in args.seq:
        if seq < 1 or args.tokens % seq:
            parser.error(f"--seq {seq} does not divide --tokens {args.tokens}")
        for size in args.micro_batch:
            if size < 1 or args.tokens // seq % size:
                parser.error(f"--micro-batch {size} does not divide the {args.tokens // seq} sequences of {seq}")
    return args


def write(path: Path, rows: list[Row]) -> None:
    """Add rows to a list in a file; of those that agree in all of `SAME` the newest stays."""
    key = lambda row: json.dumps([row.get(name) for name in SAME])
    old = rows_of(path, new=True)
    new = {key(row) for row in rows}
    kept = [row for row in old if key(row) not in new]
    keep(path, [*kept, *rows])


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    set_numerics(TrainConfig(steps=1, seq_len=1, global_batch=1, micro_batch=1, precision=args.precision))
    if args.json:
        rows_of(args.json, new=True)  # before hours of measurements, which could not be added to what is no rows
    rows: list[Row] = []
    with groups.start(ParallelConfig()) as ranks:
        gc.freeze()  # DeepSpeed collects garbage 14 times for every model, over all that was imported
        bench = Bench(args, ranks)
        for seq in args.seq:
            print(f"sequence {seq}", flush=True)
            rows += compare(bench, seq)
            if args.json:
                write(args.json, rows)
    print(table(rows), flush=True)
    return int(any("not_compared" in row for row in rows))


if __name__ == "__main__":
    sys.exit(piped(main))
