"""What a sequence remembers, as a file: the tensors of its state as safetensors, all else as JSON in the header.

Nothing in the file is executed. Which classes a state consists of is known from the model, not from the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hope.adapt.learner import Learned, Learner, settings_in
from hope.adapt.settings import AdaptError, Settings
from hope.block import Block
from hope.generate.errors import GenerationError
from hope.generate.loop import Memory
from hope.model import Model, States
from hope.nesting import json_of
from hope.stored.errors import UnfitWeights
from hope.stored.safetensors import as_safetensors, read_with_metadata
from hope.train.written import replace_text

FORMAT = "hope.generate session 1"
LEARNED = "hope.generate session 2"
"""Format of a session with levels that have learned: who knows only the first would go on without what they did."""
_PREFIX = "adapt/"


@dataclass(frozen=True)
class Session:
    """A sequence that can go on: its memory, the last tokens whose text is known, and how many of them were not shown
    because their last character is not whole; and what levels have learned, None without --adapt."""

    memory: Memory
    tail: list[int]
    held: int
    learned: Learned | None = None


def identity_of(model: Model) -> str:
    """A hash of the configuration and of all weights: a memory means something to this model only."""
    config = {key: value for key, value in dataclasses.asdict(model.config).items() if key != "imports"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        content = parameter.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(content.data)
    return digest.hexdigest()


def write_session(path: Path, session: Session, identity: str, dtype: torch.dtype) -> None:
    """Write `session` to `path`, whole or not at all. Raises OSError; GenerationError: a mixer's state has parts that
    are neither tensors, numbers, tuples nor dataclasses."""
    pack = _Pack()
    state = None
    if session.memory.state is not None:
        state = {str(number): pack.node(part) for number, part in session.memory.state.items()}
    content = {"state": state, "unread": session.memory.unread, "place": session.memory.place}
    content |= {"tail": session.tail, "held": session.held}
    metadata = {"format": FORMAT, "model": identity, "dtype": _name(dtype), "session": json.dumps(content)}
    tensors = pack.tensors
    if session.learned is not None:
        metadata |= {"format": LEARNED, "adapt": json.dumps(session.learned.record)}
        tensors = tensors | {_PREFIX + name: tensor for name, tensor in session.learned.tensors.items()}
    replace_text(path, as_safetensors(tensors, metadata))


def read_session(path: Path, model: Model, identity: str, device: torch.device) -> Session:
    """The session in `path`, for `model` as it computes on `device`.

    Raises:
        GenerationError: there is no such file, it is no session, or it belongs to another model or dtype.
    """
    try:
        tensors, metadata = read_with_metadata(path)
    except OSError as error:
        raise GenerationError(f"{path} cannot be read: {error.strerror}; --state-out FILE writes one") from None
    except UnfitWeights as error:
        raise GenerationError(f"{error}; --state-out FILE writes what --state-in reads") from None
    if metadata.get("format") not in (FORMAT, LEARNED):
        raise GenerationError(f"{path} is no session; --state-out FILE writes what --state-in reads")
    if metadata.get("model") != identity:
        raise GenerationError(
            f"{path} belongs to another model: configuration and weights have the hash {metadata.get('model', '')[:12]}"
            f"..., those of this model {identity[:12]}...; give the run, checkpoint or export that it was made with"
        )
    dtype = _name(next(model.parameters()).dtype)
    if metadata.get("dtype") != dtype:
        raise GenerationError(f"{path} was written with --dtype {metadata.get('dtype')}, this model is {dtype}")
    try:
        content = json_of(metadata["session"])
        state = None if content["state"] is None else _states(content["state"], model, tensors, device)
        memory = Memory(state, content["unread"], content["place"])
        return Session(memory, content["tail"], content["held"], _learned(tensors, metadata))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise GenerationError(f"{path} was changed, or written by another version: {error!r}") from None


def learner_of(session: Session, path: Path | None, model: Model, settings: Settings | None) -> Learner | None:
    """The levels of `model` that learn, as far as `session` has brought them; None if none do.

    path: that the session was read from; None: it begins now.

    Raises:
        GenerationError: the session and `settings` do not agree, or its file was changed.
        AdaptError: the weights cannot learn.
    """
    if path is not None and (session.learned is None) != (settings is None):
        if session.learned is None:
            raise GenerationError(f"{path} was written without --adapt; leave it out, or begin without --state-in")
        said = settings_in(session.learned.record)
        raise GenerationError(f"{path} holds levels that have learned; give {said}, as it was written with")
    if settings is None:
        return None
    learner = Learner(model, settings)
    if session.learned is not None:
        try:
            learner.load(session.learned)
        except AdaptError as error:
            raise GenerationError(f"{path} {error}") from None
        except (KeyError, ValueError, TypeError) as error:
            raise GenerationError(f"{path} was changed, or written by another version: {error!r}") from None
    return learner


def _learned(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Learned | None:
    if metadata["format"] != LEARNED:
        return None
    record = json_of(metadata["adapt"])
    settings_in(record)  # what is no record is found here
    found = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    return Learned(found, record)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Pack:
    """Values as JSON. Tensors are named and put aside; what occurs twice, as states that two banks share, is written
    once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[int, dict[str, int]] = {}

    def node(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if id(value) in self._seen:
            return self._seen[id(value)]
        if isinstance(value, Tensor):
            name = str(len(self.tensors))
            self.tensors[name] = value
            node: dict[str, Any] = {"tensor": name}
        elif isinstance(value, tuple):
            node = {"items": [self.node(part) for part in value]}
        elif dataclasses.is_dataclass(value):
            fields = dataclasses.fields(value)
            node = {"fields": {part.name: self.node(getattr(value, part.name)) for part in fields}}
        else:
            raise GenerationError(f"a state with a {type(value).__name__} cannot be written")
        number = len(self._seen)
        self._seen[id(value)] = {"same": number}
        return {**node, "number": number}


class _Unpack:
    """Values from what `_Pack` made, with a value of the same structure to tell the classes."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._made: dict[int, Any] = {}

    def value(self, node: Any, like: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "same" in node:
            return self._made[node["same"]]
        if "tensor" in node:
            made: Any = self._tensors[node["tensor"]].to(self._device)
        elif "items" in node:
            made = tuple(self.value(part, other) for part, other in zip(node["items"], self._items(like), strict=True))
        else:
            fields = {name: self.value(part, getattr(like, name)) for name, part in node["fields"].items()}
            made = dataclasses.replace(like, **fields)
        self._made[node["number"]] = made
        return made

    @staticmethod
    def _items(like: Any) -> Iterable[Any]:
        if not isinstance(like, tuple):
            raise TypeError(f"several parts where a state has {type(like).__name__}")
        return like


def _states(nodes: dict[str, Any], model: Model, tensors: dict[str, Tensor], device: torch.device) -> States:
    """By block number, built like the states that the mixers start with."""
    unpack, states = _Unpack(tensors, device), {}
    for name, block in model.blocks.items():
        assert isinstance(block, Block)
        like = tuple(sublayer.start(1) for sublayer in block.sublayers())
        states[int(name)] = unpack.value(nodes[name], like)
    return states
