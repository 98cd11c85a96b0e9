"""Forward and backward passes over micro-batches, driven by megatron-core's schedule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from parallel.groups import import_quietly

Report = dict[str, torch.Tensor]
LossFn = Callable[[Any, Any], tuple[torch.Tensor, Report]]


class Stage(nn.Module):
    """What megatron-core's schedules ask of a pipeline stage, around a model that knows nothing of it.

    The wrapped model is `stage.model`. Hand the raw stage to the schedule, never DeepSpeed's engine: the
    engine's own `config` (a dict) would hide this one.
    """

    def __init__(self, model: nn.Module, precision: str = "fp32") -> None:
        super().__init__()
        import_quietly()
        from megatron.core.enums import ModelType

        self.model = model
        self.config = _schedule_config(torch.bfloat16 if precision == "bf16" else torch.float32)
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.vp_stage = None

    def set_input_tensor(self, tensor: Any) -> None:
        """Called by the schedule with the previous stage's output; the only stage there is has none."""


def _schedule_config(dtype: torch.dtype) -> Any:
    # The schedules read fields that only TransformerConfig has; the three sizes are its required ones and
    # are used for buffers between pipeline stages, of which there are none.
    from megatron.core.transformer.transformer_config import TransformerConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own default for CUDA graphs is one that it calls deprecated
        return TransformerConfig(
            num_layers=1,
            hidden_size=1,
            num_attention_heads=1,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            use_cpu_initialization=True,
        )


def forward_backward(
    stage: Stage, micro_batches: Sequence[Any], loss_fn: LossFn, forward_only: bool = False
) -> list[Report]:
    """Run every micro-batch forward and, unless `forward_only`, backward.

    `loss_fn(model, batch)` returns a scalar loss and a dict of tensors to report. Gradients are ADDED to the
    stage's parameters, as the mean of the loss over these micro-batches. Returns the reports in order,
    detached. With `forward_only` nothing is recorded for a backward pass.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    if not micro_batches:
        raise ValueError("forward_backward needs at least one micro-batch")

    def forward_step(batches: Iterator[Any], model: Stage) -> tuple[torch.Tensor, Callable]:
        loss, report = loss_fn(model.model, next(batches))
        if loss.ndim != 0:
            raise ValueError(f"loss_fn returned a loss of shape {tuple(loss.shape)}; it must be a scalar")
        detached = {name: value.detach() for name, value in report.items()}
        # The schedule divides its loss by the number of micro-batches in place: give it its own copy, or
        # the reported loss (or a tensor that autograd saved) changes with it.
        return loss.clone(), lambda output: (output, detached)

    run = get_forward_backward_func()
    with torch.set_grad_enabled(not forward_only):
        return run(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=stage,
            num_microbatches=len(micro_batches),
            seq_length=1,  # sizes of buffers between stages; unused by the schedule without pipeline
            micro_batch_size=1,
            forward_only=forward_only,
        )
