"""A Llama of Hugging Face (Touvron et al., 2023) under our names: pattern [attention], one MLP.

Both rotate the first half of a head against the second, so that queries and keys need no permutation. Keys and values
that a group of heads shares (grouped-query attention) are repeated for each of them: the same function, with more
weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope.config import ModelConfig
from hope.nesting import json_of
from hope.stored.errors import NothingStored, UnfitWeights
from hope.stored.find import CONFIG, HF_INDEX, WEIGHTS
from hope.stored.safetensors import read_safetensors

_BLOCK = {
    "input_layernorm.weight": "norm.weight",
    "self_attn.q_proj.weight": "mixer.query.weight",
    "self_attn.k_proj.weight": "mixer.key.weight",
    "self_attn.v_proj.weight": "mixer.value.weight",
    "self_attn.o_proj.weight": "mixer.output.weight",
    "post_attention_layernorm.weight": "cms.levels.0.norm.weight",
    "mlp.gate_proj.weight": "cms.levels.0.mlp.gate.weight",
    "mlp.up_proj.weight": "cms.levels.0.mlp.up.weight",
    "mlp.down_proj.weight": "cms.levels.0.mlp.down.weight",
}
_TRUNK = {"model.embed_tokens.weight": "embedding.weight", "model.norm.weight": "norm.weight",
          "lm_head.weight": "head.weight"}  # fmt: skip
_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")


class Llama(NamedTuple):
    """Our model section and weights, and what the source says beside: context in tokens, token that ends a text."""

    section: dict[str, Any]
    weights: dict[str, Tensor]
    seq_len: int | None
    eos_id: int | None
    dtype: str


def read_llama(path: Path) -> Llama:
    """The model in a folder with config.json and model.safetensors, or several files and their index.

    Raises:
        NothingStored: a file is missing.
        UnfitWeights: it is no Llama, or one that our model cannot compute; every reason at once.
    """
    if not (path / CONFIG).is_file():
        raise NothingStored(f"{path / CONFIG} is missing; give a folder that Hugging Face's save_pretrained made")
    config = json_of((path / CONFIG).read_text(encoding="utf-8"))
    if reasons := list(_reasons(config)):
        raise UnfitWeights(f"{path}: " + "; ".join(reasons))
    section = _section(config)
    problems = "; ".join(f"{p.path}: {p.what}" for p in ModelConfig.of(section).problems())
    if problems:
        raise UnfitWeights(f"{path}: {problems}")
    theirs = _tensors(path)
    weights = dict(_renamed(path, theirs, config))
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}
    ends = config.get("eos_token_id")
    first = ends[0] if isinstance(ends, list) and ends else ends
    return Llama(
        section,
        weights,
        config.get("max_position_embeddings"),
        first if isinstance(first, int) else None,
        dtypes.pop() if len(dtypes) == 1 else "mixed",
    )


def _reasons(config: Mapping[str, Any]) -> Iterator[str]:
    """Why our model could not compute the same."""
    if config.get("model_type") != "llama":
        yield f"model_type is {config.get('model_type')!r}; only llama can be imported"
        return
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in needed if not isinstance(config.get(key), int)]:
        yield f"{CONFIG} lacks {', '.join(missing)}"
        return
    heads, width = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        yield f"num_key_value_heads {groups} does not divide num_attention_heads {heads}"
    if (config.get("head_dim") or width // heads) * heads != width:
        yield f"head_dim {config.get('head_dim')} times {heads} heads is not hidden_size {width}, as it is here"
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            yield f"{key} is true: linear maps have no bias here"
    if config.get("hidden_act", "silu") != "silu":
        yield f"hidden_act is {config['hidden_act']}: MLPs are SwiGLU (silu) here"
    kind = _rope(config).get("rope_type") or _rope(config).get("type") or "default"
    if kind != "default":
        yield f"rope scaling of type {kind}: positions are plain rotary ones here"


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _section(config: Mapping[str, Any]) -> dict[str, Any]:
    base = _rope(config).get("rope_theta", config.get("rope_theta", 10000.0))
    return {
        "pattern": ["attention"],
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "mixers": {"attention": {"rope_base": float(base)}},
        "cms": {"variant": "sequential", "periods": [1], "unit": "steps", "hidden": config["intermediate_size"]},
        "imports": [],
    }


def _tensors(path: Path) -> dict[str, Tensor]:
    names = [WEIGHTS]
    if (path / HF_INDEX).is_file():
        index = json_of((path / HF_INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    if missing := [name for name in names if not (path / name).is_file()]:
        raise NothingStored(f"{path} lacks {', '.join(missing)}; only safetensors are read, no .bin, which is code")
    return {name: tensor for file in names for name, tensor in read_safetensors(path / file).items()}


def _renamed(path: Path, theirs: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    heads = config["num_attention_heads"]
    copies = heads // (config.get("num_key_value_heads") or heads)
    tied = config.get("tie_word_embeddings", False)
    unknown = []
    for name, tensor in theirs.items():
        layer = _NAME.fullmatch(name)
        ours = f"blocks.{layer[1]}.{_BLOCK[layer[2]]}" if layer and layer[2] in _BLOCK else _TRUNK.get(name)
        if ours is None:
            unknown += [] if name.endswith("rotary_emb.inv_freq") else [name]
        elif not (tied and ours == "head.weight"):
            grouped = copies > 1 and name.endswith(("k_proj.weight", "v_proj.weight"))
            yield ours, _repeated(tensor, heads // copies, copies) if grouped else tensor
    if unknown:
        raise UnfitWeights(f"{path} has weights that a Llama has not: {', '.join(unknown[:3])}")


def _repeated(weight: Tensor, groups: int, copies: int) -> Tensor:
    """[groups * K, D] -> [groups * copies * K, D]: heads of one group follow each other."""
    return torch.repeat_interleave(weight.unflatten(0, (groups, -1)), copies, 0).flatten(0, 1)
