"""The safetensors format: 8 bytes of header length, a JSON header, raw little-endian numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hope.nesting import json_of
from hope.stored.errors import UnfitWeights

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_ALIGNMENT = 8  # bytes: the numbers begin at a multiple of it


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UnfitWeights: it is no such file, or has a dtype that is not known here, or offsets outside of the file.
        OSError: it cannot be read.
    """
    return read_with_metadata(path)[0]


def read_with_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and the text that its header carries. Raises as `read_safetensors`."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size - 8:
            raise UnfitWeights(f"{path}: a header of {length} bytes in a file of {path.stat().st_size}")
        header = _header(path, file.read(length))
        data = bytearray(file.read())
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise UnfitWeights(f"{path}: its __metadata__ is {metadata!r}, not an object")
    return {name: _tensor(path, name, entry, data) for name, entry in header.items()}, metadata


def as_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file with these tensors, in this order."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts, end = [], 0
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        part = cast(bytes, flat.view(torch.uint8).numpy().tobytes())
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(part)],
        }
        parts.append(part)
        end += len(part)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json_of(text)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise UnfitWeights(f"{path}: not a safetensors file: its header is no JSON object")
    return header


def _tensor(path: Path, name: str, entry: Any, data: bytearray) -> Tensor:
    try:
        (first, last), shape, kind = entry["data_offsets"], entry["shape"], entry["dtype"]
    except (KeyError, TypeError, ValueError):
        raise UnfitWeights(f"{path}: {name} lacks dtype, shape or data_offsets") from None
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in (first, last, *shape)):
        raise UnfitWeights(f"{path}: {name} has the shape {shape} at {first} to {last}; whole numbers from 0 on work")
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None or not 0 <= first <= last <= len(data):
        raise UnfitWeights(f"{path}: {name} is {kind} at {first} to {last} of {len(data)} bytes")
    if last - first != dtype.itemsize * math.prod(shape):
        raise UnfitWeights(f"{path}: {name} has {last - first} bytes for shape {shape} of {kind}")
    if first == last:
        return torch.empty(shape, dtype=dtype)
    # a copy: offsets need not be multiples of the dtype's size
    raw = torch.frombuffer(data, dtype=torch.uint8, count=last - first, offset=first).clone()
    return raw.view(dtype).view(shape)
