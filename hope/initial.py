"""The first weights of a run from a model that was trained: `model.init`.

Either the new model computes what the trained one does, to the last digit, or `model.init_allow` names what differs.

| differs | rule |
|---|---|
| window, periods and unit of the clocks, everything outside of the model section | free: the function is the same |
| one MLP of hidden width H, and K independent levels (Eq. 74) of H / K | free: the sum of the parts is the whole |
| more levels of the same hidden width | free: a new level is the identity, its `down` 0 (`hope.initial_levels`) |
| more rows of vocabulary | `vocab`: the new rows are drawn, as in a new model |
| another tokenizer, as far as both are known | `tokenizer`, or `vocab` |
| settings of a mixer whose parameters stay, such as `rope_base` | `settings`: its weights are kept |
| how levels in context are rewritten, and whether at all | `settings`: their weights are kept, rates may be drawn |
| another mixer, other heads, settings that change its parameters | `mixers`: drawn in that layer, the rest stays |
| width, number of layers, fewer rows, tied embeddings, epsilon of the norms, other shapes of levels | refused |
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hope.config import ModelConfig
from hope.initial_levels import aggregate_value, allow, level_problems, level_value
from hope.model import Model
from hope.pretrained import Pretrained, open_pretrained
from hope.sections import Problem
from hope.stored.errors import CheckpointError
from hope.stored.tokenizer import recorded_tokenizers, sha256_of

_PART = re.compile(r"blocks\.(\d+)\.(mixer|cms\.levels\.(\d+)|cms\.in_context|cms)\.")
_SAME_RESULT = ("kernel",)
"""Settings of mixers that do not change what is computed."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Weights of a trained model for the model of `config`, which `differences` has found nothing wrong with."""

    found: Pretrained
    config: ModelConfig

    @torch.no_grad()
    def fill(self, model: Model) -> None:
        """Put them into a slice of the new model, initialised and of whole shapes; what has no origin stays."""
        weights = dict(self.found.model.named_parameters())
        for name, parameter in model.named_parameters():
            if name.startswith(("embedding.", "head.")):
                parameter[: weights[name].shape[0]].copy_(weights[name])
            elif (value := self._value(name, weights)) is not None:
                parameter.copy_(value)

    def record(self) -> dict[str, Any]:
        """What a run records of its origin, as plain JSON."""
        fresh = [i for i in range(self.config.layers) if self._drawn(i)]
        rows = self.config.vocab_size - self.found.model.config.vocab_size
        return {
            "path": self.found.origin,
            "trained_steps": self.found.step,
            **({"drawn_mixers": fresh} if fresh else {}),
            **({"drawn_rows": rows} if rows else {}),
        }

    def _drawn(self, layer: int) -> bool:
        return layer in _other_mixers(self.found.model.config, self.config)

    def _value(self, name: str, weights: Mapping[str, Tensor]) -> Tensor | None:
        """What a parameter of a block or the last norm starts from; None: what it was drawn as."""
        part = _PART.match(name)
        if part is None or part[2] == "mixer":
            return None if part and self._drawn(int(part[1])) else weights.get(name)
        if part[2] == "cms":
            return aggregate_value(name, weights, self.found.model.config, self.config)
        if part[2] == "cms.in_context":
            new = name not in weights  # the identity until its first update
            return torch.zeros(()) if new and name.endswith("mlp.output.weight") else weights.get(name)
        return level_value(name, int(part[3]), weights, self.found.model.config, self.config)


def open_start(
    config: ModelConfig, data: Mapping[str, Any], *, verify: bool = True
) -> tuple[Start | None, list[Problem]]:
    """What a new run of `config` starts from, and what stands against it; (None, []) without `model.init`.

    Args:
        data: the run's data section, for the hash of its tokenizer.
        verify: as in `open_pretrained`.
    """
    if config.init is None:
        return None, []
    try:
        found = open_pretrained(config.init, verify=verify)
    except (CheckpointError, OSError, ImportError) as error:
        return None, [Problem("model.init", str(error), "a run, a checkpoint, or exported weights; or null")]
    problems = [*differences(found.model.config, config), *_tokenizers(found, config, data)]
    return Start(found, config), problems


