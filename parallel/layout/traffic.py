"""Bytes of gradients that a rank hands to collectives over data-parallel ranks, predicted from the configuration."""

from __future__ import annotations

from collections.abc import Sequence

from hope.config import ModelConfig
from hope.model import Slice
from hope.optim.clocks import frozen
from hope.optim.config import OptimConfig
from hope.optim.levels import parameter_groups
from parallel.layout.memory import StepShape, build_part


def reduced_bytes_per_step(config: ModelConfig, parts: Sequence[Slice], shape: StepShape, optim: OptimConfig) -> float:
    """fp32 gradients per optimizer step, averaged over the levels' periods; padding of flat buffers left out.

    A level with period C costs 1/C with `optim.accumulate: local`, and the same as every other with `sharded`; a frozen
    group costs nothing. One data-parallel rank reduces nothing.
    """
    if shape.data == 1:
        return 0.0
    total = 0.0
    for part in parts:
        for group in parameter_groups(build_part(config, part, shape), 0.0, optim, shape.tokens_per_step):
            if frozen(group):
                continue
            size = 4.0 * sum(p.numel() for p in group["params"])
            total += size / group["period"] if optim.accumulate == "local" else size
    return total
