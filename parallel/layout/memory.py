"""Bytes of a training step on one rank, from the configuration alone.

Activations are not estimated by formula: blocks of the model run one micro-batch on the meta device, where tensors have
shapes and no data, and everything that autograd saves for the backward pass is summed up, each storage once. That
counts exactly what a chunk loop keeps. Blocks in the middle are alike, so one stands for all of them.
docs/performance.md compares the result with measured peaks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hope.block import Block
from hope.config import ModelConfig
from hope.loss import Unscored, block_of, blockwise_loss, working_bytes
from hope.mixers import Mixer
from hope.model import Model, Slice, next_token_loss
from hope.optim.build import build_optimizer
from hope.optim.clocks import frozen
from hope.optim.config import OptimConfig
from hope.optim.levels import parameter_groups
from hope.train.config import TrainConfig
from parallel.layout.plan import layout_of
from parallel.layout.regions import outermost_regions
from parallel.layout.topology import ParallelConfig, ParallelDims

GIB = 2**30
# The unit of a mixer without chunks, which is measured at twice and three times as many tokens.
_SHORTEST = 8


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. `activations`: saved for backward over all micro-batches in flight; `fast_weights`: the
    memory states of one micro-batch at one time (part of what activations hold per chunk); `loss`: what the loss needs
    while all activations are still there: the fp32 gradient of the scores (under tensor parallelism made in place of
    them), or where they are taken in blocks, the scores of one."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    fast_weights: int
    loss: int

    @property
    def peak(self) -> int:
        """All but the fast weights, which activations include; other temporaries and allocator slack come on top."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


@dataclass(frozen=True)
class StepShape:
    """What decides sizes: tokens and sequences of a micro-batch, precision, division over ranks; `tokens_per_step`,
    needed only for CMS periods in tokens; and `train.loss_chunk`."""

    seq_len: int
    micro_batch: int
    bf16: bool
    tensor: int = 1
    sequence: bool = False
    data: int = 1
    recompute: str = "none"
    tokens_per_step: int | None = None
    loss_chunk: int | None = None

    @staticmethod
    def of(train: TrainConfig, layout: ParallelConfig, dims: ParallelDims) -> "StepShape":
        """Of a run's configuration on the devices of `dims`."""
        return StepShape(
            train.seq_len,
            train.micro_batch,
            train.precision == "bf16",
            dims.tensor,
            layout.sequence,
            dims.data,
            train.recompute,
            train.tokens_per_step,
            train.loss_chunk,
        )

    def loss_block(self, config: ModelConfig) -> int:
        """Tokens of a block of the loss; 0: all at once."""
        return block_of(self.seq_len * self.micro_batch, config.vocab_size // self.tensor, self.loss_chunk)


class _FlashAttention(torch.autograd.Function):
    """Saves what a fused attention kernel saves: q, k, v, the output, and one fp32 number per query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        raise NotImplementedError("sizes only")


class _FusedAttention(TorchFunctionMode):
    """On the meta device torch would take the unfused path, whose T x T scores no GPU keeps."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return _FlashAttention.apply(*args[:3])
        return function(*args, **(kwargs or {}))


class _Gather(nn.Module):
    """The size of an all-gather of tokens."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0] * self.ranks, *x.shape[1:]).requires_grad_() if self.ranks > 1 else x


class _Scatter(_Gather):
    """The size of a reduce-scatter of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x[: x.shape[0] // self.ranks]


def build_part(config: ModelConfig, part: Slice, shape: StepShape) -> Model:
    """The rank's part of the model on the meta device: its slice of layers, its shard of every parameter."""
    with torch.device("meta"):
        model = Model(config, part).to(torch.bfloat16 if shape.bf16 else torch.float32)
    model.set_recompute(shape.recompute)
    ranks = shape.tensor if shape.sequence else 1
    for name, parameter in model.named_parameters():
        parameter.data = layout_of(parameter, name).cut(parameter.data, 0, shape.tensor)
    for region in outermost_regions(model):
        region.enter, region.leave = _Gather(ranks), _Scatter(ranks)
    return model


def activation_bytes(model: Model, shape: StepShape) -> int:
    """Bytes saved for backward by one micro-batch through `model` (from `build_part`)."""
    tokens = torch.zeros(shape.seq_len, shape.micro_batch, dtype=torch.long, device="meta")
    kept: dict[int, Tensor] = {}

    def keep(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage()._cdata] = saved
        return saved

    inputs = tokens
    if not model.has_embedding:
        length = shape.seq_len // (shape.tensor if shape.sequence else 1)
        dtype = next(model.parameters()).dtype
        inputs = torch.empty(length, shape.micro_batch, model.config.width, dtype=dtype, device="meta")
        inputs.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved), _FusedAttention():
        out = model.trunk(inputs)[0]
        if model.has_head:
            scores = model.vocabulary.scores(out, shape.loss_chunk)
            _ = blockwise_loss(scores, tokens) if isinstance(scores, Unscored) else next_token_loss(scores, tokens)
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), tokens)}
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


def part_activations(config: ModelConfig, part: Slice, shape: StepShape) -> int:
    """Bytes saved for backward by one micro-batch through `part`. Blocks that are alike are measured once."""
    kinds: dict[tuple[str, bool, bool], list[int]] = {}
    for layer in range(part.first, part.last):
        kind = (config.mixer_of_layer[layer], layer == 0, layer == config.layers - 1)
        kinds.setdefault(kind, []).append(layer)
    return sum(len(layers) * _block_activations(config, layers[0], shape) for layers in kinds.values())


