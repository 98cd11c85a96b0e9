"""One process's part of a model replica: its slices and shards, its stages, its share of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hope.batch import Batch
from hope.config import ModelConfig
from hope.initial import Start
from hope.model import Model
from hope.optim.build import build_optimizer
from hope.optim.config import OptimConfig
from hope.optim.levels import parameter_groups
from hope.optim.policy import MATRIX_OPTIMIZERS, learns
from parallel.compute import gradients
from parallel.compute.graphs import Graphs, graphs_for
from parallel.compute.pipeline import Report, Stage, StepFn, forward_backward, stages_of
from parallel.compute.stage_graphs import StageGraphs
from parallel.compute.stream import CarriedStates
from parallel.compute.tensor import shard_model, sharded_loss
from parallel.layout.stages import split
from parallel.layout.topology import ParallelConfig
from parallel.optimizer.matrix_zero import MatrixZeroOptimizer
from parallel.optimizer.sharded import ShardedOptimizer
from parallel.optimizer.zero import ZeroOptimizer
from parallel.start import groups

EMBEDDING = "embedding.weight"
"""Of a tied embedding's copies on the first and the last pipeline stage too."""


@dataclass(frozen=True)
class Replica:
    """What a rank computes with."""

    models: list[Model]
    stages: list[Stage]
    optimizer: ShardedOptimizer
    ranks: groups.Ranks
    layout: ParallelConfig
    stage_step: StepFn
    carried_step: StepFn
    graphs: Graphs | StageGraphs | None = None
    carried: CarriedStates | None = None
    learns_embedding: bool = True

    def run(
        self, batches: Sequence[Batch], forward_only: bool = False, phase: Callable[[str], object] | None = None
    ) -> list[Report]:
        """Micro-batches through the schedule; gradients are accumulated. Reports on the last stage, else [].

        With `carried` they go on from its states, and whoever runs a step says whether to `keep` those after it. Passes
        that are `forward_only` begin anew, and leave them alone.
        """
        step_fn = self.stage_step
        if self.carried is not None and not forward_only:
            self.carried.begin()
            step_fn = self.carried_step
        scheduled = lambda step_fn: forward_backward(self.stages, batches, step_fn, forward_only, phase)
        if self.graphs is None or forward_only:
            return scheduled(step_fn)
        return self.graphs.run(self.models, batches, scheduled, phase)

    def close(self) -> None:
        """Let go of what would outlive this: the optimizer's hooks, and graphs that use the ranks' groups.

        Before the groups end: NCCL destroys no communicator that a graph still uses, and waits without an end.
        """
        if self.graphs is not None:
            self.graphs.close()
        self.optimizer.close()

    def reduce(self) -> None:
        """All sums of gradients: over tensor ranks and tied copies as the plan says, then over data-parallel ranks.

        Once per step, after `run`. Collective.
        """
        self.optimizer.prepare()
        accumulated = self.optimizer.accumulated
        gradients.combine_over_tensor_ranks(self.models, accumulated, self.layout.sequence, groups.tensor_group())
        if self.learns_embedding:
            gradients.combine_tied_embeddings(self.models, accumulated, groups.embedding_group(self.ranks))
        self.optimizer.reduce()


def build_replica(
    config: ModelConfig,
    optim: OptimConfig,
    layout: ParallelConfig,
    ranks: groups.Ranks,
    *,
    seq_len: int,
    precision: str,
    seed: int,
    recompute: str = "none",
    tokens_per_step: int | None = None,
    loss_chunk: int | None = None,
    compile: str = "none",
    cuda_graphs: bool = False,
    start: Start | None = None,
    carry: bool = False,
) -> Replica:
    """Build this rank's slices on full shapes, fill them from (seed, name), cut them, give them to the optimizer.

    start: weights of a trained model that replace those that were drawn.
    carry: every micro-batch goes on from the states of the step before.

    Raises:
        CannotCompile, CannotCapture: `compile` or `cuda_graphs` asks for what this machine has not got.
    """
    begin_anew = lambda model, inputs, starts: model.trunk(inputs, starts=starts, keep_state=False)[0]
    stage_step = _stage_step(loss_chunk, ranks.tp_size, begin_anew)
    graphs = graphs_for(cuda_graphs, stage_step, ranks.device, ranks.pp_size)
    parts = split(config, seq_len, ranks.pp_size, ranks.vp_size)[ranks.pp_rank]
    models = []
    for part in parts:
        model = Model(config, part).initialise(seed)
        if start is not None:
            start.fill(model)
        model.set_recompute(recompute)
        model.set_compile(compile, ranks.device.type)
        models.append(shard_model(model, ranks.tp_rank, ranks.tp_size, layout.sequence).to(ranks.device))
    levels = parameter_groups(models, optim.weight_decay, optim, tokens_per_step)
    optimizer = _sharded_optimizer(models, levels, optim, layout, ranks, precision)
    stages = stages_of(models, precision, layout, config.width)
    carried = CarriedStates(models) if carry else None
    carried_step = _stage_step(loss_chunk, ranks.tp_size, carried.trunk) if carried else stage_step
    embedding = learns(EMBEDDING, optim)
    return Replica(models, stages, optimizer, ranks, layout, stage_step, carried_step, graphs, carried, embedding)


def _stage_step(
    loss_chunk: int | None, tp_size: int, trunk: Callable[[Model, Tensor, Tensor | None], Tensor]
) -> StepFn:
    """What a stage computes of a micro-batch, for `forward_backward`. `trunk`: of (model, inputs, starts)."""

    def step(model: Model, hidden: Tensor | None, batch: Batch) -> Tensor | tuple[Tensor, Report]:
        inputs = batch.tokens_TB if model.has_embedding else hidden
        assert inputs is not None
        outputs = trunk(model, inputs, batch.starts_TB)
        if not model.has_head:
            return outputs
        scores = model.vocabulary.scores(outputs, loss_chunk)
        loss = sharded_loss(scores, batch.targets_TB, tp_size, batch.weights_TB)
        return loss, {"loss": loss}

    return step


def _sharded_optimizer(
    models: list[Model],
    levels: list[dict[str, Any]],
    optim: OptimConfig,
    layout: ParallelConfig,
    ranks: groups.Ranks,
    precision: str,
) -> ShardedOptimizer:
    """Owners of whole matrices where the configured optimizer has matrices, else ZeRO-1 alone."""
    tied = models[0].config.tie_embeddings and ranks.pp_size > 1

    def counts(name: str, parameter: torch.nn.Parameter) -> bool:
        return gradients.counted(name, parameter, tp_rank=ranks.tp_rank, first_stage=ranks.first_stage, tied=tied)

    def combine(sums: gradients.Accumulated) -> None:
        gradients.combine_over_tensor_ranks(models, sums, layout.sequence, groups.tensor_group())

    if optim.name in MATRIX_OPTIMIZERS:  # also where this rank has no matrix: others wait for it
        return MatrixZeroOptimizer(
            models, levels, optim, precision, ranks, zero=layout.zero, counts=counts, combine=combine
        )
    inner = build_optimizer(levels, optim)
    return ZeroOptimizer(models, inner, precision, ranks, zero=layout.zero, counts=counts, combine=combine)
