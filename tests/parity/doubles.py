"""float64 wherever the code says float32, to tell rounding from a bug.

Rounding is 5e8 times smaller, and so is what training makes of it; a missing sum, or one taken twice, stays as large
as it was.
"""

import torch

from parallel.referee import verdict

BOUND = 1e-9  # of everything; 8e-13 was measured where fp32 gives 9e-4


def compute_in_float64() -> None:
    """For this process, which must be one of its own: neither DeepSpeed nor the engine's configuration has fp64."""
    torch.set_default_dtype(torch.float64)
    for name in ("float32", "float"):
        setattr(torch, name, torch.float64)
    torch.Tensor.float = torch.Tensor.double
    from deepspeed.runtime.config import DtypeEnum

    DtypeEnum.fp32._value_ = torch.float64  # it was read when DeepSpeed was imported
    for bounds in (verdict.TOLERANCE, verdict.WEIGHT_TOLERANCE, verdict.LOSS_TOLERANCE):
        bounds["fp32"] = BOUND
