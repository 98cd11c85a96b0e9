"""What differs between a checkpoint's configuration and this one, and which of the two a resumed run follows.

Layout, names, logging and saving may change freely. What decides the order of the data may not change at all. Of the
rest the run asks: `checkpoint.on_change={optim.lr: override}` takes the new value, `keep` the checkpoint's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf

from configs.errors import ConfigError, Problem
from configs.schema import Config, validate
from hope.config import as_recorded

FREE = (
    "run.name",
    "run.dir",
    "parallel",
    "checkpoint",
    "log",
    "launch",
    "data.train",  # where the tokens lie; that they are the same is checked by their hash
    "data.sources",
    "data.cache",
    "data.index",
    "train.stop_after",
    "train.micro_batch",
    "train.deterministic",
    "train.recompute",
    "train.eval_every",
    "train.eval_windows",
    "train.max_skips",
)
ORDER = ("train.seq_len", "train.global_batch", "data.seed")
ABSENT = "(absent)"


@dataclasses.dataclass(frozen=True)
class Change:
    """A key whose value differs; `rule`: free, refused, ask, keep or override."""

    path: str
    saved: Any
    now: Any
    rule: str

    @property
    def effective(self) -> Any:
        return self.saved if self.rule == "keep" else self.now

    def row(self) -> str:
        return f"{self.path}: checkpoint {self.saved}, config {self.now}, effective {self.effective} ({self.rule})"


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], on_change: Mapping[str, str]) -> list[Change]:
    """All keys that differ between two configurations as nested dicts, in this one's order; a list is one value."""
    old, new = dict(_flat(saved)), dict(_flat(now))
    paths = [*new, *(path for path in old if path not in new)]
    changed = [(path, old.get(path, ABSENT), new.get(path, ABSENT)) for path in paths]
    return [Change(path, a, b, _rule(path, on_change)) for path, a, b in changed if a != b]


def settle(config: Config, saved: Mapping[str, Any], world_size: int) -> tuple[Config, list[str]]:
    """(the configuration that a run resumed from a checkpoint follows, a line per difference).

    `saved`: the checkpoint's, as `dataclasses.asdict` gave it.

    Raises:
        ConfigError: a key differs and may not, nothing says what to do about it, or what is kept does not fit the rest;
            all of them at once.
    """
    saved = {**saved, "model": as_recorded(saved["model"])}
    found = differences(saved, dataclasses.asdict(config), config.checkpoint.on_change)
    problems = list(_problems(found))
    if problems:
        raise ConfigError("against the checkpoint", problems)
    kept = {c.path: c.saved for c in found if c.rule == "keep" and ABSENT not in (c.saved, c.now)}
    if kept:
        merged = OmegaConf.structured(config)
        for path, value in kept.items():
            OmegaConf.update(merged, path, value)
        config = OmegaConf.to_object(merged)  # type: ignore[assignment]
        validate(config, world_size, "with the checkpoint's values")
    return config, [change.row() for change in found]


def _problems(found: list[Change]) -> Iterator[Problem]:
    for change in found:
        what = f"checkpoint {change.saved}, now {change.now}"
        if change.rule == "refused":
            yield (
                change.path,
                f"{what}: the order of the data would change, tokens would be repeated or left out",
                "put it back, or start another run.name",
            )
        elif change.rule == "ask":
            fix = f"checkpoint.on_change={{{change.path}: override}} for {change.now}, keep for {change.saved}"
            yield change.path, what, fix


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, part in value.items():
        path = f"{prefix}{key}"
        if path == "checkpoint.on_change":
            continue  # the word itself is none of the things it is about
        if isinstance(part, Mapping):
            yield from _flat(part, f"{path}.")
        else:
            yield path, part


def _within(path: str, section: str) -> bool:
    return path == section or path.startswith(f"{section}.")


def _rule(path: str, on_change: Mapping[str, str]) -> str:
    if path in ORDER:
        return "refused"
    if any(_within(path, section) for section in FREE):
        return "free"
    said = [section for section in on_change if _within(path, section)]
    return on_change[max(said, key=len)] if said else on_change.get("all", "ask")
