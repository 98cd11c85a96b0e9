"""How one parameter is updated: which rule, clock, rate, decay and averages.

It follows from what the parameter declares where it is made, and from `optim`; the first entry of `optim.groups` whose
pattern matches its name makes exceptions. Parameters with equal policies share a group (hope/optim/levels.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from hope.config import ModelConfig
from hope.model import Model
from hope.optim.config import OptimConfig
from hope.optim.group_config import GroupConfig
from hope.parameters import Declaration, declarations
from hope.sections import Problem

MATRIX_OPTIMIZERS = ("muon", "m3")


@dataclass(frozen=True)
class Policy:
    """Of one parameter, and of every other one in the group `name`."""

    name: str
    """LEVEL, then what sets it apart in its level: `base`, `cms1.undecayed`, `base.matrices.group0`."""
    period: int
    """Clock in steps."""
    matrices: bool
    """Whether the matrix optimizer takes it."""
    head_rows: int
    """Rows of a head, where it is orthogonalised a head at a time; 0: whole, or a stack of heads anyway."""
    vectors: bool
    """Whether it has one dimension."""
    rate: float
    """Factor on the scheduled learning rate, whose peak is `optim.lr`."""
    weight_decay: float
    """Decoupled decay, times the learning rate."""
    beta1: float | None
    """None: as configured for all."""
    beta2: float | None
    """None: as configured for all."""


def policy_of(
    name: str,
    parameter: nn.Parameter,
    declared: Declaration,
    level: str,
    period: int,
    optim: OptimConfig | None,
    weight_decay: float,
) -> Policy:
    """The policy of the parameter `name`, in `level` ("base", "cms0", ...) with its clock of `period` steps.

    `optim` None: every group is as one element-wise optimizer without choices of its own has it.
    """
    optim = optim or OptimConfig()
    number = first_match(name, optim)
    said = GroupConfig(match=name) if number is None else optim.groups[number]
    apart, vectors = optim.name in MATRIX_OPTIMIZERS, parameter.ndim < 2
    elementwise = (said.rule or ("elementwise" if declared.update == "elementwise" else "matrix")) == "elementwise"
    matrices = apart and not elementwise
    per_head = matrices and optim.matrices.per_head and declared.head_rows is not None
    rate = said.rate * float(period) ** optim.level_rate
    words = [level, *(["matrices"] if matrices else ["undecayed"] if vectors else [])]
    if per_head:
        words.append(f"heads_of_{declared.head_rows}")
    if elementwise and optim.lr_elementwise is not None:
        rate *= optim.lr_elementwise / optim.lr
        words += ["elementwise"] if not apart and not vectors else []
    words += [] if number is None else [f"group{number}"]
    decay = said.weight_decay if said.weight_decay is not None else 0.0 if vectors else weight_decay
    return Policy(
        ".".join(words),
        period,
        matrices,
        (declared.head_rows or 0) if per_head else 0,
        vectors,
        rate,
        decay,
        said.beta1,
        said.beta2,
    )


def first_match(name: str, optim: OptimConfig) -> int | None:
    """Number of the entry of `optim.groups` that a parameter's name follows, or None."""
    return next((i for i, group in enumerate(optim.groups) if fnmatchcase(name, group.match)), None)


def learns(name: str, optim: OptimConfig) -> bool:
    """Whether the parameter `name` takes steps: none do whose entry of `optim.groups` has rate 0."""
    number = first_match(name, optim)
    return number is None or optim.groups[number].rate > 0


def group_problems(config: ModelConfig, optim: OptimConfig, path: str = "optim.groups") -> Iterator[Problem]:
    """What of `optim.groups` does not fit this model, whose section is sound: patterns, and what would do nothing."""
    if not optim.groups:
        return
    with torch.device("meta"):
        known = {name: (parameter, declared) for name, parameter, declared in declarations(Model(config))}
    taken: dict[int | None, list[str]] = {}
    for name in known:
        taken.setdefault(first_match(name, optim), []).append(name)
    if all(number is not None and optim.groups[number].rate == 0 for number in taken):
        what = f"freezes all {len(known)} parameters, and nothing would learn"
        yield Problem(path, what, 'a first entry for what learns, such as {match: "*.cms.levels.0.*"}')
    for number, group in enumerate(optim.groups):
        where = f"{path}[{number}]"
        later = optim.groups[number + 1 :]
        kept = any(fnmatchcase(name, entry.match) for name in taken.get(number, []) for entry in later)
        if number in taken and group.changes_nothing and later and not kept:
            fix = "give rule, rate, weight_decay, beta1 or beta2; or leave it out"
            yield Problem(where, "changes nothing, and keeps nothing out of a later entry", fix)
        elif number in taken:
            yield from _rule_problems(where, group, {name: known[name] for name in taken[number]}, config, optim)
        elif matching := [name for name in known if fnmatchcase(name, group.match)]:
            first = sorted({first_match(name, optim) or 0 for name in matching})
            what = f"{group.match} matches only names that {' and '.join(f'{path}[{i}]' for i in first)} take first"
            yield Problem(f"{where}.match", what, "put it before them, or leave it out")
        else:
            near = difflib.get_close_matches(group.match, known, n=3, cutoff=0.3) or list(known)[:3]
            yield Problem(f"{where}.match", f"{group.match} matches no parameter", "near: " + ", ".join(near))


def _rule_problems(
    where: str,
    group: GroupConfig,
    members: dict[str, tuple[nn.Parameter, Declaration]],
    config: ModelConfig,
    optim: OptimConfig,
) -> Iterator[Problem]:
    """Rules that cannot be applied, and numbers that no update would look at."""
    apart = optim.name in MATRIX_OPTIMIZERS
    if group.rule and not apart:
        what = f"{group.rule} is no choice: optim.name={optim.name} updates everything element by element"
        yield Problem(f"{where}.rule", what, "leave it out, or optim.name=muon or m3")
        return
    refused = {}
    if group.rule == "matrix":
        refused = {name: why for name, (p, d) in members.items() if (why := _no_matrix(name, p, d, config))}
    for name, why in list(refused.items())[:1]:
        yield Problem(f"{where}.rule", f"{name} cannot be updated as a matrix: {why}", "a narrower match")
    matrices = [apart and (group.rule or d.update) not in (None, "elementwise") for _, d in members.values()]
    if group.beta2 is not None:
        squares = optim.name == "m3" or optim.elementwise.preconditioner == "adam"
        if not squares or (optim.name == "muon" and all(matrices)):
            what = f"{group.beta2} is not used: no parameter that it matches has an average of squares"
            yield Problem(f"{where}.beta2", what, "leave it out")


def _no_matrix(name: str, parameter: nn.Parameter, declared: Declaration, config: ModelConfig) -> str:
    """Why a parameter cannot go to the owner of whole matrices; nothing if it can."""
    if parameter.ndim not in (2, 3):
        return f"it has the shape {tuple(parameter.shape)}"
    if declared.cut is None:
        return "tensor-parallel ranks have copies, whose gradients are added up first"
    if config.tie_embeddings and name == "embedding.weight":
        return "it is the head too, and pipeline stages add up its two gradients first"
    return ""
