"""What learns at inference, at which rate and how often; the options that say so, for every program that has them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

from hope.arguments import whole
from hope.config import ModelConfig
from hope.optim.config import DmgdConfig, OptimConfig
from hope.optim.group_config import GroupConfig

RATE = 1e-4
"""A fifteenth of `optim.lr`'s default, about where the default schedule of training ends. Tried on one toy model only
(docs/LOG.md): the best of six, by little, where ten times as much lost."""
EVERY = 512
"""Tokens of a window, of a model that does not record what it was trained on."""
ALL = "levels"


class AdaptError(Exception):
    """Learning at inference that cannot work; the message names the option, and what would work."""


@dataclass(frozen=True)
class Settings:
    """levels: numbers of the CMS levels that learn, ascending; rate: their learning rate; every: tokens of a window,
    which is the step that their periods count."""

    levels: tuple[int, ...]
    rate: float
    every: int

    @property
    def optim(self) -> OptimConfig:
        """The optimizer of the levels: dmgd with its linear memory (AdamW's setting), constant rate, and no decay, for
        that would forget what was trained whatever is read. Everything but the levels is frozen."""
        learns = [GroupConfig(match=f"*.cms.levels.{level}.*") for level in self.levels]
        return OptimConfig(
            lr=self.rate,
            weight_decay=0.0,
            warmup=0,
            decay="constant",
            groups=[*learns, GroupConfig(match="*", rate=0.0)],
            dmgd=DmgdConfig(),
        )

    @property
    def names(self) -> list[str]:
        """Of the levels, as `--adapt` takes them."""
        return [f"level{level}" for level in self.levels]

    def __str__(self) -> str:
        """The options that give these settings."""
        return f"--adapt {','.join(self.names)} --adapt-rate {self.rate!r} --adapt-every {self.every}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """--adapt, --adapt-rate and --adapt-every."""
    add = parser.add_argument
    what = f"CMS levels that learn from what is read: {ALL} for all, or level1, or level0,level2"
    add("--adapt", metavar="LEVELS", help=what)
    add("--adapt-rate", type=float, metavar="R", help=f"their learning rate (default {RATE:g})")
    what = f"tokens of a window, the step that levels' periods count (default: the window of training, or {EVERY})"
    add("--adapt-every", type=whole(), metavar="N", help=what)


def problems(args: argparse.Namespace) -> Iterator[str]:
    """What of these options cannot work, whatever the model is."""
    for name in ("adapt_rate", "adapt_every"):
        if args.adapt is None and getattr(args, name) is not None:
            yield f"--{name.replace('_', '-')} says how levels learn, and none do; give --adapt {ALL}, or leave it out"
    if args.adapt_rate is not None and not 0 <= args.adapt_rate < math.inf:
        yield f"--adapt-rate {args.adapt_rate} is no rate; give 0 or more, such as {RATE:g}"


def settings_of(args: argparse.Namespace, model: ModelConfig, seq_len: int | None) -> Settings | None:
    """What `args` ask of a model that was trained on windows of `seq_len` tokens; None if nothing is to learn.

    Raises:
        AdaptError: the model has no such levels, or its clocks do not count such windows.
    """
    if args.adapt is None:
        return None
    rate = RATE if args.adapt_rate is None else args.adapt_rate
    settings = Settings(_levels(args.adapt, len(model.periods)), rate, args.adapt_every or seq_len or EVERY)
    if model.cms.unit == "tokens" and (left := [p for p in model.periods if p % settings.every]):
        raise AdaptError(
            f"--adapt-every {settings.every} does not divide the period of {left[0]} tokens in the model's"
            f" cms.periods {model.periods}; give a divisor of all of them, such as {math.gcd(*model.periods)}"
        )
    return settings


def _levels(said: str, count: int) -> tuple[int, ...]:
    """Numbers of the levels that `--adapt` names."""
    known = {f"level{number}": number for number in range(count)}
    words = said.split(",")
    if words == [ALL]:
        return tuple(known.values())
    if unknown := [word for word in words if word not in known]:
        raise AdaptError(f"--adapt {said}: {unknown[0]!r} is none of {', '.join(known)}; {ALL} means all of them")
    return tuple(sorted({known[word] for word in words}))
