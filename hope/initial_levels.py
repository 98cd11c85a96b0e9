"""The MLPs of a trained model as levels of a new one (Nested Learning, Section 7.3): which becomes which.

The paper sets MLP_0^(f_i) = MLP_pretrained_i and does not say which MLP gets which clock. Here `model.init_levels` says
it, within a block: the l-th number is the level that the origin's level l becomes. A level that nothing is placed in
starts as the identity, because its last map is zero. So the function is the same wherever the levels are placed:

    sequential (Eq. 70)     y <- y + f_new(norm y) = y, before, between or behind the origin's
    independent (Eq. 74)    x + sum_l w_l f_l(norm_l x), where a new level adds nothing to the sum

One MLP can also be divided: K independent levels of H / K hidden units each, whose sum is the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hope.config import INIT_WORDS, ModelConfig
from hope.memory.in_context_config import InContextConfig, Sizes
from hope.sections import Problem


def split(source: ModelConfig, target: ModelConfig) -> bool:
    """Whether the one MLP of `source` becomes the independent levels of `target`, a part of its hidden units each."""
    parts = len(target.periods)
    return (
        parts > 1
        and len(source.periods) == 1
        and target.cms.variant == "independent"
        and _same_chain(source, target)
        and source.cms.chain == "sequential"
        and parts * target.hidden_per_level() == source.hidden_per_level()
    )


def places(source: ModelConfig, target: ModelConfig) -> list[int]:
    """The level of `target` that each level of `source` becomes."""
    return list(range(len(source.periods))) if target.init_levels is None else list(target.init_levels)


def level_problems(source: ModelConfig, target: ModelConfig) -> Iterator[Problem]:
    """Levels of `target`, of the width of `source`, that would compute something else."""
    yield from _in_context(source, target)
    hidden, count, wanted = source.hidden_per_level(), len(source.periods), len(target.periods)
    if split(source, target):
        if target.init_levels is not None:
            what = f"{target.init_levels}, and the MLP of model.init is divided over all {wanted} levels"
            yield Problem("model.init_levels", what, f"leave it out, or model.cms.hidden={hidden} to place it whole")
    elif not _same_chain(source, target) or hidden != target.hidden_per_level() or count > wanted:
        yield _another_chain(source, target)
    elif not _placed(places(source, target), count, wanted):
        what = f"{target.init_levels} does not place the {count} levels of model.init, in their order, in {wanted}"
        fix = f"{count} of the numbers 0 to {wanted - 1}, such as {list(range(wanted - count, wanted))}; or null"
        yield Problem("model.init_levels", what, fix)


def level_value(
    name: str, level: int, weights: Mapping[str, Tensor], source: ModelConfig, target: ModelConfig
) -> Tensor | None:
    """What a parameter of `target`'s level number `level` starts from; None: what it was drawn as.

    name: such as `blocks.0.cms.levels.1.mlp.down.weight`; weights: of the model of `source`.
    """
    named = lambda number: weights[name.replace(f".cms.levels.{level}.", f".cms.levels.{number}.")]
    if split(source, target):
        whole, dim = named(0), 1 if name.endswith("down.weight") else 0
        return whole if name.endswith("norm.weight") else whole.chunk(len(target.periods), dim)[level]
    found = places(source, target)
    if level in found:
        return named(found.index(level))
    return torch.zeros(()) if name.endswith("mlp.down.weight") else None  # the identity until its first update


def aggregate_value(name: str, weights: Mapping[str, Tensor], source: ModelConfig, target: ModelConfig) -> Tensor:
    """The scalars of independent levels: the origin's where it has some, 1 for new levels and for one MLP.

    name: such as `blocks.0.cms.aggregate`: levels in context, then the others.
    """
    before, after = len(source.cms.groups), len(target.cms.groups)
    value = torch.ones(after + len(target.periods))
    if name in weights:
        old = weights[name]
        value = value.to(old)
        value[:before] = old[:before]  # none, or the same ones
        value[[after + place for place in places(source, target)]] = old[before:]
    return value


def _placed(found: list[int], count: int, wanted: int) -> bool:
    """Whether these are `count` levels of `wanted`, in order."""
    return len(found) == count and found == sorted(set(found)) and found[0] >= 0 and found[-1] < wanted


def _same_chain(source: ModelConfig, target: ModelConfig) -> bool:
    """Whether levels are put together alike. One MLP alone is a chain of either kind."""
    old, new = source.cms, target.cms
    alone = old.chain == "sequential" and len(source.periods) == 1 and not old.in_context
    return old.chain == new.chain or alone


def _another_chain(source: ModelConfig, target: ModelConfig) -> Problem:
    old, new = source.cms, target.cms
    hidden, count = source.hidden_per_level(), len(source.periods)
    what = (
        f"{len(target.periods)} {new.chain} of hidden width {target.hidden_per_level()}, and model.init has {count} "
        f"{old.chain} of {hidden}: the chain would compute something else"
    )
    fix = f"model.cms.variant={old.variant} model.cms.hidden={hidden} and {count} periods or more"
    parts = [k for k in range(2, 9) if hidden % k == 0]
    if parts and count == 1 and not old.in_context:
        fix += f"; or model.cms.variant=independent with K periods and model.cms.hidden={hidden}/K, K of {parts}"
    return Problem("model.cms", what, fix)


def _in_context(source: ModelConfig, target: ModelConfig) -> Iterator[Problem]:
    """Levels in context can be added to a model without any: they add nothing until their first update. Those of a
    model that has some keep their weights, and with the word `settings` may be rewritten in another way, or at all."""
    old, new = source.cms, target.cms
    if not old.in_context or (old.groups == new.groups and _sizes(source) == _sizes(target)):
        return
    same_weights = [*map(len, old.groups)] == [*map(len, new.groups)] and _sizes(source) == _sizes(target)
    if same_weights and "settings" in target.init_allow:
        return
    what = f"{_told(target)}, and model.init has {_told(source)}: the chain would compute something else"
    fix = "those of model.init" + (f"; or {allow(target, 'settings')}" if same_weights else "")
    yield Problem("model.cms.in_context", what, fix)


def allow(config: ModelConfig, word: str) -> str:
    """The setting that allows `word` beside what `config` allows."""
    words = [known for known in INIT_WORDS if known == word or known in config.init_allow]
    return f"model.init_allow=[{', '.join(words)}]"


def _sizes(config: ModelConfig) -> list[Sizes]:
    return [Sizes.of(level, config.width, config.heads) for level in config.cms.in_context]


def _told(config: ModelConfig) -> str:
    """Their number, variant, chunks, and whatever else an entry says."""
    levels = [{key: value for key, value in dataclasses.asdict(level).items() if value != getattr(_USUAL, key)}
              for level in config.cms.in_context]  # fmt: skip
    entries = [f"{{{', '.join(f'{key}: {value}' for key, value in level.items())}}}" for level in levels]
    return f"{len(entries)} {config.cms.variant} levels {', '.join(entries)}" if entries else "no levels"


_USUAL = InContextConfig()
