"""Optimizer sections in one line: settings of `optim`, `optim.dmgd` and (as mlp_KEY) `optim.dmgd.mlp` together."""

import dataclasses
from typing import Any

from hope.optim.config import DmgdConfig, MlpConfig, OptimConfig


def with_dmgd(base: OptimConfig | None = None, **settings: Any) -> OptimConfig:
    """`base`, or the defaults, with these settings."""
    base = base or OptimConfig()
    mlp = {key.removeprefix("mlp_"): value for key, value in settings.items() if key.startswith("mlp_")}
    own = {item.name: settings[item.name] for item in dataclasses.fields(DmgdConfig) if item.name in settings}
    shared = {key: value for key, value in settings.items() if key not in own and not key.startswith("mlp_")}
    assert mlp.keys() <= {item.name for item in dataclasses.fields(MlpConfig)}
    network = dataclasses.replace(base.dmgd.mlp, **mlp)
    return dataclasses.replace(base, **shared, dmgd=dataclasses.replace(base.dmgd, **own, mlp=network))
