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
from hope.stored.find import CONFIG, HF_PREFIX, WEIGHTS
from hope.stored.tensors import read_tensor
from hope.stored.tokenizer import (
    HF_TOKENIZER,
    TOKENIZER,
    find_tokenizer,
    name_in_exports,
    recorded_tokenizers,
    sha256_of,
)
from parallel.checkpoint.elsewhere import huggingface
from parallel.checkpoint.errors import CheckpointError


def export(path: Path, out: Path, dtype: str = "float32", layout: str = "hope") -> str:
    """Write the fp32 masters of the checkpoint `path`, after a check of all hashes, to `out`; returns what was done.

    `hope.pretrained.load(out)` makes a model of them with torch alone. The tokenizer comes along if the data that was
    trained on is still there and says which it was.

    Args:
        layout: "hope"; "hf", as a model of Hugging Face's `transformers`, which needs the package `hope` installed.

    Raises:
        CheckpointError: the checkpoint is damaged, or records no model section that this version can read; or `out`
            cannot be written.
    """
    content = manifest.read(path)
    if "config" not in content.extra:
        raise CheckpointError(f"{path} records no configuration; only checkpoints of pretrain_hope.py can be exported")
    config = content.extra["config"]
    try:
        model = without_origin(config["model"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    manifest.check_sizes(path, content)
    manifest.check_hashes(path, content, content.files)
    kind: torch.dtype = getattr(torch, dtype)
    names = [name for name in content.tensors if name.startswith("master/")]
    weights = {
        name.removeprefix("master/"): read_tensor(path, content.tensors[name]).to(kind).contiguous() for name in names
    }
    data = config.get("data", {})
    about = {
        "step": content.step,
        "seq_len": config.get("train", {}).get("seq_len"),
        "data": {key: value for key, value in data.items() if key == "documents"},  # no paths: see without_origin
    }
    ends = next((known.eos_id for known in recorded_tokenizers(data)), None)
    return write_export(out, weights, {"model": model, "dtype": dtype, **about}, find_tokenizer(data), ends, layout)


def write_export(
    out: Path,
    weights: Mapping[str, torch.Tensor],
    about: Mapping[str, Any],
    tokenizer: Path | None,
    eos_id: int | None,
    layout: str = "hope",
) -> str:
    """A folder of exported weights, the description last; returns what was written.

    Args:
        about: `model` (the section), `dtype`, `step`, `seq_len`, `data`.

    Raises:
        CheckpointError: `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).unlink(missing_ok=True)  # until all is there, it is no export
    prefix = HF_PREFIX if layout == "hf" else ""
    _write_weights({f"{prefix}{name}": tensor for name, tensor in weights.items()}, out, about["step"])
    for name in (TOKENIZER, HF_TOKENIZER):  # of an earlier export
        if tokenizer is None or (out / name).resolve() != tokenizer.resolve():
            (out / name).unlink(missing_ok=True)
    known: dict[str, Any] | None = None
    if tokenizer is not None:
        known = {"file": name_in_exports(tokenizer), "sha256": sha256_of(tokenizer)}
        if eos_id is not None:
            known |= {"eos_id": eos_id}
        (out / known["file"]).write_bytes(tokenizer.read_bytes())
    described = {**about, "tokenizer": known}
    more = []
    if layout == "hf":
        more = huggingface.write_files(out, eos_id, about["seq_len"])
        described = huggingface.described(described, eos_id)
    manifest.write_durably(out / CONFIG, json.dumps(described, indent=1) + "\n")
    elements = sum(tensor.numel() for tensor in weights.values())
    return (
        f"{out / WEIGHTS}: {len(weights)} tensors, {elements:,} elements, {about['dtype']}; {out / CONFIG}: "
        f"step {about['step']}; "
        + (f"{out / known['file']}: {tokenizer}" if known else "no tokenizer: the one of the data was not found")
        + "".join(f"; {out / name}" for name in more)
    )


def without_origin(record: Mapping[str, Any]) -> dict[str, Any]:
    """The model section under today's names, without `init`: a path that means nothing elsewhere. Raises ValueError."""
    return {key: value for key, value in current_model(record).items() if not key.startswith("init")}


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
