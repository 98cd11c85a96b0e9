"""Generation with a model that is cut over tensor-parallel ranks: each rank computes its heads and its part of the
vocabulary, and all of them see the scores of the whole vocabulary."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from hope.generate.errors import GenerationError
from hope.generate.loop import Forward
from hope.model import Model, States
from parallel.compute.tensor import shard_model
from parallel.layout.advice import divisors
from parallel.layout.topology import ParallelConfig
from parallel.start import groups


def on_tensor_ranks(model: Model, ranks: groups.Ranks) -> Forward:
    """What the whole `model` computes, of which this rank keeps its part, in place. All ranks call it together.

    Raises:
        GenerationError: the model does not divide over the ranks; the message says over how many it does.
    """
    size = ranks.tp_size
    problems = list(ParallelConfig(tensor=size).problems(size, 1, 1, model.config))
    if problems:
        config = model.config
        fits = divisors(math.gcd(config.heads, config.vocab_size, config.hidden_per_level()))
        raise GenerationError(
            f"this model cannot be cut over {size} processes: {'; '.join(problem.what for problem in problems)}; "
            f"start {' or '.join(map(str, fits))}"
        )
    part = shard_model(model, ranks.tp_rank, size).to(ranks.device)
    group = groups.tensor_group()

    def forward(tokens_TB: Tensor, state: States | None, starts_TB: Tensor | None) -> tuple[Tensor, States]:
        scores, after = part(tokens_TB, state, starts_TB, last_only=True)
        own = scores[-1].to(torch.promote_types(scores.dtype, torch.float32)).contiguous()
        parts = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(parts, own, group=group)
        return torch.cat(parts, -1), after

    return forward
