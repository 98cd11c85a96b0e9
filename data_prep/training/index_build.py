"""Reads the data section of a run and builds the indices of its sources before the job."""

import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep.config import DataConfig, SourceConfig
from data_prep.errors import DataError
from data_prep.training.index_key import IndexKey
from data_prep.training.index_store import TokenStore, open_store
from data_prep.training.reading import HeldoutSet, TrainingSet
from data_prep.yaml_text import shallow


def read_config(path: str, overrides: Sequence[str], *, blended: bool = False) -> tuple[DataConfig, int]:
    """The data section and train.seq_len of a run's configuration; other sections are not looked at.

    `overrides`: `a.b=c`, and paths of YAML files that are merged over what stands before them.
    `blended`: whoever asks shows the order of a blend.

    Raises DataError naming the file if it asks for another order, or it cannot be read or does not fit.
    """
    try:
        whole: Any = _yaml(path)
        for word in overrides:
            if word.endswith((".yaml", ".yml")) and "=" not in word:
                whole = OmegaConf.merge(whole, _yaml(word))
            else:
                _override(whole, word)
        data = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.select(whole, "data") or {})
        seq_len, mode = OmegaConf.select(whole, "train.seq_len"), OmegaConf.select(whole, "train.mode")
        section = OmegaConf.to_object(data)
    except (OSError, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(section, DataConfig) or not isinstance(seq_len, int) or seq_len < 1:
        raise DataError(f"{path}: train.seq_len is {seq_len!r}; give a whole number, 1 or more")
    if blended and mode == "continual":
        phases = "`python pretrain_hope.py CONFIG --dry-run` shows its phases"
        raise DataError(f"{path}: train.mode is continual, which reads one source after another; {phases}")
    return section, seq_len


def _yaml(path: str) -> Any:
    """The container in a file. Raises what OmegaConf.load does, and yaml.YAMLError for one that is nested too deep."""
    return OmegaConf.load(io.StringIO(shallow(Path(path).read_text(encoding="utf-8"))))


def _override(whole: Any, override: str) -> None:
    key, equals, word = override.partition("=")
    if not equals:
        raise ValueError(f"`{override}` is not of the form section.key=value")
    read = OmegaConf.create(shallow(f"value: {word}") if word else {"value": ""})
    value: Any = OmegaConf.to_container(read, resolve=False)
    OmegaConf.update(whole, key, value["value"], force_add=True)


def build_indices(data: DataConfig, seq_len: int) -> Iterator[str]:
    """Check every byte of the data against its manifest and build what is missing; yields a line per set.

    Raises DataError if a set is missing, damaged or has changed.
    """
    for path, source in data.entries():
        began = time.perf_counter()
        store = open_source(source.train, source, f"{path}.train")
        folder = IndexKey(seq_len, data.seed, data.documents).folder(store, data.cache)
        state = "none needed" if folder is None else f"{folder} ({'kept' if folder.is_dir() else 'built'})"
        training = TrainingSet(
            source.train,
            seq_len,
            data.seed,
            data.cache,
            documents=data.documents,
            name=source.name,
            eos_id=source.eos_id,
            vocab_size=source.vocab_size,
        )
        took = time.perf_counter() - began
        yield f"index    {source.train}: {len(training):,} windows of {seq_len}, {took:.1f} s, {state}"
        heldout = HeldoutSet(source.heldout, seq_len, data.documents, source.eos_id, source.vocab_size)
        yield f"heldout  {source.heldout}: {len(heldout):,} windows of {seq_len}"


def open_source(prefix: str, source: SourceConfig, path: str) -> TokenStore:
    """The training or held-out tokens of a source; raises DataError naming the YAML path if it is not set."""
    if not prefix:
        raise DataError(f"{path} is not set; give the prefix of a token set")
    return open_store(prefix, source.eos_id, source.vocab_size)
