"""Devices by the name that a command line gives, and what kernels for them need."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


@cache
def has_triton() -> bool:
    """Whether it is installed. Nothing is imported, and the import path is searched once: optimizers ask for every
    parameter in every step."""
    return importlib.util.find_spec("triton") is not None


def device_of(name: str | None, refused: type[Exception]) -> torch.device:
    """The device of this name; None: a GPU if there is one.

    Raises:
        refused: it is not there; the message names `--device`.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise refused(f"--device {name} is not there: {reason}; cpu works anywhere") from None
    return device
