"""What the referee compares: losses, gradients, weights and memory states of a few training steps.

`from_layout` makes it on the real path and gathers whole tensors on rank 0. `one_device.single_device` makes it with
nothing of parallel/.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope.batch import Batch
from hope.block import Block
from hope.config import ModelConfig
from hope.model import Model
from hope.optim.config import OptimConfig
from hope.optim.policy import learns
from parallel.compute.pipeline import mean_loss
from parallel.compute.replica import Replica
from parallel.layout.plan import Plan, plan_of_config
from parallel.start import groups


@dataclass
class Evidence:
    """`gradients` of the first step, before clipping, and `weights` (fp32 masters) after the last, by single-device
    name. A name may have several copies (replicated over ranks, or tied): all of them are kept and compared.
    `state_norms`: of all sequences' states after one more pass, by `LAYER NAME`; empty if no mixer offers any."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[str, list[Tensor]] = field(default_factory=dict)
    weights: dict[str, list[Tensor]] = field(default_factory=dict)
    state_norms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """The few steps that both sides make."""

    model: ModelConfig
    optim: OptimConfig
    precision: str
    grad_clip: float
    seed: int
    batches: list[Batch]


def clip_scale(norm: float, limit: float) -> float:
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0


@contextmanager
def state_squares(models: Sequence[Model]) -> Iterator[dict[str, Tensor]]:
    """Sums of squares of what the end states of mixers and of levels in context offer, by `LAYER NAME`, over every
    forward pass inside the block. A mixer that offers nothing has no entry."""
    total: dict[str, Tensor] = {}
    hooks = []

    def watch(layer: str) -> Any:
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            state = outputs[1]
            for name, values in (state.compared() if state is not None else {}).items():
                square = values.detach().double().square().sum().cpu()
                key = f"{layer}{name}"
                total[key] = total.get(key, torch.zeros((), dtype=torch.float64)) + square

        return hook

    for model in models:
        for name, block in model.blocks.items():
            assert isinstance(block, Block)
            hooks += [part.register_forward_hook(watch(f"{name} {own}")) for own, part in block.mixing().items()]
    try:
        yield total
    finally:
        for handle in hooks:
            handle.remove()


def from_layout(task: Task, replica: Replica, micro_batch: int) -> Evidence | None:
    """The same steps on the real path; whole tensors on rank 0, None elsewhere."""
    ranks, optimizer = replica.ranks, replica.optimizer
    found, plan = Evidence(), plan_of_config(task.model)
    for batch in task.batches:
        reports = replica.run(micro_batches(batch, micro_batch, ranks))
        replica.reduce()
        norm = math.sqrt(sum(n * n for n in optimizer.grad_norms().values()))
        loss = mean_loss(reports, ranks.device)
        found.losses.append(groups.loss_on_all_ranks(loss, ranks).item())
        found.grad_norms.append(norm)
        if len(found.losses) == 1:
            found.gradients = _gather(replica, plan, optimizer.gradient_pieces())
        optimizer.set_lr(task.optim.lr)
        optimizer.step(clip_scale(norm, task.grad_clip))
    found.weights = _gather(replica, plan, optimizer.master_pieces())
    # the first step communicates no gradient of what is frozen, nor `local` that of a level that is not due
    kept = [n for n in found.weights if task.optim.accumulate == "local" or not learns(n, task.optim)]
    found.gradients |= {name: found.gradients.get(name, []) for name in kept}
    with state_squares(replica.models) as squares:
        replica.run(micro_batches(task.batches[0], micro_batch, ranks), forward_only=True)
    everyone = _objects({layer: square.item() for layer, square in squares.items()}, ranks)
    for part in everyone:
        for layer, square in part.items():
            found.state_norms[layer] = found.state_norms.get(layer, 0.0) + square
    found.state_norms = {layer: math.sqrt(square) for layer, square in found.state_norms.items()}
    return found if ranks.rank == 0 else None


def micro_batches(batch: Batch, size: int, ranks: groups.Ranks) -> list[Batch]:
    """A data-parallel rank's contiguous share of the sequences, in micro-batches."""
    share = batch.tokens_TB.shape[1] // ranks.dp_size
    first = ranks.dp_rank * share
    return [batch.sequences(i, i + size).to(ranks.device) for i in range(first, first + share, size)]


def _objects(own: Any, ranks: groups.Ranks) -> list[Any]:
    """What every rank gave, on rank 0; [] elsewhere."""
    everyone: list[Any] = [None] * ranks.world_size
    dist.gather_object(own, everyone if ranks.rank == 0 else None)
    return everyone if ranks.rank == 0 else []


def _gather(replica: Replica, plan: Plan, pieces: Iterator[tuple[str, int, Tensor]]) -> dict[str, list[Tensor]]:
    """Whole tensors by name from flat (name, offset, values) pieces of all ranks: every copy there is."""
    ranks = replica.ranks
    shapes = {name: tuple(p.shape) for model in replica.models for name, p in model.named_parameters()}
    own = [(name, offset, values.detach().float().cpu()) for name, offset, values in pieces]
    shards: dict[tuple[str, int, int], tuple[tuple[int, ...], list[tuple[int, Tensor]]]] = {}
    everyone = _objects((ranks.tp_rank, ranks.pp_rank, shapes, own), ranks)
    for tp_rank, pp_rank, their_shapes, theirs in everyone:
        for name, offset, values in theirs:
            key = (name, pp_rank, tp_rank)
            shards.setdefault(key, (their_shapes[name], []))[1].append((offset, values))
    whole: dict[str, list[Tensor]] = {}
    copies: dict[tuple[str, int], list[Tensor]] = {}
    for (name, pp_rank, _), (shape, parts) in sorted(shards.items()):
        flat = torch.cat([values for _, values in sorted(parts, key=lambda part: part[0])])
        copies.setdefault((name, pp_rank), []).append(flat.view(shape))
    for (name, _), over_ranks in copies.items():
        layout = plan[name]
        whole.setdefault(name, []).extend(over_ranks if layout.dim is None else [layout.join(over_ranks)])
    return whole
