"""The whole configuration: the sections, each owned by its package, put together, read and checked.

`python -m configs.schema` prints every key with its type, default and meaning.
"""

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from configs.errors import ConfigError
from configs.launch_section import LaunchConfig
from configs.merge import BAD, GUESS, Fitter, defaults, describe, leaves, missing_paths
from configs.source import apply_overrides, plain, read_yaml
from data_prep.config import DataConfig
from hope.config import ModelConfig
from hope.optim.config import OptimConfig
from hope.sections import Problem
from hope.train.config import CheckpointConfig, LogConfig, RunConfig, TrainConfig
from parallel.layout.topology import ParallelConfig


@dataclass(kw_only=True)
class Config:
    """One run. Sections without required keys may be left out of the file."""

    run: RunConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


def load(path: str, overrides: list[str], *, world_size: int | None = None, check: bool = True) -> Config:
    """Read `path`, apply `a.b=c` overrides and check everything that can be checked.

    With `world_size` (devices of the run) the `parallel` section is checked too. `check=False` checks only
    the structure (keys, types, required values), for tools that read the config of a finished run.
    Raises ConfigError with every problem at once; sections with a wrong key or type are not checked further.
    """
    problems: list[Problem] = []
    raw, lines = read_yaml(path, problems)
    if any(where == "(file)" for where, _, _ in problems):
        raise ConfigError(path, problems)
    texts = {key for key, hint, _, _ in leaves(Config) if hint is str}
    given = apply_overrides(raw, overrides, texts, problems)
    fitter = Fitter(Config, lines, given)
    good = fitter.fit(plain(raw), Config, "")
    problems += fitter.problems
    merged = OmegaConf.merge(defaults(Config), {} if good is BAD else good)
    assert isinstance(merged, DictConfig)
    problems += list(_unset(merged, _touched(problems)))
    sections = _whole_sections(merged, problems)
    if check:
        problems += _section_problems(sections, world_size)
    if problems:
        raise ConfigError(path, problems)
    return Config(**sections)


def validate(config: Config, world_size: int, source: str = "config") -> None:
    """Check every section for a run on `world_size` devices; raises ConfigError(source) with all problems."""
    sections = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    problems = list(_section_problems(sections, world_size))
    if problems:
        raise ConfigError(source, problems)


def to_yaml(config: Config) -> str:
    """The complete configuration as YAML; reading it back gives an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _touched(problems: list[Problem]) -> set[str]:
    """Paths that are known to be wrong, with the ones a misspelt key was probably meant for."""
    guesses = [fix.removeprefix(GUESS) for _, _, fix in problems if fix.startswith(GUESS)]
    meant = {path for guess in guesses for path in guess.split(" or ")}
    return meant | {where for where, _, _ in problems}


def _unset(merged: DictConfig, known: set[str]) -> Iterator[Problem]:
    """Required values that nobody gave, and `${...}` that lead nowhere or to a value of the wrong type."""
    for path in missing_paths(plain(merged)):
        if not any(path == where or path.startswith(f"{where}.") for where in known):
            yield Problem(path, "required, but not given", f"{path}=VALUE, or in the file")
    for path, hint, _, _ in leaves(Config):
        section, _, key = path.rpartition(".")
        try:
            value = OmegaConf.select(merged, section)[key]
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True)
        except MissingMandatoryValue:
            continue
        except (OmegaConfBaseException, ValueError) as error:
            yield Problem(path, str(error).splitlines()[0], describe(hint))


def _whole_sections(merged: DictConfig, problems: list[Problem]) -> dict[str, Any]:
    """The sections that nothing is wrong with, as dataclasses."""
    broken = {re.split(r"[.\[]", where)[0] for where in _touched(problems)}
    names = [item.name for item in dataclasses.fields(Config) if item.name not in broken]
    return {name: OmegaConf.to_object(merged[name]) for name in names}


def _section_problems(sections: dict[str, Any], world_size: int | None) -> Iterator[Problem]:
    """Problems of the sections given; one that needs another is skipped when that one is not there."""
    for name in ("run", "model", "optim", "train", "checkpoint", "log", "launch"):
        if name in sections:
            yield from sections[name].problems()
    model, data, optim, train = (sections.get(name) for name in ("model", "data", "optim", "train"))
    if model and data and train and min(model.vocab_size, train.seq_len) >= 1:
        yield from data.problems(model.vocab_size, train.seq_len)
    if optim and train and optim.warmup >= train.steps >= 1:
        what = f"{optim.warmup} steps of warm-up leave none of train.steps {train.steps} for the decay"
        yield Problem("optim.warmup", what, f"at most {train.steps - 1}; usual: {train.steps // 20}")
    if model and train and min(train.global_batch, train.seq_len) >= 1:
        yield from _token_periods(model, train.tokens_per_step)
    if "checkpoint" in sections:
        yield from _unknown_changes(sections["checkpoint"].on_change)
    parallel = sections.get("parallel")
    if world_size is not None and parallel and train and min(train.global_batch, train.micro_batch) >= 1:
        whole = model if model and min(model.heads, model.vocab_size, model.layers, model.width) >= 1 else None
        yield from parallel.problems(world_size, train.global_batch, train.micro_batch, whole, train.seq_len)


def _token_periods(model: ModelConfig, step: int) -> Iterator[Problem]:
    """Levels that are due after a number of tokens which no whole number of optimizer steps sees."""
    if model.cms.unit == "steps":
        return
    for number, period in enumerate(model.cms.periods):
        if period >= 1 and period % step:
            near = sorted({max(1, period // step) * step, -(-period // step) * step})
            what = f"{period:,} tokens are not a multiple of the {step:,} of a step (train.global_batch x seq_len)"
            yield Problem(f"model.cms.periods[{number}]", what, " or ".join(map(str, near)))


def _unknown_changes(on_change: dict[str, str]) -> Iterator[Problem]:
    """Keys of checkpoint.on_change must be those of the configuration, its sections, or `all`."""
    paths = [path for path, *_ in leaves(Config)]
    known = {"all", *paths, *(path.rsplit(".", n)[0] for path in paths for n in (1, 2))}
    for key in on_change:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            yield Problem(
                "checkpoint.on_change", f"{key} is no key or section", f"{GUESS}{near[0]}" if near else "optim.lr"
            )


if __name__ == "__main__":
    from configs.reference import key_table

    sys.stdout.write(key_table(Config))
