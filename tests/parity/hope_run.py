"""A tiny HOPE trained for a few steps in any layout, and by plain torch in one process; and how to compare the two."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models import named
from multirank import run_ranks

from hope.batch import Batch
from hope.config import CmsConfig, ModelConfig
from hope.memory.config import MemoryConfig
from hope.model import Model, next_token_loss
from hope.optim.config import OptimConfig
from hope.optim.dmgd import Dmgd
from hope.optim.levels import parameter_groups
from parallel.compute import gradients
from parallel.compute.pipeline import forward_backward, mean_loss, stages_of
from parallel.compute.tensor import shard_model, sharded_loss
from parallel.layout.plan import Plan, plan_of_config
from parallel.layout.stages import split
from parallel.layout.topology import ParallelConfig
from parallel.optimizer.zero import ZeroOptimizer
from parallel.start import groups

# In fp32 one process is itself up to 1e-5 away from float64 in the gradient of a gate's bias (a sum that cancels), by
# the seed; with this one it is 2.8e-6. With heads of 4 instead of 8 some vector of norm near 0 is normalised: 2e-4.
SEED, STEPS = 3, 4
GLOBAL_BATCH, MICRO, SEQ = 8, 2, 16
Tensors = dict[str, torch.Tensor]


def model_config(
    tied: bool = True, layers: int = 5, kind: str = "hope", memory: str = "matrix", static: str = "learned"
) -> ModelConfig:
    """Two CMS levels, the second due at step 3; memories written 4 times in a sequence."""
    memories = MemoryConfig(memory=memory, static=static, projection_chunk=4, main_chunk=8)
    cms = CmsConfig(periods=[1, 3], hidden=16)
    return named(kind, memory=memories, vocab_size=32, width=32, layers=layers, heads=4, tie_embeddings=tied, cms=cms)


def batch(step: int) -> Batch:
    """The global batch of a step; document starts differ from row to row."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, 32, (SEQ + 1, GLOBAL_BATCH), generator=generator)
    starts = torch.rand(SEQ, GLOBAL_BATCH, generator=generator) < 0.1
    starts[0] = True
    return Batch(tokens[:-1].contiguous(), tokens[1:].contiguous(), starts)


def micro_batches(step: int, rank: int, size: int) -> list[Batch]:
    """Data-parallel rank `rank`'s share of a global batch."""
    whole = batch(step)
    parts = [t.chunk(size, 1)[rank].split(MICRO, 1) for t in (whole.tokens_TB, whole.targets_TB, whole.starts_TB)]
    return [Batch(*(t.contiguous() for t in tensors)) for tensors in zip(*parts, strict=True)]


def step_fn(model: Model, hidden: torch.Tensor | None, part: Batch) -> Any:
    outputs, _ = model(part.tokens_TB if hidden is None else hidden, starts=part.starts_TB)
    if not model.has_head:
        return outputs
    tensor_ranks = model.config.vocab_size // outputs.shape[-1]
    loss = sharded_loss(outputs, part.targets_TB, tensor_ranks)
    return loss, {"loss": loss}


class Recording(Dmgd):
    """Keeps the gradients of the first step."""

    first: list[torch.Tensor] | None = None

    def step(self, closure: None = None) -> None:
        if self.first is None:
            self.first = [p.grad.detach().clone() for group in self.param_groups for p in group["params"]]
        super().step()


# With Adam's usual eps, elements whose gradient is rounding noise move by a whole learning rate in either direction.
OPTIM = OptimConfig(lr=3e-3, warmup=0, eps=1e-3)


