"""Devices by the name that a command line gives, and what kernels for them need."""

from __future__ import annotations

import importlib.util

import torch


class CannotCapture(RuntimeError):
    """The message says what is missing for CUDA graphs, and what would work without."""


def require_graphs(wanted: bool, device: str) -> None:
    """Of `train.cuda_graphs` on a type of device. Raises CannotCapture."""
    if wanted and device != "cuda":
        what = f"train.cuda_graphs=true needs a GPU, and this runs on the {device.upper()}"
        raise CannotCapture(f"{what}; train.cuda_graphs=false needs none")


_TRITON = importlib.util.find_spec("triton") is not None  # once: torch.compile cannot look into a search


def has_triton() -> bool:
    """Whether it is installed. Nothing is imported."""
    return _TRITON


def device_of(name: str | None, refused: type[Exception]) -> torch.device:
    """The device of this name; None: a GPU if there is one.

    Raises:
        refused: it is not there; the message names `--device`.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # `meta` has shapes and no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise refused(f"--device {name} is not there: {reason}; cpu works anywhere") from None
    return device