def differences(source: ModelConfig, target: ModelConfig) -> Iterator[Problem]:
    """Everything in `target` that cannot start from weights of `source`, or needs a word of `model.init_allow`."""
    for name, why in _FIXED.items():
        old, new = getattr(source, name), getattr(target, name)
        if old != new:
            yield Problem(f"model.{name}", f"{new}, and model.init has {old}: {why}", f"model.{name}={_word(old)}")
    yield from _rows(source, target)
    if source.width == target.width:
        yield from level_problems(source, target)
        if source.layers == target.layers:
            yield from _mixers(source, target)


_FIXED = {
    "width": "every weight has another shape",
    "layers": "no rule says which weights a further block would start from, or which block could go",
    "tie_embeddings": "one of the two models has a matrix that the other lacks",
    "norm_eps": "the same weights would compute something else",
}
"""What has to be equal, and why."""


def _rows(source: ModelConfig, target: ModelConfig) -> Iterator[Problem]:
    old, new = source.vocab_size, target.vocab_size
    if new < old:
        what = f"{new}, and model.init has {old}: ids from {new} on would have no row"
        yield Problem("model.vocab_size", what, f"model.vocab_size={old}")
    elif new > old and "vocab" not in target.init_allow:
        what = f"{new}, and model.init has {old}: {new - old} rows would be drawn"
        yield Problem("model.vocab_size", what, f"model.vocab_size={old}; or {allow(target, 'vocab')}")


def _mixers(source: ModelConfig, target: ModelConfig) -> Iterator[Problem]:
    others = _other_mixers(source, target)
    if others and "mixers" not in target.init_allow:
        was, now = ({(config.heads, config.mixer_of_layer[i]) for i in others} for config in (source, target))
        kinds = lambda pairs: ", ".join(f"{name} of {heads} heads" for heads, name in sorted(pairs))
        same = {name for _, name in was} == {name for _, name in now} and source.heads == target.heads
        differ = "settings that change its parameters" if same else f"{kinds(now)}, and model.init has {kinds(was)}"
        what = f"layers {', '.join(map(str, others))}: {differ}"
        fix = f"model.pattern=[{', '.join(source.pattern)}] model.heads={source.heads}"
        yield Problem("model.pattern", what, f"{fix}, and its settings; or {allow(target, 'mixers')} to draw them")
    for name in dict.fromkeys(target.mixer_of_layer[i] for i in range(target.layers) if i not in others):
        old, new = _settings(source, name), _settings(target, name)
        changed = [key for key in new if old.get(key) != new[key]]
        if changed and "settings" not in target.init_allow:
            allowed = allow(target, "settings")
            for key in changed:
                what = f"{new[key]}, and model.init has {old.get(key)}: the same weights would compute something else"
                fix = f"model.mixers.{name}.{key}={_word(old.get(key))}; or {allowed}"
                yield Problem(f"model.mixers.{name}.{key}", what, fix)


def _other_mixers(source: ModelConfig, target: ModelConfig) -> list[int]:
    """Layers whose mixer has other parameters, or is of another kind."""
    if source.heads != target.heads:
        return list(range(target.layers))
    shapes = {(name, side): _shapes(config, name)
              for side, config in enumerate((source, target)) for name in set(config.mixer_of_layer)}  # fmt: skip
    pairs = enumerate(zip(source.mixer_of_layer, target.mixer_of_layer, strict=True))
    return [i for i, (old, new) in pairs if old != new or shapes[old, 0] != shapes[new, 1]]


def _shapes(config: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in config.build_mixer(name).named_parameters()}


def _settings(config: ModelConfig, name: str) -> dict[str, Any]:
    section: dict[str, Any] = dataclasses.asdict(config.mixers[name])
    return {key: value for key, value in section.items() if key not in _SAME_RESULT}


def _tokenizers(found: Pretrained, config: ModelConfig, data: Mapping[str, Any]) -> Iterator[Problem]:
    """Ids of another tokenizer would be other words. What one side does not record cannot be compared."""
    there = found.tokenizer_path
    hash_of = lambda section: next((known.sha256 for known in recorded_tokenizers(section)), None)
    old, new = sha256_of(Path(there)) if there else hash_of(found.data), hash_of(data)
    if old and new and old != new and not {"vocab", "tokenizer"} & set(config.init_allow):
        what = f"its tokenizer has sha256 {old[:12]}..., that of the data {new[:12]}...: ids would mean other words"
        yield Problem("model.init", what, f"data made with its tokenizer; or {allow(config, 'tokenizer')}")


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