class LayoutRun:
    """One rank of a training run in a layout."""

    def __init__(self, ranks: groups.Ranks, layout: ParallelConfig, config: ModelConfig, precision: str) -> None:
        self.ranks, self.layout = ranks, layout
        slices = split(config, SEQ, ranks.pp_size, ranks.vp_size)[ranks.pp_rank]
        self.models = [
            shard_model(Model(config, part).initialise(SEED), ranks.tp_rank, ranks.tp_size, layout.sequence)
            for part in slices
        ]
        tied = config.tie_embeddings and ranks.pp_size > 1
        place = {"tp_rank": ranks.tp_rank, "first_stage": ranks.first_stage, "tied": tied}
        self.inner = Recording(parameter_groups(self.models, 0.1), OPTIM)
        counts = lambda name, parameter: gradients.counted(name, parameter, **place)
        self.optimizer = ZeroOptimizer(self.models, self.inner, precision, ranks, counts=counts)
        self.stages = stages_of(self.models, precision, layout, config.width)

    def backward(self, step: int, step_fn: Callable = step_fn) -> float:
        """Accumulate and reduce the gradients of a step; the loss is the same number on every rank."""
        batches = micro_batches(step, self.ranks.dp_rank, self.ranks.dp_size)
        reports = forward_backward(self.stages, batches, step_fn)
        assert bool(reports) == self.ranks.last_stage
        self.optimizer.prepare()
        gradients.combine_over_tensor_ranks(
            self.models, self.optimizer.accumulated, self.layout.sequence, groups.tensor_group()
        )
        gradients.combine_tied_embeddings(self.models, self.optimizer.accumulated, groups.embedding_group(self.ranks))
        self.optimizer.reduce()
        return groups.loss_on_all_ranks(mean_loss(reports, self.ranks.device), self.ranks).item()

    def train(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(self.backward(step))
            self.optimizer.set_lr(OPTIM.lr)
            self.optimizer.step()
        return losses

    def weights(self) -> Tensors:
        return {n: p.detach().float().clone() for model in self.models for n, p in model.named_parameters()}

    def first_gradients(self) -> dict[str, list[tuple[int, torch.Tensor]]]:
        """This rank's partition: {name: [(offset in the flat parameter, values)]}."""
        found: dict[str, list[tuple[int, torch.Tensor]]] = {}
        assert self.inner.first is not None
        for flat, slices in zip(self.inner.first, self.optimizer.slices, strict=True):
            for piece in slices:
                found.setdefault(piece.name, []).append((piece.offset, flat[piece.start : piece.start + piece.numel]))
        return found


@dataclass
class Outcome:
    """What a run ends with; gradients of step 0 and final weights under single-device names and shapes."""

    losses: list[float]
    norms: dict[str, float]
    gradients: Tensors
    weights: Tensors


def worker(layout: ParallelConfig, config: ModelConfig, precision: str, steps: int) -> tuple:
    with groups.start(layout, timeout_s=60) as ranks:
        run = LayoutRun(ranks, layout, config, precision)
        first = run.backward(0)
        norms = run.optimizer.grad_norms()
        assert run.optimizer.first_nonfinite() is None
        run.optimizer.set_lr(OPTIM.lr)
        run.optimizer.step()
        losses = [first, *run.train(range(1, steps))]
        return ranks.dims.coordinates(ranks.rank), losses, norms, run.first_gradients(), run.weights()


def train_in_layout(
    layout: ParallelConfig, world: int, config: ModelConfig, precision: str = "fp32", steps: int = STEPS
) -> Outcome:
    """Run the layout in `world` processes and put its pieces together; ranks must agree where they hold the same."""
    results = run_ranks(worker, world, layout, config, precision, steps, timeout=120)
    losses, norms = results[0][1:3]
    assert all(result[1:3] == (losses, norms) for result in results)
    shards: dict[tuple[str, int], dict[int, torch.Tensor]] = {}
    weights: dict[tuple[str, int], torch.Tensor] = {}
    for (tensor, _, _), _, _, pieces, held in results:
        for name, values in pieces.items():
            shards.setdefault((name, tensor), {}).update(dict(values))
        for name, value in held.items():
            other = weights.setdefault((name, tensor), value)
            assert torch.equal(other, value), f"{name} differs between ranks that hold the same"
    flat = {key: torch.cat([parts[offset] for offset in sorted(parts)]) for key, parts in shards.items()}
    gradients = {key: value.view_as(weights[key]) for key, value in flat.items()}
    return Outcome(losses, norms, _joined(gradients, layout.tensor), _joined(weights, layout.tensor))


def _plan_of_all() -> Plan:
    """Of every model that a test here makes: their parameters of one name have one layout."""
    choices = [{}, {"tied": False}, {"memory": "mlp"}, {"static": "projected"}, {"kind": "hope_attention"}]
    models = [model_config(**choice) for choice in choices]
    return {name: layout for config in models for name, layout in plan_of_config(config).items()}


def _joined(shards: dict[tuple[str, int], torch.Tensor], tensor: int) -> Tensors:
    names, plan = dict.fromkeys(name for name, _ in shards), _plan_of_all()
    return {name: plan[name].join([shards[name, rank] for rank in range(tensor)]) for name in names}


def plain_torch(config: ModelConfig) -> Outcome:
    model = Model(config).initialise(SEED)
    optimizer = Recording(parameter_groups([model], 0.1), OPTIM)
    outcome = Outcome([], {}, {}, {})
    for step in range(STEPS):
        whole = batch(step)
        outputs, _ = model(whole.tokens_TB, starts=whole.starts_TB)
        loss = next_token_loss(outputs, whole.targets_TB)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = OPTIM.lr
            if step == 0:
                norm = float(torch.nn.utils.get_total_norm([p.grad for p in group["params"]]))
                outcome.norms[group["name"]] = norm if group["period"] == 1 else 0.0  # the others wait
        if step == 0:
            outcome.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        outcome.losses.append(loss.item())
    outcome.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return outcome


@functools.cache
def one_process(
    tied: bool = True, layers: int = 5, kind: str = "hope", memory: str = "matrix", static: str = "learned"
) -> Outcome:
    """The same training by plain torch: no schedule, no DeepSpeed, whole parameters, the whole batch at once."""
    return run_ranks(plain_torch, 1, model_config(tied, layers, kind, memory, static))[0]


def worst(found: Tensors, expected: Tensors) -> tuple[float, str]:
    """The largest |found - expected| / |expected| (L2 norms) of any parameter, and its name."""
    assert found.keys() == expected.keys()
    return max(
        (float((found[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)), name)
        for name in expected
    )


def overall(found: Tensors, expected: Tensors) -> float:
    """|found - expected| / |expected| over all parameters together."""
    apart = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (apart / sum(float(value.square().sum()) for value in expected.values())) ** 0.5
