"""Checkpoints written by hand: what a training run stores of a model, without the run."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch

from hope.model import Model
from hope.stored import folders
from hope.stored.manifest import Chunk, FileEntry, Manifest, TensorEntry


def store(run: Path, model: Model, step: int, config: dict[str, Any] | None = None) -> Path:
    """A checkpoint of `model` in the folder of a run, every tensor in two files; returns its folder.

    config: further sections of the recorded configuration.
    """
    path = folders.step_folder(run / "checkpoints", step)
    folders.prepare(path)
    files, tensors = {"rank_00000.bin": b"", "rank_00001.bin": b""}, {}
    for name, parameter in model.named_parameters():
        whole, chunks = parameter.detach().float(), []
        half = whole.shape[0] // 2
        for file, first, last in zip(files, (0, half), (half, whole.shape[0]), strict=True):
            part = whole[first:last].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            at, shape = (first, *[0] * (whole.ndim - 1)), (last - first, *whole.shape[1:])
            chunks.append(Chunk(file, len(files[file]), len(part), at, shape))
            files[file] += part
        tensors[f"master/{name}"] = TensorEntry("float32", tuple(whole.shape), tuple(chunks))
    entries = {}
    for file, content in files.items():
        (folders.unfinished(path) / file).write_bytes(content)
        entries[file] = FileEntry(len(content), hashlib.sha256(content).hexdigest())
    recorded = {"model": dataclasses.asdict(model.config), **(config or {})}
    Manifest(step, {"tensor": 1}, {}, {"config": recorded}, tensors, entries).write(folders.unfinished(path))
    return folders.publish(path)
