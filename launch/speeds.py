"""Measured speeds: model FLOPs utilisation of one device, for estimates of the time that a run takes.

Memories are with their fused kernels. MFU is tokens/s x FLOPs per trained token (`report.model_facts`) over the dense
bf16 peak. A larger model or a faster loop does better, so that the row which was used is always printed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from configs.schema import Config


@dataclass(frozen=True)
class Speed:
    """One measurement. `mixer`: attention, or hope with the kind of its memory; `mfu`: a fraction."""

    mixer: str
    parameters: float
    seq_len: int
    device: str
    tokens_per_s: float
    mfu: float
    source: str
    cuda_graphs: bool = False
    """Whether passes were CUDA graphs; without them a host that issues operations may be what is slow."""

    def __str__(self) -> str:
        return (f"{self.mixer}, {self.parameters / 1e6:.0f}M parameters, sequence {self.seq_len}, one {self.device}: "
                f"{self.tokens_per_s:,.0f} tokens/s, {self.mfu:.1%} ({self.source})")  # fmt: skip


COMPILED = "train.compile=dense, docs/measurements/throughput.json"
GRAPHS = "CUDA graphs, docs/measurements/scale.json"
MEASURED = (
    Speed("hope matrix", 345.3e6, 4096, "H100", 42_313, 0.0918, "docs/LOG.md"),
    Speed("hope matrix", 17.3e6, 1024, "H100", 287_476, 0.0347, COMPILED),
    Speed("attention", 334.0e6, 4096, "H100", 90_746, 0.2392, "docs/LOG.md"),
    Speed("attention", 17.3e6, 1024, "H100", 1_106_775, 0.1373, COMPILED),
    Speed("hope matrix", 345.3e6, 4096, "H100", 93_697, 0.2038, GRAPHS, True),
    Speed("hope matrix", 1293.0e6, 4096, "H100", 36_134, 0.2893, GRAPHS, True),
    Speed("hope mlp", 332.1e6, 4096, "H100", 41_757, 0.1040, f"CUDA graphs, {COMPILED}", True),
    Speed("attention", 334.0e6, 4096, "H100", 105_688, 0.2787, GRAPHS, True),
)


def nearest(config: Config, parameters: int, known: Sequence[Speed] = MEASURED) -> Speed:
    """The row that an estimate rests on: of the slowest mixer of the pattern, the nearest number of parameters.

    Of equally large models the one with the nearest sequence. A mixer that was never measured counts as hope's, and so
    do levels in context. Rows with CUDA graphs count for a run with them, if there are some, and others for others.
    `known` may be a user's own; of a mixer that is not among them it is `MEASURED`.
    """
    slow = slowest(config)
    rows = [row for row in known if row.mixer in slow] or [row for row in MEASURED if row.mixer in slow]
    rows = [row for row in rows if row.cuda_graphs == config.train.cuda_graphs] or rows
    return min(rows, key=lambda row: (_apart(row.parameters, parameters), _apart(row.seq_len, config.train.seq_len)))


def slowest(config: Config) -> set[str]:
    """Names, as in `Speed.mixer`, of the mixers that decide how fast a model is."""
    names = {_measured_as(config, name) for name in config.model.pattern}
    if config.model.cms.in_context:  # a loop over chunks too, and never measured
        names.add("hope matrix")
    return names - {"attention"} or names


def _measured_as(config: Config, name: str) -> str:
    if name == "attention":
        return name
    return f"hope {getattr(config.model.mixers.get(name), 'memory', 'matrix')}" if name == "hope" else "hope matrix"


def _apart(a: float, b: float) -> float:
    return abs(math.log(a / b))
