"""Keys of the model section under the names that earlier versions gave them. Records with those names stay readable."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "hope": {"pattern": ["hope"]},
    "hope_attention": {"pattern": ["attention"]},
    # its one MLP of full width had no clock, whatever the cms section said
    "transformer": {
        "pattern": ["attention"],
        "cms": {"variant": "sequential", "periods": [1], "unit": "steps", "hidden": None},
    },
}
"""What a `model.kind` set."""

NEWER_KEYS: dict[str, dict[str, Any]] = {
    "hope": {
        "forget": "zero",
        "alpha_spread": 0.0,
        "erase_max": None,
        "output_gate": "silu",
        "static": "learned",
        "kernel": "auto",
        "self_made": "all",
    },
    "attention": {"positions": "rope", "window": None, "qk_norm": False},
    "linear": {"kernel": "auto"},
}
"""Keys of `model.mixers.NAME` that earlier records lack, or could lack. Memories forgot towards zero."""
OLD_RULES = {"mamba2": "ssd"}
"""What a `model.mixers.linear.rule` is called now. Mamba-2 as published is a mixer of its own."""
NEWER_OF_MODEL: dict[str, Any] = {"norm_eps": 1e-6, "depth_scaled_init": False, "init": None}
"""Keys of `model` that earlier records lack. Runs began with drawn weights."""

OLD_KEYS = ("kind", "memory", "rope_base")
"""What the model section no longer has."""


def memory_key(old: str) -> str:
    """The key of the mixer `hope` that was `model.memory.OLD`."""
    return "memory" if old == "kind" else old


def current_model(record: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded model section, as plain values, under today's names. One that has them already comes back as it is.

    Where a newer key has another default, it says what the recording version did.

    Raises:
        ValueError: its `kind` is none that there was.
    """
    if "kind" not in record:
        return _with_newer_keys(dict(record))
    kind = record["kind"]
    if kind not in KINDS:
        raise ValueError(f"model.kind {kind!r} is none of {', '.join(KINDS)}")
    values = {key: value for key, value in record.items() if key not in OLD_KEYS}
    mixers: dict[str, dict[str, Any]] = {
        "hope": {memory_key(key): value for key, value in record.get("memory", {}).items()},
        "attention": {"rope_base": record["rope_base"]} if "rope_base" in record else {},
    }
    values |= copy.deepcopy(KINDS[kind])
    return _with_newer_keys({**values, "mixers": {name: mixers[name] for name in values["pattern"]}, "imports": []})


def _with_newer_keys(values: dict[str, Any]) -> dict[str, Any]:
    """With what the recording version did, where it had no key for it."""
    values = {**NEWER_OF_MODEL, **values}
    mixers = dict(values.get("mixers") or {})
    for name, newer in NEWER_KEYS.items():
        if name in values.get("pattern", ()) or name in mixers:
            mixers[name] = {**newer, **(mixers.get(name) or {})}
    if (rule := mixers.get("linear", {}).get("rule")) in OLD_RULES:
        mixers["linear"]["rule"] = OLD_RULES[rule]
    return {**values, "mixers": mixers} if mixers else values
