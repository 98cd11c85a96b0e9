"""Keys under the names that earlier versions gave them: refused with the new name in what a user writes, translated in
what a checkpoint recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from configs.tree import UNKNOWN
from configs.used import lookup, put, word
from hope.renamed import KINDS, OLD_RULES, current_model, memory_key
from hope.sections import Problem

_MEMORY = ("kind", "projection_chunk", "main_chunk", "read", "eta_max", "alpha_bias", "contribution", "static",
           "normalise_values", "erase", "momentum", "adaptive_query", "expansion", "conv_width")  # fmt: skip
_DMGD = ("memory", "objective", "preconditioner", "normalise", "output", "output_bound", "erase", "bias_correction")
_MATRIX = ("newton_schulz_steps", "matrix_rms")

RENAMED: dict[str, tuple[str, ...]] = {
    **{f"model.memory.{key}": (f"model.mixers.hope.{memory_key(key)}",) for key in _MEMORY},
    "model.rope_base": ("model.mixers.attention.rope_base",),
    **{f"optim.{key}": (f"optim.dmgd.{key}",) for key in _DMGD},
    **{f"optim.mlp_{key}": (f"optim.dmgd.mlp.{key}",) for key in ("key", "width", "lr", "decay")},
    **{f"optim.m3_{key}": (f"optim.m3.{key}",) for key in ("reading", "slow_period", "alpha", "beta3")},
    **{f"optim.{key}": (f"optim.muon.{key}", f"optim.m3.{key}") for key in _MATRIX},
}
"""Old path: what it is now. Of two, the one in the section of `optim.name` is meant."""

NEWER: dict[str, Any] = {
    "model.cms.in_context": [],
    "optim.lr_elementwise": None,
    "optim.level_rate": 0.0,
    "optim.momentum_warmup": 0,
    "optim.groups": [],
    "optim.muon.per_head": False,
    "optim.m3.per_head": False,
    "train.mode": "blend",
    "train.tokens": None,
    "train.loss_chunk": None,
    "train.compile": "none",
    "train.cuda_graphs": False,
    "train.profile": None,
    "train.eval_levels": False,
}
"""Keys that earlier records lack: what the recording version did, whatever the default is today.
(`hope.renamed` has the model's.)"""

RULE = "model.mixers.linear.rule"
"""A value of it was renamed, `hope.renamed.OLD_RULES`."""
KIND = "model.kind"
"""It became several keys, `hope.renamed.KINDS`."""


def refuse_old(values: dict[str, Any], place: Callable[[str], str]) -> Iterator[Problem]:
    """Take old keys out of the nested container, with a problem for each that says what to write now.

    Args:
        place: gives where a key was given, such as " (line 3)".
    """
    for old in (KIND, *RENAMED):
        value = lookup(values, old)
        if value is not UNKNOWN:
            use = _of_kind(value) if old == KIND else " or ".join(f"{new}={word(value)}" for new in _meant(old, values))
            yield Problem(old, f"was renamed{place(old)}", f"use: {use}")
            _take(values, old)
    if (rule := lookup(values, RULE)) in list(OLD_RULES):
        use = f"{RULE}={OLD_RULES[rule]}, or model.pattern=[{rule}], the published layer"
        yield Problem(RULE, f"{rule} was renamed{place(RULE)}", f"use: {use}")
        _take(values, RULE)


def current(record: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded configuration under today's names. One that has them already comes back as it is.

    Raises:
        ValueError: it says what no key of today says.
    """
    values = copy.deepcopy(dict(record))
    if "model" in values:
        values["model"] = current_model(values["model"])
    if isinstance(values.get("log"), dict):
        values["log"] = {**values["log"], "wandb": values["log"].get("wandb", False)}  # there was none
    # `optim.memory` was renamed, and `model.memory` has just been: only the first can still be there
    for old in [path for path in RENAMED if lookup(values, path) is not UNKNOWN]:
        found = lookup(values, old)
        _take(values, old)
        for new in _meant(old, values):
            put(values, new, found)
    for path, value in NEWER.items():
        section = lookup(values, path.rpartition(".")[0])
        if isinstance(section, Mapping) and section and lookup(values, path) is UNKNOWN:
            put(values, path, copy.deepcopy(value))
    return values


def _meant(old: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The new paths of an old one; of several that of the chosen optimizer, if it is among them."""
    chosen = f"optim.{lookup(values, 'optim.name')}."
    return tuple(new for new in RENAMED[old] if new.startswith(chosen)) or RENAMED[old]


def _of_kind(kind: Any) -> str:
    if kind not in KINDS:
        return "model.pattern, a list of mixers; model.kind was one of " + ", ".join(KINDS)
    pattern = ", ".join(KINDS[kind]["pattern"])
    return f"model.pattern=[{pattern}]" + (" model.cms.periods=[1]" if "cms" in KINDS[kind] else "")


def _take(values: dict[str, Any], path: str) -> None:
    """Remove a key, and its section if nothing is left of it."""
    section, _, key = path.rpartition(".")
    found = lookup(values, section)
    del found[key]
    if not found and "." in section:
        _take(values, section)
