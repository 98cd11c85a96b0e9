"""DeepSpeed's engine: its configuration, generated; and the groups it is given."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.start.groups import data_group, import_quietly, parallel_state

_BUCKET_ELEMENTS = 500_000_000  # one collective up to 2 GB of fp32 gradients


def engine_config(precision: str, zero: int) -> dict[str, Any]:
    """DeepSpeed's configuration, all of it: it ignores misspelt keys and has defaults that change the numbers."""
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}; it must be 'fp32' or 'bf16'")
    config: dict[str, Any] = {
        # Batches are ours: gradients arrive here already accumulated, so to DeepSpeed a step is one micro-batch.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the default, 1.0, would clip behind our back
        "prescale_gradients": False,
        "communication_data_type": "fp32",  # the default under bf16 would reduce in bf16
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": zero,
            "overlap_comm": False,
            "contiguous_gradients": False,  # its buffers are filled by hooks of engine.backward, unused here
            "reduce_scatter": False,
            "round_robin_gradients": False,
            "parameter_alignment": False,  # padding between parameters would move our slices
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
        },
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
    return config


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, precision: str, zero: int) -> tuple[Any, Any]:
    """(engine, its optimizer) around `model`, made by `deepspeed.initialize`. Collective."""
    import_quietly()
    import deepspeed

    with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints memory use unconditionally
        engine, wrapped, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=engine_config(precision, zero), mpu=Mpu
        )
    engine.enable_backward_allreduce = False
    engine.set_gradient_accumulation_boundary(True)
    if engine.gradient_clipping() != 0.0 or engine.communication_data_type != torch.float32:
        raise AssertionError("DeepSpeed did not take its configuration: clipping or reduction type differ")
    return engine, wrapped


class Mpu:
    """megatron-core's groups under the names that DeepSpeed 0.19.8 asks a "model parallel unit" for."""

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        return data_group()

    @staticmethod
    def get_data_parallel_world_size() -> int:
        return dist.get_world_size(data_group())

    @staticmethod
    def get_data_parallel_rank() -> int:
        return dist.get_rank(data_group())

    @staticmethod
    def get_model_parallel_group() -> dist.ProcessGroup:
        return parallel_state().get_model_parallel_group()

    @staticmethod
    def get_model_parallel_world_size() -> int:
        return dist.get_world_size(parallel_state().get_model_parallel_group())

    @staticmethod
    def get_model_parallel_rank() -> int:
        return dist.get_rank(parallel_state().get_model_parallel_group())

    @staticmethod
    def get_tensor_model_parallel_group() -> dist.ProcessGroup:
        return parallel_state().get_tensor_model_parallel_group()

    @staticmethod
    def get_tensor_model_parallel_world_size() -> int:
        return parallel_state().get_tensor_model_parallel_world_size()

    @staticmethod
    def get_tensor_model_parallel_rank() -> int:
        return parallel_state().get_tensor_model_parallel_rank()

    @staticmethod
    def get_pipeline_model_parallel_group() -> dist.ProcessGroup:
        return parallel_state().get_pipeline_model_parallel_group()

    @staticmethod
    def get_pipeline_model_parallel_world_size() -> int:
        return parallel_state().get_pipeline_model_parallel_world_size()
