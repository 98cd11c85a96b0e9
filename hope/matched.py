"""MLPs as wide as it takes for the parameters of a Transformer++ with the same trunk, so that models compare."""

from __future__ import annotations

from dataclasses import replace

import torch

from hope.config import CmsConfig, ModelConfig
from hope.model import Model

WITHIN = 0.02
"""Of the Transformer++'s parameters."""


def parameters(config: ModelConfig) -> int:
    """Of the whole model; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in Model(config).parameters())


def transformer_of(config: ModelConfig) -> ModelConfig:
    """The Transformer++ with the same vocabulary, width, layers and heads."""
    return replace(config, pattern=["attention"], mixers={}, cms=CmsConfig(periods=[1]), init=None)


def matched_hidden(config: ModelConfig, wanted: int) -> int:
    """The width of every level's MLP that comes closest to `wanted` parameters; multiples of 64 (the widest tiles that
    a product can have) or fewer, as long as that does not miss half of `WITHIN`.

    Raises:
        ValueError: none comes within `WITHIN`; the message has the numbers.
    """
    of = lambda hidden: parameters(replace(config, cms=replace(config.cms, hidden=hidden)))
    one, unit = of(1), of(2) - of(1)
    miss = lambda hidden: abs(one + (hidden - 1) * unit - wanted)
    for multiple in (64, 32, 16, 8, 4, 2, 1):
        hidden = max(1, round((wanted - one + unit) / unit / multiple)) * multiple
        if miss(hidden) <= WITHIN / 2 * wanted:
            return hidden
    if miss(hidden) > WITHIN * wanted:
        have = one + (hidden - 1) * unit
        raise ValueError(f"with MLPs of {hidden} it has {have:,} parameters, a Transformer++ of its size {wanted:,}")
    return hidden


def match(config: ModelConfig) -> ModelConfig:
    """The model with a number where its `cms.hidden` is `matched`. Raises ValueError, see `matched_hidden`."""
    if config.cms.hidden != "matched":
        return config
    whole, usual = transformer_of(config), replace(config, cms=replace(config.cms, hidden=None))
    wanted = parameters(whole)
    same = parameters(usual) == wanted  # the Transformer++ itself is not changed
    hidden = usual.hidden_per_level() if same else matched_hidden(config, wanted)
    return replace(config, cms=replace(config.cms, hidden=hidden))
