"""Which form of the memory loop runs, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from hope.memory.config import MemoryConfig
from hope.memory.scan import Scanned, scan


class ScanChoice(NamedTuple):
    """A form of the loop with `scan`'s signature, its name, and the reason for it."""

    scan: Callable[..., Scanned]
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def scan_for(config: MemoryConfig, device: torch.device) -> ScanChoice:
    """The fastest form of the loop that fits the memory and the device."""
    return ScanChoice(scan, "plain", f"no kernel for {config.memory} memories yet")
