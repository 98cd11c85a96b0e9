"""Forward and backward passes over micro-batches, driven by megatron-core's schedules.

A pipeline rank holds one Stage per virtual stage, each around a slice of the model. Only activations [T, B, D] travel
(T / tensor ranks under sequence parallelism); every stage reads tokens, targets and document starts from its own copy
of the batch. Fast weights are created inside each forward pass, so they never cross stages or micro-batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from parallel.layout.topology import ParallelConfig
from parallel.start.groups import import_quietly, parallel_state

Report = dict[str, torch.Tensor]
StepFn = Callable[[Any, torch.Tensor | None, Any], torch.Tensor | tuple[torch.Tensor, Report]]


class Stage(nn.Module):
    """What megatron-core's schedules ask of a pipeline stage, around a model (slice) that knows nothing of it.

    The wrapped model is `stage.model`. Hand the raw stage to the schedule, never DeepSpeed's engine: the
    engine's own `config` (a dict) would hide this one. Make the stages of a rank with `stages_of`.
    """

    def __init__(self, model: nn.Module, precision: str = "fp32", config: Any = None, chunk: int | None = None) -> None:
        super().__init__()
        import_quietly()
        from megatron.core.enums import ModelType

        self.model = model
        self.config = config or schedule_config(ParallelConfig(), precision)
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = (
            False  # the copies' gradients are summed by parallel/compute/gradients.py
        )
        self.vp_stage = chunk
        self.received: torch.Tensor | None = None

    def set_input_tensor(self, tensor: Any) -> None:
        """Called by the schedule with the previous stage's output [T, B, D], or None on the first."""
        self.received = tensor[0] if isinstance(tensor, list) else tensor


def stages_of(models: Sequence[nn.Module], precision: str, layout: ParallelConfig, width: int) -> list[Stage]:
    """This rank's stages, one per virtual stage, in order; they share one configuration. `width`: D of activations."""
    if len(models) != layout.virtual_pipeline:
        raise ValueError(f"{len(models)} model chunks for parallel.virtual_pipeline {layout.virtual_pipeline}")
    config = schedule_config(layout, precision, width)
    interleaved = layout.virtual_pipeline > 1
    return [Stage(model, precision, config, chunk if interleaved else None) for chunk, model in enumerate(models)]


def schedule_config(layout: ParallelConfig, precision: str, width: int = 1) -> Any:
    """megatron-core's TransformerConfig as its schedules read it; they need fields that only this class has.

    Layers and heads take no part in a schedule: they are the smallest numbers that its checks accept.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    interleaved = layout.virtual_pipeline > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own default for CUDA graphs is one that it calls deprecated
        return TransformerConfig(
            num_layers=layout.pipeline * layout.virtual_pipeline,
            hidden_size=width,
            num_attention_heads=layout.tensor,
            kv_channels=1,
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
            sequence_parallel=layout.sequence,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            use_cpu_initialization=True,
            # Interleaved on two stages, batched p2p mixes up sends to the same peer without an error (measured on
            # gloo: gradient norm 76 instead of 0.69), and freed outputs turn overlapped p2p into NaN.
            batch_p2p_comm=not interleaved,
            overlap_p2p_comm=interleaved,
            deallocate_pipeline_outputs=layout.pipeline > 1 and not interleaved,
        )


def forward_backward(
    stages: Stage | Sequence[Stage],
    micro_batches: Sequence[Any],
    step_fn: StepFn,
    forward_only: bool = False,
    phase: Callable[[str], object] | None = None,
) -> list[Report]:
    """Run every micro-batch forward and, unless `forward_only`, backward.

    Args:
        stages: this rank's stage, or stages with virtual pipeline.
        micro_batches: the same ones, in the same order, on every stage of a pipeline. With a pipeline they need
            `tokens_TB`, all of one shape, and with virtual pipeline a multiple of the pipeline degree in number.
        step_fn: `step_fn(model, hidden, batch)` runs a stage's model. `hidden` [T, B, D] is the previous stage's
            output, None on the first stage. Before the last stage it returns activations [T, B, D], on the last a
            scalar loss and a dict of tensors to report.
        phase: told "forward" before and "backward" after every forward pass.

    Gradients are ADDED to the parameters, as the mean of the loss over these micro-batches. Returns the reports in
    order, detached, on the last stage, and [] on others. With `forward_only` nothing is recorded for a backward pass.

    Raises:
        ValueError: the stages do not fit the process groups, or the micro-batches the schedule.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunks = [stages] if isinstance(stages, Stage) else list(stages)
    _check(chunks, micro_batches)
    length, size = _shape(chunks[0], micro_batches)
    iterators = [iter(micro_batches) for _ in chunks]
    run = get_forward_backward_func()
    try:
        with torch.set_grad_enabled(not forward_only):
            reports = run(
                forward_step_func=_forward_step(step_fn, _last_stage(), phase),
                data_iterator=iterators if len(chunks) > 1 else iterators[0],
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=len(micro_batches),
                seq_length=length,
                micro_batch_size=size,
                forward_only=forward_only,
            )
    finally:
        for chunk in chunks:
            chunk.received = None  # it would keep the last micro-batch's graph alive
    return reports


