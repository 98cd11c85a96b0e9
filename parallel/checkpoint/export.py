"""Weights for use elsewhere: one safetensors file under single-device names, and the model section as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from hope.renamed import current_model
from parallel.checkpoint import manifest
from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.storage import read_tensor

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def export(path: Path, out: Path, dtype: str = "float32") -> str:
    """Write the fp32 masters of the checkpoint `path`, after a check of all hashes, to `out`; returns what was done.

    `hope.pretrained.load(out)` makes a model of them with torch alone.

    Raises:
        CheckpointError: the checkpoint is damaged, or records no model section that this version can read.
    """
    content = manifest.read(path)
    if "config" not in content.extra:
        raise CheckpointError(f"{path} records no configuration; only checkpoints of pretrain_hope.py can be exported")
    try:
        model = current_model(content.extra["config"]["model"])
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
    # mapped files are private: what is written here cannot reach the checkpoint
    save_file(weights, out / f"{WEIGHTS}.tmp", metadata={"format": "pt", "step": str(content.step)})
    os.replace(out / f"{WEIGHTS}.tmp", out / WEIGHTS)
    described = {"model": model, "step": content.step, "dtype": dtype}
    manifest.write_durably(out / CONFIG, json.dumps(described, indent=1) + "\n")
    elements = sum(tensor.numel() for tensor in weights.values())
    return (
        f"{out / WEIGHTS}: {len(weights)} tensors, {elements:,} elements, {dtype}; {out / CONFIG}: step {content.step}"
    )
