"""The lines a run prints: one per logged step, one per event."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

from hope.train.throughput import GIB, Devices

ABSENT = "n/a"


def print_line(text: str) -> None:
    """Print, now. What a full disk or a reader that has gone does not take is no reason to end."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def console_line(record: Mapping[str, Any], *, steps: int, devices: Devices) -> str:
    """One line, without its end, for a record of metrics.jsonl.

    Keys: step, loss, grad_norm, lr, tokens_per_s, tokens_per_s_per_device, step_time_s, data_time_s.
    `mfu` is a fraction, `memory_gb` in GiB, `eta_s` in seconds. A missing or None value prints as n/a;
    `heldout_loss` is appended when present.
    """
    step = record["step"]
    width = max(6, len(str(steps)))
    parts = [
        f"step {step:>{width}}/{steps}",
        f"{100 * step / steps:.1f}%",
        "loss " + _number(record.get("loss"), ".4f"),
        "gnorm " + _number(record.get("grad_norm"), ".2f"),
        "lr " + _number(record.get("lr"), ".1e"),
        f"{short(record.get('tokens_per_s'))} tok/s",
        f"{short(record.get('tokens_per_s_per_device'))}/{devices.kind}",
        "mfu " + _number(record.get("mfu"), ".1%"),
        "mem " + _memory(record.get("memory_gb"), devices.memory_gb),
        "data " + _share(record.get("data_time_s"), record.get("step_time_s")),
        "eta " + duration(record.get("eta_s")),
    ]
    if record.get("heldout_loss") is not None:
        parts.append("heldout " + _number(record["heldout_loss"], ".4f"))
    return "  ".join(parts)


def event_line(word: str, **fields: Any) -> str:
    """`SAVE step=1200 blocking=0.6s bytes=31.4G`: see format_event."""
    return format_event(word, fields)


def format_event(word: str, fields: Mapping[str, Any]) -> str:
    """The word, then key=value. A key that ends in _s prints as seconds, one in `bytes` as KiB to TiB.

    Texts with spaces are quoted, so that a line splits into its fields.
    """
    return " ".join([word, *(_field(key, value) for key, value in fields.items())])


def _field(key: str, value: Any) -> str:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if numeric and key.endswith("_s"):
        return f"{key.removesuffix('_s')}={value:.1f}s"
    if numeric and key.endswith("bytes"):
        return f"{key}={_binary(value)}"
    if isinstance(value, float):
        return f"{key}={value:.4g}"
    text = str(value)
    return f"{key}={text!r}" if " " in text else f"{key}={text}"


def short(value: float | None) -> str:
    """412300 -> 412.3k, with k, M, G for powers of 1000."""
    if value is None:
        return ABSENT
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.99995 * scale:  # 999950 is 1.0M, not 1000.0k
            return f"{value / scale:.1f}{unit}"
    return f"{value:.1f}"


def _binary(value: float) -> str:
    for unit, scale in (("T", 1024 * GIB), ("G", GIB), ("M", 2**20), ("K", 2**10)):
        if value >= scale:
            return f"{value / scale:.1f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """39720 -> 11h02; 45s, 12m30, 3d04h."""
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    whole = round(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02}h"
    if hours:
        return f"{hours}h{m:02}"
    return f"{m}m{s:02}" if minutes else f"{s}s"


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)


def _memory(used: float | None, total: float | None) -> str:
    if used is None:
        return ABSENT
    return f"{used:.1f}G" + (f"({used / total:.0%})" if total else "")


def _share(part: float | None, whole: float | None) -> str:
    return ABSENT if part is None or not whole else f"{part / whole:.1%}"
