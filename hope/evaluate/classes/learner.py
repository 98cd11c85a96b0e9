"""A copy of a trained model that learns one task after another, and what it answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from hope.config import ModelConfig
from hope.evaluate.classes.data import Example
from hope.evaluate.classes.stream import Prompts, batches
from hope.evaluate.errors import EvaluationError
from hope.evaluate.probes.passes import asked, one_pass
from hope.evaluate.rows import Alone, ListedRows, score_rows
from hope.evaluate.scorer import ModelScorer
from hope.evaluate.tasks import reduce_pair
from hope.model import Model
from hope.optim.build import build_optimizer
from hope.optim.config import OptimConfig
from hope.optim.group_config import GroupConfig
from hope.optim.levels import parameter_groups
from hope.optim.policy import group_problems, learns
from hope.parameters import declarations

CLIP = 1.0
"""Largest norm of a gradient."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a task is learned.

    Attributes:
        rate: AdamW's, constant.
        batch: examples of a step.
        epochs: passes over a task's examples; 0: nothing is learned.
        learn: patterns of the names of parameters that learn; empty: all do.
        periods: clocks of the levels in steps; None: the model's own.
        batch_tokens: places of a batch of answers.
    """

    rate: float
    batch: int
    epochs: int
    learn: tuple[str, ...]
    periods: tuple[int, ...] | None
    batch_tokens: int

    def steps(self, examples: int) -> int:
        """Optimizer steps for a task of so many examples."""
        return self.epochs * -(-examples // self.batch)


def optim_of(plan: Plan) -> OptimConfig:
    """AdamW at a constant rate, without decay; what `learn` does not name is frozen."""
    groups = [GroupConfig(match=pattern) for pattern in plan.learn]
    groups += [GroupConfig(match="*", rate=0.0)] if groups else []
    return OptimConfig(name="adamw", lr=plan.rate, warmup=0, decay="constant", weight_decay=0.0, groups=groups)


def model_of(config: ModelConfig, plan: Plan, steps: int) -> ModelConfig:
    """`config` with the clocks of the plan.

    Args:
        steps: of a whole stream of tasks.

    Raises:
        EvaluationError: the clocks do not fit, a pattern of `learn` matches nothing, or nothing would move.
    """
    cms = config.cms
    if plan.periods is not None:
        if len(plan.periods) != len(cms.periods):
            raise EvaluationError(f"--periods has {len(plan.periods)} numbers, the model {len(cms.periods)} levels")
        cms = dataclasses.replace(cms, periods=list(plan.periods), unit="steps")
    elif cms.unit == "tokens":
        what = f"the model's clocks {cms.periods} count tokens, and steps here have no fixed number of them"
        raise EvaluationError(f"{what}; --periods {' '.join('1' for _ in cms.periods)} gives them in steps")
    changed = dataclasses.replace(config, cms=cms)
    problems = [*cms.problems("--periods"), *group_problems(changed, optim_of(plan), "--learn")]
    if problems:
        # of the section only the periods can be wrong, which an option gives
        told = (f"{p.path.removesuffix('.periods')}: {p.what}; {p.fix}" for p in problems)
        raise EvaluationError("; ".join(told))
    _refuse_idle_levels(changed, plan, steps)
    return changed


def _refuse_idle_levels(config: ModelConfig, plan: Plan, steps: int) -> None:
    optim = optim_of(plan)
    with torch.device("meta"):
        names = [name for name, _, _ in declarations(Model(config)) if learns(name, optim)]
    for number, period in enumerate(config.periods):
        if plan.epochs and period > steps and any(f".cms.levels.{number}." in name for name in names):
            what = f"level {number} has a period of {period} steps, and all tasks together have {steps}"
            raise EvaluationError(f"{what}: it would never move; a smaller one of --periods, or more --epochs")


class Learner:
    """The model of `config`, from `weights`, on one device in fp32. One optimizer sees all tasks: its moments and the
    clocks of the levels go on from task to task, as nobody tells it where one ends."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, torch.Tensor], plan: Plan, prompts: Prompts,
                 device: torch.device) -> None:  # fmt: skip
        self.model = Model(config)
        self.model.load_state_dict(weights)  # copies: those of a checkpoint are mapped
        self.model.to(device)
        self._plan, self._prompts, self._device, self._steps = plan, prompts, device, 0
        optim = optim_of(plan)
        self._optimizer = build_optimizer(parameter_groups(self.model, optim.weight_decay, optim), optim)

    def learn(self, examples: Sequence[Example], seed: Sequence[int], say: Callable[[int, float], object]) -> None:
        """A task's examples, in orders that `seed` draws. `say` is told step, from 1, and loss.

        Raises:
            EvaluationError: the loss is not finite.
        """
        plan = self._plan
        drawn = batches(examples, self._prompts, plan.batch, plan.epochs, seed)
        for step, (tokens_TB, targets_TB) in enumerate(drawn, 1):
            loss = one_pass(self.model, asked(tokens_TB, targets_TB, self._device)).item()
            self._refuse_divergence("the loss is", loss)
            self._optimizer.clip(CLIP)
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._steps += 1
            say(step, loss)

    def right(self, examples: Sequence[Example], labels: Sequence[str], say: Callable[[int, int], object]) -> int:
        """How many examples have their own class as the most probable of `labels`. `say`: rows done, of how many.

        Raises:
            EvaluationError: a probability is not finite: the last step, whose loss nobody has seen, was too large.
        """
        rows = ListedRows([self._prompts.row(example.text, label) for example in examples for label in labels])
        scorer = ModelScorer(self.model, device=self._device)
        nats = torch.empty(len(rows.lengths), dtype=torch.float64)
        done = 0
        answers = score_rows(rows, scorer, reduce_pair, batch_tokens=self._plan.batch_tokens, share=Alone())
        for found in answers:
            for index, values in found.items():
                nats[index] = values[0]
            done += len(found)
            say(done, len(nats))
        self._refuse_divergence("answers are", nats.sum().item())
        chosen = nats.view(len(examples), len(labels)).argmin(1).tolist()
        return sum(labels[index] == example.label for index, example in zip(chosen, examples, strict=True))

    def _refuse_divergence(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            cure = f"a lower --rate than {self._plan.rate:g}"
            raise EvaluationError(f"{what} {value} after step {self._steps}; {cure}")
