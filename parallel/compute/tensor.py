"""Tensor and sequence parallelism: cut the parameters by the plan, put megatron-core's mappings at region borders.

The modules stay hope's own. A region (mixer, MLP, embedding, head) begins with `enter` and ends with `leave`:

                        enter (backward)                      leave (backward)
    tensor              identity (all-reduce)                 all-reduce (identity)
    tensor + sequence   all-gather tokens (reduce-scatter)    reduce-scatter tokens (all-gather)

One pair per region: the projections of a mixer share their `enter`. A mixer's `total` is an all-reduce both ways: the
sum is of all ranks' heads, and all of them use it.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope.loss import ALONE, OverRanks, Unscored, blockwise_loss
from hope.mixers import Mixer
from hope.model import Embedding, Model, next_token_loss
from parallel.layout.plan import layout_of
from parallel.layout.regions import outermost_regions
from parallel.start import groups


class Mapping(nn.Module):
    """A region border: one of megatron-core's autograd functions as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)


def shard_model(model: Model, tp_rank: int, tp_size: int, sequence: bool = False) -> Model:
    """Turn a whole (initialised) model, or a slice of layers, into this tensor-parallel rank's part, in place.

    With `sequence`, trunk activations are [T / tp_size, B, D]. Needs megatron-core's groups when tp_size > 1. Of nested
    regions the outermost gets borders: what is inside works on activations that have entered already.

    Raises:
        UndeclaredParameter: a parameter has no layout; ValueError: a dimension does not divide.
    """
    for name, parameter in model.named_parameters():
        part = layout_of(parameter, name).cut(parameter.data, tp_rank, tp_size)
        parameter.data = part.clone(memory_format=torch.contiguous_format)
    if tp_size == 1:
        return model
    enter, leave = _borders(sequence)
    for module in model.modules():
        if isinstance(module, Embedding):
            module.first_row = tp_rank * module.weight.shape[0]
        if isinstance(module, Mixer):
            module.first_head = tp_rank * (model.config.heads // tp_size)
            module.total = Mapping(_total)
    for region in outermost_regions(model):
        region.enter, region.leave = enter, leave
    return model


def _borders(sequence: bool) -> tuple[Mapping, Mapping]:
    from megatron.core.tensor_parallel import mappings

    if sequence:
        return (
            Mapping(mappings.gather_from_sequence_parallel_region),
            Mapping(mappings.reduce_scatter_to_sequence_parallel_region),
        )
    return (
        Mapping(mappings.copy_to_tensor_model_parallel_region),
        Mapping(mappings.reduce_from_tensor_model_parallel_region),
    )


def _total(x: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import mappings

    # in place: megatron-core's reduction changes what it is given
    summed = mappings.reduce_from_tensor_model_parallel_region(x.clone(memory_format=torch.contiguous_format))
    whole: Tensor = mappings.copy_to_tensor_model_parallel_region(summed)
    return whole


def sharded_loss(
    scores: Tensor | Unscored, targets_TB: Tensor, tp_size: int, weights_TB: Tensor | None = None
) -> Tensor:
    """`hope.model.next_token_loss` where each tensor-parallel rank holds V / tp_size scores; the same on every rank.

    scores: [T, B, V / tp_size], or what they are made of (from `Embedding.scores`).
    """
    if isinstance(scores, Unscored):
        return blockwise_loss(scores, targets_TB, weights_TB, ALONE if tp_size == 1 else _over_tensor_ranks())
    if tp_size == 1:
        return next_token_loss(scores, targets_TB, weights_TB)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    losses_TB = vocab_parallel_cross_entropy(scores.float(), targets_TB)
    return losses_TB.mean() if weights_TB is None else (losses_TB * weights_TB).mean()


def _over_tensor_ranks() -> OverRanks:
    def reduce(tensor: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, how, group=groups.tensor_group())
        return tensor

    return OverRanks(lambda t: reduce(t, dist.ReduceOp.MAX), lambda t: reduce(t, dist.ReduceOp.SUM))
