"""What differs between a checkpoint's configuration and this one, and which of the two a resumed run follows.

Layout, names, logging and saving may change freely. What decides the order of the data may not change at all. Of the
rest the run asks: `checkpoint.on_change={optim.lr: override}` takes the new value, `keep` the checkpoint's. It does not
ask about the schedule if every step so far would have had the same learning rate: then nothing has been different.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from configs.errors import ConfigError
from configs.renamed import current
from configs.schema import Config, of_record, validate
from configs.tree import Key, leaves
from configs.used import put, recorded, without_unused
from hope.sections import Problem
from hope.train.schedule import same_until

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
    "model.mixers.hope.kernel",
    "model.mixers.linear.kernel",
    "model.mixers.mamba2.kernel",
    "model.init",  # the weights are the checkpoint's; where they began is in its `origin`
    "model.init_allow",
    "model.init_levels",
    "train.stop_after",
    "train.micro_batch",
    "train.deterministic",
    "train.recompute",
    "train.loss_chunk",
    "train.compile",
    "train.cuda_graphs",
    "train.profile",
    "train.eval_every",
    "train.eval_windows",
    "train.eval_levels",
    "train.tasks",
    "train.task_items",
    "train.max_skips",
)
ORDER = ("train.seq_len", "train.global_batch", "data.seed")
SCHEDULE = (
    "train.steps",
    "train.tokens",
    "optim.warmup",
    "optim.decay",
    "optim.decay_length",
    "optim.decay_shape",
    "optim.final_lr",
)
"""What decides the learning rate of a step, the peak apart."""
ABSENT = "(absent)"


@dataclasses.dataclass(frozen=True)
class Change:
    """A key whose value differs; `rule`: free, same so far, refused, ask, keep or override."""

    path: str
    saved: Any
    now: Any
    rule: str

    @property
    def effective(self) -> Any:
        return self.saved if self.rule == "keep" else self.now

    def row(self) -> str:
        return f"{self.path}: checkpoint {self.saved}, config {self.now}, effective {self.effective} ({self.rule})"


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], on_change: Mapping[str, str], *, same_schedule: bool = False
) -> list[Change]:
    """All keys that differ between two configurations as nested dicts, in this one's order; a list is one value.

    A key that only one of them has, because only its choices use it, follows the word for those choices.
    `same_schedule`: what differs of the schedule has made no difference yet.
    """
    old, new = dict(_flat(saved)), dict(_flat(now))
    paths = [*new, *(path for path in old if path not in new)]
    changed = {p: (old.get(p, ABSENT), new.get(p, ABSENT)) for p in paths if old.get(p, ABSENT) != new.get(p, ABSENT)}
    decided = {key.path: _deciding(key, changed) for key in leaves(Config)}
    rules = {path: _rule(decided.get(path, path), on_change, same_schedule) for path in changed}
    return [Change(path, *values, rules[path]) for path, values in changed.items()]


def settle(config: Config, saved: Mapping[str, Any], world_size: int, step: int = 0) -> tuple[Config, list[str]]:
    """(the configuration that a run resumed from a checkpoint follows, a line per difference).

    `saved`: the checkpoint's, as `configs.used.recorded` or an earlier version gave it. `step`: the checkpoint's; 0 if
    it is not known, then every change of the schedule is asked about.

    Raises:
        ConfigError: a key differs and may not, nothing says what to do about it, or what is kept does not fit the rest;
            all of them at once.
    """
    now, saved = recorded(config), _of_today(saved)
    same = step > 0 and _same_schedule(saved, config, step)
    found = differences(saved, now, config.checkpoint.on_change, same_schedule=same)
    problems = list(_problems(found))
    if problems:
        raise ConfigError("against the checkpoint", problems)
    known = {key.path for key in leaves(Config)}
    kept = {c.path: c.saved for c in found if c.rule == "keep" and c.saved != ABSENT and c.path in known}
    if kept:
        for path, value in kept.items():
            put(now, path, value)
        config = of_record(without_unused(now, Config))
        validate(config, world_size, "with the checkpoint's values")
    return config, [change.row() for change in found]


def _of_today(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded configuration under today's names, without the keys that do nothing in it."""
    try:
        return without_unused(current(saved), Config)
    except ValueError as error:
        raise ConfigError("the checkpoint's configuration", [Problem("model", str(error), "")]) from None


def _same_schedule(saved: Mapping[str, Any], config: Config, step: int) -> bool:
    """Whether all steps up to the checkpoint's would have had the same learning rates."""
    try:
        old = of_record(saved)
    except OmegaConfBaseException:  # a key that is no more: told with the differences
        return False
    return same_until(step, old.optim, old.train.total_steps, config.optim, config.train.total_steps)


def _deciding(key: Key, changed: Mapping[str, tuple[Any, Any]]) -> str:
    """The path whose rule a changed key has: its own, or, if one side has no such key, the choice's that differs."""
    if ABSENT not in changed.get(key.path, ()):
        return key.path
    return next((use.governor for use in key.uses if use.governor in changed), key.path)


def _problems(found: list[Change]) -> Iterator[Problem]:
    asked = {change.path for change in found if change.rule == "ask"}
    followed = {key.path for key in leaves(Config) if any(use.governor in asked for use in key.uses)}
    for change in found:
        if change.path in followed and ABSENT in (change.saved, change.now):
            continue  # the choice that it follows is asked about
        what = f"checkpoint {change.saved}, now {change.now}"
        if change.rule == "refused":
            yield Problem(
                change.path,
                f"{what}: the order of the data would change, tokens would be repeated or left out",
                "put it back, or start another run.name, with model.init for these weights",
            )
        elif change.rule == "ask":
            word = f"'checkpoint.on_change={{{change.path}: override}}'"  # quoted: a shell would split it
            fix = f"{word} for {change.now}, keep for {change.saved}"
            yield Problem(change.path, what, fix)


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


def _rule(path: str, on_change: Mapping[str, str], same_schedule: bool) -> str:
    if path in ORDER:
        return "refused"
    if any(_within(path, section) for section in FREE):
        return "free"
    said = [section for section in on_change if _within(path, section)]
    if said:
        return on_change[max(said, key=len)]
    return on_change.get("all", "same so far" if same_schedule and path in SCHEDULE else "ask")
