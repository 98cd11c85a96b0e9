"""Estimated step times against measured ones: `python -m launch compare docs/measurements/scale.json`.

A step's estimate rests on the speed of the same model on one GPU, if the file has it, and on launch/speeds.py
otherwise. So the error says how well the layout's cost is known, or that and the model's. A row that does not say what
it ran with (`scaling.CHOICES`) is marked: what its estimate rests on may have run with something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from configs.schema import Config
from configs.schema import load as load_config
from hope.train.throughput import peak_flops
from launch import estimate, scaling
from launch.collectives import ONE_NODE, Bus
from launch.speeds import Speed, slowest
from parallel.layout.report import model_flops

ALLOWED = 0.15
"""A larger error asks for a better model."""


@dataclass(frozen=True)
class Compared:
    """Seconds of a step, predicted and measured. `basis`: what the prediction rests on; `known`: it is the same run."""

    row: scaling.Row
    predicted_s: float
    measured_s: float
    basis: str
    known: bool = False

    @property
    def error(self) -> float:
        """Of the prediction, as a fraction of what was measured; negative if it is too short."""
        return self.predicted_s / self.measured_s - 1


def speeds_of(rows: Sequence[scaling.Row], source: str) -> list[Speed]:
    """What rows of one GPU say of models' speeds; those of a GPU whose peak is unknown say nothing.

    Raises:
        ConfigError: the configuration of a row can no longer be loaded.
    """
    found = []
    for row in rows:
        peak = peak_flops(row["gpu"])
        if row["gpus"] == 1 and peak is not None:
            config = _config(row)
            mfu = row["tokens_per_s"] * model_flops(config.model)(row["seq"]).training / peak
            for mixer in sorted(slowest(config)):
                found.append(
                    Speed(
                        mixer,
                        row["parameters"],
                        row["seq"],
                        row["gpu"],
                        row["tokens_per_s"],
                        mfu,
                        f"{source}: {row['model']}",
                        config.train.cuda_graphs,
                    )
                )
    return found


def compare(rows: Sequence[scaling.Row], bus: Bus = ONE_NODE) -> list[Compared]:
    """Every row whose step can be predicted. Raises ConfigError: the configuration of one can no longer be loaded."""
    return [found for row in rows if (found := _compared(row, rows, bus)) is not None]


def _compared(row: scaling.Row, rows: Sequence[scaling.Row], bus: Bus) -> Compared | None:
    config, base = _config(row), scaling.one_gpu(row, rows)
    tokens = config.train.tokens_per_step
    measured = tokens / row["tokens_per_s"]
    if base is not None:
        ideal = tokens / (base["tokens_per_s"] * row["gpus"])
        predicted = estimate.in_layout(ideal, config, config.parallel, row["gpus"], bus)
        return Compared(row, predicted, measured, "one GPU", known=base is row)
    seconds = estimate.step_seconds(config, row["gpus"], row["gpu"], bus=bus)
    return None if seconds is None else Compared(row, seconds, measured, "launch/speeds.py")


def _config(row: scaling.Row) -> Config:
    return load_config(row["config"], row["overrides"], check=False)


def table(found: Sequence[Compared]) -> str:
    """A markdown table, largest errors last, and what to think of it."""
    return "\n".join(_lines(found))


def _lines(found: Sequence[Compared]) -> Iterator[str]:
    yield "| model | layout | GPUs | scaling | predicted s | measured s | error | rests on |"
    yield "|---|---|---|---|---|---|---|---|"
    told = sorted((c for c in found if not c.known), key=lambda c: abs(c.error))
    for c in told:
        row, mark = c.row, "?" * bool(scaling.unsaid(c.row))
        yield (f"| {row['model']} | {row['layout']} | {row['gpus']} | {row['scaling']} | {c.predicted_s:.3f} | "
               f"{c.measured_s:.3f} | {c.error:+.1%} | {c.basis}{mark} |")  # fmt: skip
    far = sum(abs(c.error) > ALLOWED for c in told)
    yield f"{len(told)} steps, {far} of them more than {ALLOWED:.0%} off"
    if unknown := sum(bool(scaling.unsaid(c.row)) for c in told):
        keys = ", ".join(scaling.CHOICES)
        yield f"? {unknown} of them do not say all of {keys}: what they rest on may differ"
