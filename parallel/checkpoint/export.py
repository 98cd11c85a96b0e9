"""Weights for use elsewhere: one safetensors file under single-device names, and the model section as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hope.renamed import current_model
from hope.stored import manifest
from hope.stored.find import CONFIG, WEIGHTS
from hope.stored.tensors import read_tensor
from hope.stored.tokenizer import TOKENIZER, find_tokenizer, sha256_of
from parallel.checkpoint.errors import CheckpointError


def export(path: Path, out: Path, dtype: str = "float32") -> str:
    """Write the fp32 masters of the checkpoint `path`, after a check of all hashes, to `out`; returns what was done.

    `hope.pretrained.load(out)` makes a model of them with torch alone. The tokenizer comes along if the data that was
    trained on is still there and says which it was.

    Raises:
        CheckpointError: the checkpoint is damaged, or records no model section that this version can read; or `out`
            cannot be written.
    """
    content = manifest.read(path)
    if "config" not in content.extra:
        raise CheckpointError(f"{path} records no configuration; only checkpoints of pretrain_hope.py can be exported")
    try:
        model = without_origin(content.extra["config"]["model"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    manifest.check_sizes(path, content)
    manifest.check_hashes(path, content, content.files)
    kind: torch.dtype = getattr(torch, dtype)
    names = [name for name in content.tensors if name.startswith("master/")]
    weights = {
        name.removeprefix("master/"): read_tensor(path, content.tensors[name]).to(kind).contiguous() for name in names
    }
    out.mkdir(parents=True, exist_ok=True)
    _write_weights(weights, out, content.step)
    tokenizer = find_tokenizer(content.extra["config"].get("data", {}))
    if tokenizer is not None:
        (out / TOKENIZER).write_bytes(tokenizer.read_bytes())
    described = {"model": model, "step": content.step, "dtype": dtype, **_training(content.extra["config"], tokenizer)}
    manifest.write_durably(out / CONFIG, json.dumps(described, indent=1) + "\n")
    elements = sum(tensor.numel() for tensor in weights.values())
    return (
        f"{out / WEIGHTS}: {len(weights)} tensors, {elements:,} elements, {dtype}; {out / CONFIG}: step {content.step}"
        f"; {f'{out / TOKENIZER}: {tokenizer}' if tokenizer else 'no tokenizer: the one of the data was not found'}"
    )


def without_origin(record: Mapping[str, Any]) -> dict[str, Any]:
    """The model section under today's names, without `init`: a path that means nothing elsewhere. Raises ValueError."""
    return {key: value for key, value in current_model(record).items() if key not in ("init", "init_allow")}


def _training(config: Mapping[str, Any], tokenizer: Path | None) -> dict[str, Any]:
    """What users of the weights need to know of the training. No paths: they mean nothing elsewhere."""
    known = {"file": TOKENIZER, "sha256": sha256_of(tokenizer)} if tokenizer else None
    documents = {key: value for key, value in config.get("data", {}).items() if key == "documents"}
    return {"seq_len": config.get("train", {}).get("seq_len"), "data": documents, "tokenizer": known}


def _write_weights(weights: dict[str, torch.Tensor], out: Path, step: int) -> None:
    temporary = out / f".{WEIGHTS}.{os.getpid()}.tmp"
    try:
        # mapped files are private: what is written here cannot reach the checkpoint
        save_file(weights, temporary, metadata={"format": "pt", "step": str(step)})
        os.chmod(temporary, 0o666 & ~_umask())  # it makes files that nobody else may read
        os.replace(temporary, out / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"{out / WEIGHTS} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o077)  # the only way to read it
    os.umask(mask)
    return mask
