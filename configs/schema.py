"""The whole configuration: the sections, each owned by its package, put together, read and checked.

`python -m configs.schema` prints every key with its type, default and meaning.
"""

import dataclasses
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from configs.checks import section_problems
from configs.errors import ConfigError
from configs.given import Given, gather
from configs.launch_section import LaunchConfig
from configs.merge import BAD, GUESS, Fitter, defaults, describe, missing_paths, only_named
from configs.renamed import refuse_old
from configs.source import plain
from configs.tree import UNKNOWN, leaves
from configs.usable import largest
from configs.used import recorded, unused_given
from data_prep.config import DataConfig
from hope.config import ModelConfig, import_modules
from hope.matched import match
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


def load(path: str, words: Sequence[str], *, world_size: int | None = None, check: bool = True) -> Config:
    """Read `path`, apply `a.b=c` overrides and further YAML files in order, and check everything that can be checked.

    With `world_size` (devices of the run) the `parallel` section is checked too. `check=False` checks only the
    structure (keys, types, required values, keys that nothing uses), for tools that read the config of a finished run.

    Raises:
        ConfigError: with every problem at once; sections with a wrong key or type are not checked further.
    """
    problems = list(_import_mixers(path, words))
    given = gather(path, words, {key.path for key in leaves(Config) if key.hint is str}, problems)
    if not given.readable:
        raise ConfigError(path, [problem for problem in problems if problem.path == "(file)"])
    values = plain(given.values)
    problems += refuse_old(values, given.place)
    fitter = Fitter(Config, given.place, largest)
    good = fitter.fit(values, Config, "")
    problems += fitter.problems
    merged = OmegaConf.merge(defaults(Config), {} if good is BAD else good)
    assert isinstance(merged, DictConfig)
    problems += list(_unset(merged, _touched(problems)))
    sections = _whole_sections(merged, problems)
    problems += _unused(merged, {} if good is BAD else good, given, _touched(problems))
    problems += _matched(sections)
    if check:
        problems += section_problems(sections, world_size, [key.path for key in leaves(Config)])
    if problems:
        raise ConfigError(path, problems)
    return Config(**sections)


def validate(config: Config, world_size: int | None, source: str = "config") -> None:
    """Check every section for a run on `world_size` devices, but for the layout if that is None.

    Raises:
        ConfigError: of `source`, with all problems.
    """
    sections = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    problems = list(section_problems(sections, world_size, [key.path for key in leaves(Config)]))
    if problems:
        raise ConfigError(source, problems)


def validate_without_data(config: Config, world_size: int | None, source: str = "config") -> list[Problem]:
    """Check every section but for the data files, which may be elsewhere; returns what is wrong with those.

    Raises:
        ConfigError: with all other problems.
    """
    try:
        validate(config, world_size, source)
    except ConfigError as error:
        data = [problem for problem in error.problems if problem.path.startswith("data.")]
        if len(data) < len(error.problems):
            raise ConfigError(source, [problem for problem in error.problems if problem not in data]) from None
        return data
    return []


def to_yaml(config: Config) -> str:
    """Every key that the configuration uses, as YAML; reading it back gives an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.create(recorded(config)))


def of_record(record: Mapping[str, Any]) -> Config:
    """The configuration that `recorded` gave, defaults for what is missing.

    Raises:
        omegaconf.errors.OmegaConfBaseException: a key is unknown, or a value of the wrong type.
    """
    merged = OmegaConf.merge(defaults(Config), record)
    assert isinstance(merged, DictConfig)
    return Config(**_whole_sections(merged, []))


def _import_mixers(path: str, words: Sequence[str]) -> Iterator[Problem]:
    """Import what registers mixers, before anything asks which there are."""
    given = gather(path, words, set(), []).values
    found = OmegaConf.select(given, "model.imports", throw_on_resolution_failure=False)
    try:
        names = OmegaConf.to_container(found, resolve=True) if isinstance(found, ListConfig) else []
    except (OmegaConfBaseException, ValueError):  # told below, as of any key
        names = []
    for name in filter(lambda name: isinstance(name, str), typing.cast(list[Any], names)):
        try:
            import_modules([name])
        except Exception as error:  # whatever a user's module raises
            what = f"cannot import {name}: {type(error).__name__}: {error}"
            yield Problem("model.imports", what, "a module that is installed or in this folder, without .py")


def _unused(merged: DictConfig, good: dict[str, Any], given: Given, known: set[str]) -> Iterator[Problem]:
    """Keys that were given though no choice uses them. What is known to be wrong is no reason."""

    def value(path: str) -> Any:
        if any(path == where or where.startswith(f"{path}[") for where in known):
            return UNKNOWN
        try:
            found = OmegaConf.select(merged, path)
        except (OmegaConfBaseException, ValueError):
            return UNKNOWN
        return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found

    for problem in unused_given(Config, good, value, given.place):
        if problem.path not in known:
            yield problem


def _matched(sections: dict[str, Any]) -> Iterator[Problem]:
    """Put the number into a model whose `cms.hidden` is `matched`; what is wrong with it elsewhere comes first."""
    model: ModelConfig | None = sections.get("model")
    if model is None or model.cms.hidden != "matched":
        return
    sections["model"] = replace(model, cms=replace(model.cms, hidden=None))
    if list(model.problems()):
        return
    try:
        sections["model"] = match(model)
    except ValueError as error:
        yield Problem("model.cms.hidden", f"matched: {error}", "null, or a number")


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
    for path, hint, *_ in leaves(Config):
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
    hints = typing.get_type_hints(Config)
    broken = {re.split(r"[.\[]", where)[0] for where in _touched(problems)}
    names = [item.name for item in dataclasses.fields(Config) if item.name not in broken]
    for name in names:
        OmegaConf.resolve(merged[name])  # before sections that a value may refer to are dropped
    for name in names:
        only_named(merged[name], hints[name])
    return {name: OmegaConf.to_object(merged[name]) for name in names}


if __name__ == "__main__":
    from configs.reference import key_table
    from hope.pipe import piped

    def main() -> int:
        sys.stdout.write(key_table(Config))
        return 0

    sys.exit(piped(main))
