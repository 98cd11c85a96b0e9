"""Gradient sums that data parallelism does not know of, as the plan declares them.

megatron-core does these by attribute or by name match and would leave a HOPE gate or norm with a partial gradient,
silently; here every parameter declares it. Called once per step, after all micro-batches and before the reduction over
data-parallel ranks.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope.model import Model
from parallel.layout.plan import GradientRule, layout_of

Accumulated = Callable[[nn.Parameter], Tensor | None]


def combine_over_tensor_ranks(
    models: Iterable[Model], accumulated: Accumulated, sequence: bool, group: dist.ProcessGroup
) -> None:
    """Sum the partial gradients of replicated parameters over the tensor-parallel ranks, in one all-reduce.

    Args:
        models: this rank's part of the model, one per virtual stage.
        accumulated: the gradient of a parameter accumulated over the step's micro-batches, changed in place. None if
            there is nothing to add up: `ShardedOptimizer.accumulated`, or what it has kept of earlier steps.
        sequence: whether trunk tokens are divided over the ranks.
    """
    if dist.get_world_size(group) == 1:
        return
    partial = [parameter for _, parameter in partial_parameters(models, sequence)]
    gradients = [gradient for parameter in partial if (gradient := accumulated(parameter)) is not None]
    if not gradients:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def partial_parameters(models: Iterable[Model], sequence: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters whose gradient is a part on every tensor-parallel rank."""
    summed = [GradientRule.PARTIAL] + ([GradientRule.PARTIAL_UNDER_SEQUENCE] if sequence else [])
    for model in models:
        for name, parameter in model.named_parameters():
            if layout_of(parameter, name).rule in summed:
                yield name, parameter


def combine_tied_embeddings(models: Iterable[Model], accumulated: Accumulated, group: dist.ProcessGroup | None) -> None:
    """Sum the gradients of the embedding's two copies, on the first and on the last pipeline stage.

    Args:
        group: the two stages' group on ranks of these stages, None elsewhere or without a pipeline.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    for model in models:
        if model.config.tie_embeddings and hasattr(model, "embedding"):
            gradient = accumulated(model.embedding.weight)
            if gradient is None:
                raise RuntimeError("the tied embedding has no gradient on one of its stages")
            dist.all_reduce(gradient, group=group)


def counted(name: str, parameter: Tensor, *, tp_rank: int, first_stage: bool, tied: bool) -> bool:
    """Whether this rank counts a parameter in sums over the whole model (norms): every element exactly once."""
    if tied and name == "embedding.weight" and not first_stage:
        return False
    return layout_of(parameter, name).dim is not None or tp_rank == 0
