"""A model from exported weights: `model.safetensors` and `config.json`, read with torch and nothing else."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from hope.config import ModelConfig
from hope.model import Model

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load(folder: str | Path) -> Model:
    """The model that `python -m parallel.checkpoint export` wrote to `folder`, on the CPU, in the file's dtype.

    Raises:
        FileNotFoundError: `folder` is no such export; the message says how to make one.
        ImportError: a module of the exported `model.imports` is not here.
        ValueError: the file is not what it says, or does not fit the configuration beside it, or that cannot be read.
    """
    absent = [name for name in ("config.json", "model.safetensors") if not (Path(folder) / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(absent)}: exported weights are expected, which `python -m "
            f"parallel.checkpoint export RUN --out FOLDER` writes from a run's folder or one of its checkpoints"
        )
    described = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    weights = read_safetensors(Path(folder) / "model.safetensors")
    with torch.device("meta"):
        model = Model(ModelConfig.of(described["model"]))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ValueError(f"{folder}: weights and config.json do not fit: {', '.join(wrong[:5])}")
    model.load_state_dict(weights, assign=True)
    return model


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file: 8 bytes of header length, a JSON header, raw little-endian numbers.

    Raises:
        ValueError: a dtype that models do not have, or offsets outside of the file.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size - 8:
            raise ValueError(f"{path}: a header of {length} bytes in a file of {path.stat().st_size}")
        header = json.loads(file.read(length))
        data = bytearray(file.read())
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None or not 0 <= first <= last <= len(data):
            raise ValueError(f"{path}: {name} is {entry['dtype']} at {first} to {last} of {len(data)} bytes")
        if last - first != dtype.itemsize * math.prod(entry["shape"]):
            raise ValueError(f"{path}: {name} has {last - first} bytes for shape {entry['shape']} of {entry['dtype']}")
        flat = torch.frombuffer(data, dtype=dtype, count=math.prod(entry["shape"]), offset=first)
        tensors[name] = flat.clone().view(entry["shape"])
    return tensors
