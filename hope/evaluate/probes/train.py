"""Train a small model on a probe, and measure its accuracy against the bytes of its state."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hope.config import ModelConfig
from hope.evaluate.measures import Measure, mean, ratio
from hope.evaluate.probes.base import IGNORE, Example, Probe
from hope.evaluate.probes.flat import flatten
from hope.evaluate.probes.passes import Passes, asked
from hope.mixers.base import tensors_of
from hope.model import Model
from hope.optim.build import build_optimizer
from hope.optim.config import OptimConfig
from hope.optim.levels import parameter_groups
from hope.train.schedule import rate_at

TEST_SEED = 1 << 32
"""Added to a seed for the examples of the test: none of them is a training example."""


@dataclass(frozen=True)
class Plan:
    """One training run.

    Attributes:
        train: sizes, each with its number of examples; a step takes one of them, by their shares.
        clip: largest gradient norm.
    """

    train: Sequence[tuple[Probe, int]]
    steps: int
    batch: int
    seed: int
    clip: float = 1.0


def batch_of(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Tokens and targets, int64 [T, B]."""
    return tuple(  # type: ignore[return-value]
        torch.from_numpy(np.stack([np.asarray(part, np.int64) for part in parts], 1))
        for parts in zip(*examples, strict=True)
    )


def training_batch(plan: Plan, step: int) -> list[Example]:
    """The examples of step number `step`, counted from 1: a pure function of the plan and the step."""
    shares = np.array([count for _, count in plan.train], np.float64)
    rng = np.random.default_rng([plan.seed, step, 1])
    probe, count = plan.train[int(rng.choice(len(shares), p=shares / shares.sum()))]
    return [probe.example(plan.seed, int(index)) for index in rng.integers(0, count, plan.batch)]


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """Of all steps of a plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __len__(self) -> int:
        return self._plan.steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return batch_of(training_batch(self._plan, index + 1))


def batches(plan: Plan, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of all steps in order, made ahead by so many other processes: examples cost more than a GPU's step."""
    yield from DataLoader(_Batches(plan), batch_size=None, num_workers=workers)


def _workers(device: torch.device) -> int:
    return min(2, len(os.sched_getaffinity(0)) // 2) if device.type == "cuda" else 0


def train(
    config: ModelConfig,
    optim: OptimConfig,
    plan: Plan,
    device: torch.device,
    say: Callable[[int, float], object] = lambda step, loss: None,
) -> Model:
    """A model that has taken `plan.steps` steps; single process, fp32. `say` is told step and loss."""
    model = Model(config).initialise(plan.seed).to(device)
    groups = flatten(parameter_groups(model, optim.weight_decay, optim))
    optimizer = build_optimizer(groups, optim)
    passes = Passes(model, device)
    for step, batch in enumerate(batches(plan, _workers(device)), 1):
        loss = passes(asked(*batch, device))
        optimizer.clip(plan.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, optim, plan.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        say(step, loss.item())
    return model


@torch.no_grad()
def accuracy(model: Model, probe: Probe, seed: int, count: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Of `count` test examples: the share of targets and of whole examples that greedy choice gives, and the bytes of
    one sequence's state after the last token."""
    right: list[float] = []
    counts: list[int] = []
    state_bytes = 0
    for begin in range(0, count, batch):
        examples = [probe.example(seed + TEST_SEED, index) for index in range(begin, min(begin + batch, count))]
        tokens_TB, targets_TB = batch_of(examples)
        logits_TBV, states = model(tokens_TB.to(device))
        hits = (logits_TBV.argmax(-1).cpu() == targets_TB) & (targets_TB != IGNORE)
        right += hits.sum(0).double().tolist()
        counts += (targets_TB != IGNORE).sum(0).tolist()
        state_bytes = bytes_of(states) // len(examples)
    whole = mean([float(hit == count) for hit, count in zip(right, counts, strict=True)])
    measured: dict[str, Measure] = {"accuracy": ratio(right, counts), "whole": whole}
    return {name: measure.json() for name, measure in measured.items()} | {"state_bytes": state_bytes}


def bytes_of(states: Mapping[int, Any]) -> int:
    """Bytes of all tensors in the states of all blocks, each once."""
    found = {id(t): t for state in states.values() for t in tensors_of(state)}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def adamw(optim: OptimConfig, rate: float, weight_decay: float, steps: int) -> OptimConfig:
    """AdamW at this peak rate, with the schedule of `optim`, its warm-up a tenth of the steps at most."""
    warmup = min(optim.warmup, steps // 10)
    return dataclasses.replace(optim, name="adamw", lr=rate, weight_decay=weight_decay, warmup=warmup)
