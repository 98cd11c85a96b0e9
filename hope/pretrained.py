"""A model that was trained, from whatever holds it: a run, one of its checkpoints, or exported weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hope.config import ModelConfig
from hope.model import Model
from hope.nesting import json_of
from hope.parameters import declaration_of
from hope.stored import manifest
from hope.stored.errors import CheckpointError, DamagedCheckpoint, UnfitWeights
from hope.stored.find import CONFIG, HF_PREFIX, IMPORT, WEIGHTS, checkpoints_of, files_of, is_export
from hope.stored.safetensors import read_safetensors
from hope.stored.tensors import read_tensor
from hope.stored.tokenizer import TOKENIZER, find_tokenizer, sha256_of

MASTER = "master/"
"""What the names of weights begin with in a checkpoint."""


@dataclass(frozen=True)
class Pretrained:
    """A trained model, on the CPU and in the dtype that it was stored in, and what is known of its training.

    tokenizer_path: the tokenizer of its data, None if it is not there.
    data: the recorded data section, {} if none; of an export the part that is no path.
    step: optimizer steps behind it.
    seq_len: tokens of a training window; None if that is not recorded.
    origin: the checkpoint or export that it came from, and what was passed over on the way to it.
    path: of that checkpoint or export.
    """

    model: Model
    tokenizer_path: Path | None
    data: Mapping[str, Any]
    step: int
    seq_len: int | None
    origin: str
    path: Path


def load(path: str | Path, *, verify: bool = True) -> Model:
    """The model of `open_pretrained`; raises as that does."""
    return open_pretrained(path, verify=verify).model


def open_pretrained(path: str | Path, *, verify: bool = True) -> Pretrained:
    """The model of a run (its newest sound checkpoint), of a checkpoint, or of exported weights.

    A checkpoint's fp32 weights are mapped, not copied: its folder may be removed afterwards, but not written to.

    Args:
        verify: compare the files that are read with the hashes that a checkpoint records.

    Raises:
        NothingStored: (also a FileNotFoundError) `path` is none of the three; the message says what was looked for.
        DamagedCheckpoint: no checkpoint there is what was written.
        UnfitWeights: (also a ValueError) weights and configuration do not fit, or cannot be read by this version.
        CheckpointError: (the base of these) it is no checkpoint of a training run, or of another format.
        ImportError: a module of the recorded `model.imports` is not here.
    """
    path = Path(path)
    if is_export(path):
        return _from_export(path)
    skipped: list[str] = []
    for place in checkpoints_of(path):
        try:
            return _from_checkpoint(place, skipped, verify)
        except DamagedCheckpoint as error:
            skipped.append(f"{place.name}: {error}")
    shown = "".join(f"\n  {line}" for line in skipped)
    raise DamagedCheckpoint(f"{path} holds no sound checkpoint:{shown}\n  put one back from a copy")


def _from_checkpoint(path: Path, skipped: list[str], verify: bool) -> Pretrained:
    content = manifest.read(path)
    manifest.check_sizes(path, content)
    if verify:
        manifest.check_hashes(path, content, files_of(content, MASTER))
    config = content.extra.get("config")
    if config is None:
        raise CheckpointError(f"{path} records no configuration; only checkpoints of pretrain_hope.py hold a model")
    weights = {
        name.removeprefix(MASTER): read_tensor(path, tensor)
        for name, tensor in content.tensors.items()
        if name.startswith(MASTER)
    }
    data = config.get("data", {})
    notes = "".join(f"; passed over {line}" for line in skipped)
    return Pretrained(
        _filled(config["model"], weights, f"{path}: weights and the recorded model section do not fit"),
        find_tokenizer(data),
        data,
        content.step,
        config.get("train", {}).get("seq_len"),
        f"{path}{notes}",
        path,
    )


def _from_export(path: Path) -> Pretrained:
    try:
        described = json_of((path / CONFIG).read_text(encoding="utf-8"))
        if "model" not in described and "model_type" in described:
            raise UnfitWeights(f"{path} holds a {described['model_type']} of another program; {IMPORT}")
        record, step, tokenizer = described["model"], described.get("step", 0), described.get("tokenizer")
    except UnfitWeights:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnfitWeights(f"{path / CONFIG} does not describe exported weights: {error!r}") from None
    weights = read_safetensors(path / WEIGHTS)
    if "architectures" in described:  # in Hugging Face's layout the model is a part of their module
        weights = {name.removeprefix(HF_PREFIX): tensor for name, tensor in weights.items()}
    return Pretrained(
        _filled(record, weights, f"{path}: weights and {CONFIG} do not fit"),
        _exported_tokenizer(path, tokenizer),
        described.get("data", {}),
        step,
        described.get("seq_len"),
        str(path),
        path,
    )


def _exported_tokenizer(path: Path, recorded: Mapping[str, str] | None) -> Path | None:
    """The tokenizer in an export. One that is not the recorded one would turn every token into another text."""
    found = path / (recorded or {}).get("file", TOKENIZER)
    if not found.is_file():
        return None
    if recorded and sha256_of(found) != recorded["sha256"]:
        raise UnfitWeights(f"{found} is not the tokenizer that was exported: sha256 {sha256_of(found)[:12]}...")
    return found


def _filled(record: Mapping[str, Any], weights: dict[str, Tensor], unfit: str) -> Model:
    """The model of a recorded section with these tensors as its parameters, which keep what they declare."""
    try:
        config = ModelConfig.of(record)
        if problems := list(config.problems()):
            raise ValueError("; ".join(f"{problem.path}: {problem.what}" for problem in problems))
    except ValueError as error:
        raise UnfitWeights(f"{unfit.partition(': ')[0]}: {error}") from None
    with torch.device("meta"):
        model = Model(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise UnfitWeights(f"{unfit}: {', '.join(wrong[:5])}")
    declared = {name: declaration_of(parameter, name) for name, parameter in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    for name, parameter in model.named_parameters():
        parameter.declaration = declared[name]  # type: ignore[attr-defined]
    return model


__all__ = ["Pretrained", "load", "open_pretrained", "read_safetensors"]
