"""Which kernels torch may take: the only settings of a run that hold for the whole process."""

import os

import torch

from hope.train.config import TrainConfig


def set_numerics(train: TrainConfig) -> None:
    """Follow train.precision and train.deterministic. Before the first product: cuBLAS reads its variable then."""
    if train.precision == "bf16":
        torch.set_float32_matmul_precision("high")  # fp32 memory states through tf32 products
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else products may differ from stream to stream
    torch.use_deterministic_algorithms(train.deterministic)
