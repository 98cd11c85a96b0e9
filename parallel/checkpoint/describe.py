"""A checkpoint in words, and what the ranks of another layout would read of it: from the manifest alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hope.stored.manifest import Manifest, TensorEntry
from parallel.checkpoint.errors import CheckpointError
from parallel.layout.topology import ParallelConfig

if TYPE_CHECKING:
    from parallel.layout.plan import Plan

_GIB = 2**30
_RECORDED = ("tokens", "consumed", "schedule", "skips", "next_batch", "doubt", "origin")


def contents(content: Manifest, tensors: bool = False) -> str:
    """Step, layout, what is recorded, clocks, elements and bytes per kind of state; with `tensors` each of them."""
    layout = " x ".join(f"{key} {degree}" for key, degree in content.layout.items())
    rows = [("step", str(content.step)), ("saved in", layout)]
    rows += [(key, str(content.extra[key])) for key in _RECORDED if content.extra.get(key)]
    rows.append(("memory state", content.carried_memory_state))
    for name, group in content.counters.items():
        rows.append((f"group {name}", ", ".join(f"{key} {value}" for key, value in group.items())))
    kinds: dict[str, list[TensorEntry]] = {}
    for name, tensor in content.tensors.items():
        kinds.setdefault(name.partition("/")[0], []).append(tensor)
    for kind, entries in kinds.items():
        elements = sum(math.prod(entry.shape) for entry in entries)
        size = sum(entry.bytes for entry in entries) / _GIB
        dtypes = ", ".join(sorted({entry.dtype for entry in entries}))
        rows.append((kind, f"{len(entries)} tensors, {elements:,} elements, {dtypes}, {size:.3f} GiB"))
    largest = max((file.bytes for file in content.files.values()), default=0)
    rows.append(("files", f"{len(content.files)}, {content.bytes:,} bytes, the largest {largest:,}"))
    width = max(len(key) for key, _ in rows)
    lines = [f"{key:<{width}}  {value}" for key, value in rows]
    for name, tensor in content.tensors.items() if tensors else ():
        lines.append(f"{name}  {tensor.dtype} {list(tensor.shape)}")
        lines += [f"    {list(c.shape)} at {list(c.at)}: {c.file} +{c.start}, {c.bytes} bytes" for c in tensor.chunks]
    return "\n".join(lines)


def reshard_plan(content: Manifest, layout: ParallelConfig, data: int) -> str:
    """What every tensor and pipeline coordinate of a layout would read; its data-parallel ranks share that.

    Raises:
        CheckpointError: the model does not fit the layout, or the checkpoint does not say what model it holds.
    """
    from hope.config import ModelConfig
    from parallel.layout.plan import (
        plan_of_config,  # torch, which takes seconds to import; the other commands do without
    )
    from parallel.layout.stages import split

    config = content.extra.get("config")
    if config is None:
        raise CheckpointError("the checkpoint records no configuration, so which stage holds what is unknown")
    try:
        model, train = ModelConfig.of(config["model"]), config["train"]
    except (ValueError, ImportError) as error:  # an import: of model.imports
        raise CheckpointError(str(error)) from None
    world = layout.tensor * layout.pipeline * data
    problems = list(layout.problems(world, train["global_batch"], 1, model, train["seq_len"]))
    if problems:
        listed = "".join(f"\n  {path} {what}; {fix}" for path, what, fix in problems)
        raise CheckpointError(f"the model does not fit this layout:{listed}")
    stages = split(model, train["seq_len"], layout.pipeline, layout.virtual_pipeline)
    plan = plan_of_config(model)
    lines = ["stage  tensor  tensors       GiB  chunks  files"]
    for stage, slices in enumerate(stages):
        blocks = {block for part in slices for block in range(part.first, part.last)}
        ends = (slices[0].first == 0, slices[-1].last == model.layers)
        mine = [name for name in content.tensors if _held(name, blocks, ends, model.tie_embeddings)]
        for rank in range(layout.tensor):
            lines.append(f"{stage:>5}  {rank:>6}  {_read(content, plan, mine, rank, layout.tensor)}")
    lines.append(
        f"{world} ranks; {data} data-parallel ranks share each line, none holds more than about 1/{data} of it"
    )
    return "\n".join(lines)


def _held(name: str, blocks: set[int], ends: tuple[bool, bool], tied: bool) -> bool:
    """Whether a pipeline stage with these blocks, and the model's first or last end, holds a state."""
    kind, _, parameter = name.partition("/")
    first, last = ends
    if kind in ("rng", "stream"):
        return False
    if parameter.startswith("blocks."):
        return int(parameter.split(".")[1]) in blocks
    return first or (last and tied) if parameter.startswith("embedding.") else last


def _read(content: Manifest, plan: Plan, names: Sequence[str], rank: int, tensor: int) -> str:
    """Tensors, GiB, chunks and files of what one tensor-parallel rank reads."""
    elements, chunks = 0.0, set()
    for name in names:
        entry = content.tensors[name]
        box = _box(content, plan, name, rank, tensor)
        share = math.prod(last - first for first, last in box) / max(1, math.prod(entry.shape))
        elements += share * entry.bytes
        for chunk in entry.chunks:
            sides = zip(box, chunk.at, chunk.shape, strict=True)
            if all(first < corner + size and corner < last for (first, last), corner, size in sides):
                chunks.add((chunk.file, chunk.start))
    files = len({file for file, _ in chunks})
    return f"{len(names):>7}  {elements / _GIB:>8.3f}  {len(chunks):>6}  {files:>5}"


def _box(content: Manifest, plan: Plan, name: str, rank: int, tensor: int) -> list[tuple[int, int]]:
    """(first, last) in every dimension of the shard that a tensor-parallel rank holds."""
    entry, parameter = content.tensors[name], name.partition("/")[2]
    sides = [(0, size) for size in entry.shape]
    if entry.shape != content.tensors[f"master/{parameter}"].shape:
        return sides  # a small state of the tensor as a whole
    dim = plan[parameter].dim
    if dim is not None:
        size = entry.shape[dim] // tensor
        sides[dim] = (size * rank, size * (rank + 1))
    return sides