def _block_activations(config: ModelConfig, layer: int, shape: StepShape) -> int:
    """Of one block (with embedding or head, if it is the first or last). Linear in the number of chunks, or
    of a mixer's periods of them: of a long sequence two short pieces are measured."""
    shape = replace(shape, loss_chunk=shape.loss_block(config))  # of the whole sequence, whatever is measured
    measure = lambda s: activation_bytes(build_part(config, Slice(layer, layer + 1), s), s)
    with torch.device("meta"):
        parts = list(Block(config, config.mixer_of_layer[layer]).mixing().values())
    clocks = [part.period * part.chunk for part in parts if part.chunk > 1]
    unit = math.lcm(*(clocks or [_SHORTEST]), shape.tensor)
    pieces, rest = divmod(shape.seq_len, unit)
    if rest or pieces <= 4:
        return measure(shape)
    two, three = (measure(replace(shape, seq_len=count * unit)) for count in (2, 3))
    return two + (pieces - 2) * (three - two)


def state_bytes(model: Model, micro_batch: int) -> int:
    """What mixers and levels in context on this rank carry for one micro-batch at the start of its sequences: fast
    weights, mostly."""
    parts = [part for block in model.blocks.values() for part in block.mixing().values()]  # type: ignore[operator]
    states = [part.start(micro_batch) for part in parts]
    return sum(state.nbytes() for state in states if state is not None)


def carried_bytes(config: ModelConfig, parts: Sequence[Slice], shape: StepShape, micro_batches: int) -> int:
    """States that a rank with `parts` carries from step to step (`data.documents: stream`), of all its micro-batches.

    Of every kind of block the state is measured on the meta device, window after window, until it grows no more.
    """
    layers = [config.mixer_of_layer[layer] for part in parts for layer in range(part.first, part.last)]
    sizes = {name: _carried_by(config, config.mixer_of_layer.index(name), shape) for name in dict.fromkeys(layers)}
    return micro_batches * sum(sizes[name] for name in layers)


@torch.no_grad()
def _carried_by(config: ModelConfig, layer: int, shape: StepShape) -> int:
    model = build_part(config, Slice(layer, layer + 1), replace(shape, sequence=False))
    [block] = model.blocks.values()
    assert isinstance(block, Block)
    return sum(_carried_in(part, model, shape) for part in block.mixing().values())


def _carried_in(mixer: Mixer, model: Model, shape: StepShape) -> int:
    # whole chunks leave nothing behind in a state but their writes: one of them is as good as all
    length = shape.seq_len if mixer.chunk == 1 else mixer.chunk + shape.seq_len % mixer.chunk
    x = torch.empty(length, shape.micro_batch, model.config.width, dtype=next(model.parameters()).dtype, device="meta")
    state, largest, grows = None, -1, True
    with _FusedAttention():
        while grows:
            _, state = mixer(x, state)
            size = 0 if state is None else state.nbytes()
            largest, grows = max(size, largest), size > largest
    return largest


def optimizer_bytes(models: Sequence[Model], optim: OptimConfig, shape: StepShape) -> int:
    """fp32 masters and states of this rank: what the optimizer itself says it keeps, divided over data ranks.

    Not divided: a deep momentum's networks where partitions cut across tensors, and what a level that communicates only
    when due keeps on its rank. Whole matrices on owners come to the same on average. A frozen group has masters only.
    """
    levels = parameter_groups(models, 0.0, optim, shape.tokens_per_step)
    optimizer = build_optimizer(levels, optim)
    divided = kept = 0
    for group in optimizer.param_groups:
        size, waits = sum(p.numel() for p in group["params"]), group["period"] > 1
        if frozen(group):
            divided += 4 * size
            continue
        local = waits and optim.accumulate == "local" and shape.data > 1
        divided += 4 * size * (1 + len(optimizer.state_keys(group)) + int(waits and not local))
        networks = 4 * len(group["params"]) * optimizer.numbers_per_tensor(group)
        divided += networks * group["matrices"]  # they are with the matrix, on its owner
        kept += 4 * size * int(local) + networks * (not group["matrices"])
    return divided // shape.data + kept


def rank_memory(
    config: ModelConfig, parts: list[Slice], in_flight: float, shape: StepShape, optim: OptimConfig
) -> RankMemory:
    """Bytes of a rank that holds `parts` and has `in_flight` micro-batches between forward and backward."""
    models = [build_part(config, part, shape) for part in parts]
    numbers = sum(p.numel() for model in models for p in model.parameters())
    activations = sum(part_activations(config, part, shape) for part in parts)
    return RankMemory(
        weights=numbers * (2 if shape.bf16 else 4),
        gradients=numbers * 4,
        optimizer=optimizer_bytes(models, optim, shape),
        activations=round(activations * in_flight) + _recomputed(config, shape),
        fast_weights=sum(state_bytes(model, shape.micro_batch) for model in models),
        loss=_loss_bytes(config, shape) if models[-1].has_head else 0,
    )


def _loss_bytes(config: ModelConfig, shape: StepShape) -> int:
    """The fp32 gradient of the scores; megatron-core's cross-entropy of divided scores makes it in their own place. Of
    a loss in blocks what one of them needs."""
    tokens, rows, block = shape.seq_len * shape.micro_batch, config.vocab_size // shape.tensor, shape.loss_block(config)
    if block:
        return working_bytes(tokens, rows, config.width, block, 2 if shape.bf16 else 4)
    return 4 * tokens * rows if shape.tensor == 1 else 0


def _recomputed(config: ModelConfig, shape: StepShape) -> int:
    """With recomputation, the activations of one block are alive while its backward pass runs. The largest counts."""
    if shape.recompute == "none":
        return 0
    first_of = {name: layer for layer, name in reversed(list(enumerate(config.mixer_of_layer[1:-1], start=1)))}
    layers = list(first_of.values()) or [0]
    return max(_block_activations(config, layer, replace(shape, recompute="none")) for layer in layers)