def mean_loss(reports: Sequence[Report], device: torch.device) -> torch.Tensor:
    """Mean of the reported "loss" over micro-batches; zero on stages that report none. For `loss_on_all_ranks`."""
    if not reports:
        return torch.zeros((), device=device)
    return torch.stack([report["loss"].float() for report in reports]).mean()


def _forward_step(
    step_fn: StepFn, last_rank: bool, phase: Callable[[str], object] | None
) -> Callable[[Iterator[Any], Stage], tuple[torch.Tensor, Callable]]:
    tell = phase or (lambda name: None)

    def forward_step(batches: Iterator[Any], stage: Stage) -> tuple[torch.Tensor, Callable]:
        tell("forward")
        output = step_fn(stage.model, stage.received, next(batches))
        tell("backward")
        chunks = stage.config.virtual_pipeline_model_parallel_size or 1
        last = last_rank and (stage.vp_stage or 0) == chunks - 1
        if isinstance(output, tuple) != last:
            raise ValueError("step_fn must return (loss, report) on the last stage, and activations before it")
        if isinstance(output, torch.Tensor):
            # p2p sends memory as it lies, and the schedule frees what it sent: no gaps, and not a view
            output = output.contiguous()
            return (output.clone() if output._base is not None else output), _no_loss
        loss, report = output
        if loss.ndim != 0:
            raise ValueError(f"step_fn returned a loss of shape {tuple(loss.shape)}; it must be a scalar")
        detached = {name: value.detach() for name, value in report.items()}
        # The schedule divides its loss by the number of micro-batches in place: give it its own copy, or
        # the reported loss (or a tensor that autograd saved) changes with it.
        return loss.clone(), lambda scaled: (scaled, detached)

    return forward_step


def _no_loss(output: torch.Tensor) -> tuple[torch.Tensor, Report]:
    raise AssertionError("the schedule asked a stage for a loss that it does not have")


def _last_stage() -> bool:
    state = parallel_state()
    return state.get_pipeline_model_parallel_rank() == state.get_pipeline_model_parallel_world_size() - 1


def _check(chunks: list[Stage], micro_batches: Sequence[Any]) -> None:
    if not micro_batches:
        raise ValueError("forward_backward needs at least one micro-batch")
    config, pipeline = chunks[0].config, parallel_state().get_pipeline_model_parallel_world_size()
    if config.pipeline_model_parallel_size != pipeline or len(chunks) != (
        config.virtual_pipeline_model_parallel_size or 1
    ):
        raise ValueError(
            f"{len(chunks)} stages made for pipeline {config.pipeline_model_parallel_size} x virtual "
            f"{config.virtual_pipeline_model_parallel_size or 1}, but the process groups have pipeline {pipeline}"
        )
    if len(chunks) > 1 and len(micro_batches) % pipeline:
        raise ValueError(f"{len(micro_batches)} micro-batches are not a multiple of pipeline {pipeline}")


def _shape(stage: Stage, micro_batches: Sequence[Any]) -> tuple[int, int]:
    """(T, B) of what travels between stages; unused without a pipeline."""
    if stage.config.pipeline_model_parallel_size == 1:
        return 1, 1
    shapes = {tuple(batch.tokens_TB.shape) for batch in micro_batches}
    if len(shapes) != 1:
        raise ValueError(f"with a pipeline all micro-batches have one shape, these have {sorted(shapes)}")
    [(length, size)] = shapes
    return length, size
