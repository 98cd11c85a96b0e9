"""Bytes that a rank's collectives move in a step, predicted from the configuration.

A ring of n ranks moves (n - 1) / n of a tensor for an all-gather or a reduce-scatter, and twice that for an all-reduce.
Divided by the bus bandwidth, as nccl-tests counts it, these are seconds (launch/collectives.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hope.block import Block
from hope.config import ModelConfig
from hope.model import Slice
from hope.optim.clocks import frozen
from hope.optim.config import OptimConfig
from hope.optim.levels import parameter_groups
from hope.optim.policy import MATRIX_OPTIMIZERS
from parallel.layout.memory import StepShape, build_part
from parallel.layout.regions import outermost_regions


def reduced_bytes_per_step(config: ModelConfig, parts: Sequence[Slice], shape: StepShape, optim: OptimConfig) -> float:
    """fp32 gradients given to collectives over data-parallel ranks per optimizer step, averaged over the levels'
    periods; padding of flat buffers left out.

    A level with period C costs 1/C with `optim.accumulate: local`, and the same as every other with `sharded`; a frozen
    group costs nothing. One data-parallel rank reduces nothing.
    """
    if shape.data == 1:
        return 0.0
    return sum(_reduced(group, size, optim) for group, size in _learning(config, parts, shape, optim))


def data_ring_bytes(config: ModelConfig, parts: Sequence[Slice], shape: StepShape, optim: OptimConfig) -> float:
    """Bytes that a data-parallel rank moves per step, averaged like `reduced_bytes_per_step`.

    Gradients are fp32, reduce-scattered under bf16 and all-reduced else. Weights that have moved are all-gathered in
    their own precision. Of matrices that one rank owns (Muon, M3) gradients are reduce-scattered and weights gathered,
    both in fp32; the exchange of their parts among tensor ranks is left out. All of it comes after the backward pass:
    nothing overlaps.
    """
    total = 0.0
    for group, size in _learning(config, parts, shape, optim):
        owned = group["matrices"] and optim.name in MATRIX_OPTIMIZERS
        total += (1 if owned or shape.bf16 else 2) * _reduced(group, size, optim)
        total += (2 if shape.bf16 and not owned else 4) * size / group["period"]
    return (shape.data - 1) / shape.data * total


def _learning(
    config: ModelConfig, parts: Sequence[Slice], shape: StepShape, optim: OptimConfig
) -> Iterator[tuple[dict[str, Any], int]]:
    """(group, its numbers on this rank) of every group that learns."""
    for part in parts:
        for group in parameter_groups(build_part(config, part, shape), 0.0, optim, shape.tokens_per_step):
            if not frozen(group):
                yield group, sum(p.numel() for p in group["params"])


def _reduced(group: dict[str, Any], size: int, optim: OptimConfig) -> float:
    return 4.0 * size / (group["period"] if optim.accumulate == "local" else 1)


def tensor_ring_bytes(config: ModelConfig, parts: Sequence[Slice], shape: StepShape) -> float:
    """Bytes that a tensor-parallel rank moves for one micro-batch, forward, backward and what is computed again.

    Trunk activations [T, B, D], in the precision of training, cross the borders of regions as
    parallel/compute/tensor.py has them. Left out: fp32 numbers per token of a divided vocabulary's softmax, and the sum
    of replicated parameters' gradients once per step.
    """
    crossings = sum(_crossings(config, part, shape) for part in parts)
    activations = shape.seq_len * shape.micro_batch * config.width * (2 if shape.bf16 else 4)
    return crossings * (shape.tensor - 1) / shape.tensor * activations


def _crossings(config: ModelConfig, part: Slice, shape: StepShape) -> int:
    """All-gathers and reduce-scatters of a micro-batch, an all-reduce being two of them.

    With sequence parallelism every border is one, forward and backward. Without it, `leave` is an all-reduce forward,
    and `enter` backward. The embedding only leaves, and the head only enters.
    """
    model = build_part(config, part, shape)
    total = 0
    for block in model.blocks.values():
        assert isinstance(block, Block)
        total += 4 * len(list(outermost_regions(block)))
        enters, leaves = _again(block, shape.recompute)
        total += enters + leaves if shape.sequence else 2 * leaves
    return total + 2 * model.has_embedding + 2 * model.has_head


def _again(block: Block, recompute: str) -> tuple[int, int]:
    """(enter, leave) that the backward pass makes again.

    torch ends a recomputation with the last tensor that the backward pass wants, which comes before the last `leave`.
    Independent levels' sum wants that too, which is one more and not counted.
    """
    regions = lambda module: len(list(outermost_regions(module)))
    mixing = [regions(part) for part in block.mixing().values()]
    slow = [1] * (regions(block) - sum(mixing))
    spans: dict[str, list[int]] = {
        "none": [],
        "memory": mixing,
        "mlp": slow,
        "sublayer": [*mixing, *slow],
        "block": [regions(block)],
    }
    again = spans[recompute]
    return sum(again), sum(again) - len(again)
