"""The optimizer that a configuration names."""

from collections.abc import Iterable
from typing import Any

from hope.optim.clocks import ClockedOptimizer
from hope.optim.config import OptimConfig
from hope.optim.dmgd import Dmgd
from hope.optim.matrix import MatrixOptimizer
from hope.optim.policy import MATRIX_OPTIMIZERS


def build_optimizer(groups: Iterable[dict[str, Any]], config: OptimConfig, precision: str = "fp32") -> ClockedOptimizer:
    """`groups`: from `hope.optim.levels.parameter_groups`, with the same `config`; `precision`: train.precision."""
    if config.name in MATRIX_OPTIMIZERS:
        return MatrixOptimizer(groups, config, half=precision == "bf16")
    return Dmgd(groups, config)
