"""Files that make exported weights a model of Hugging Face's `transformers`.

config.json             ours and theirs in one: `hope.pretrained.load` reads the export too
modeling_hope.py        config and model class; imports the installed package `hope`
generation_config.json  which token ends a text
tokenization_hope.py    for a sentencepiece model, which transformers would not read with our exact round trip
tokenizer_config.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hope.nesting import json_of
from hope.stored.manifest import write_durably
from hope.stored.tokenizer import HF_TOKENIZER, TOKENIZER

MODELING, TOKENIZATION = "modeling_hope", "tokenization_hope"
_TOKENIZATION = '"""The tokenizer of hope-pretrain, for `transformers`."""\n\nfrom {module} import {name}\n'
_TOKENIZER_CLASS = ("data_prep.tokenizing.huggingface", "HopeTokenizer")


def described(ours: Mapping[str, Any], eos_id: int | None) -> dict[str, Any]:
    """config.json: what `export` writes of a model, with what `transformers` asks for."""
    return {
        "architectures": ["HopeForCausalLM"],
        "auto_map": {"AutoConfig": f"{MODELING}.HopeConfig", "AutoModelForCausalLM": f"{MODELING}.HopeForCausalLM"},
        "model_type": "hope",
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
        **ours,
    }


def write_files(out: Path, eos_id: int | None, seq_len: int | None) -> list[str]:
    """Everything but config.json, weights and the tokenizer's own file, which is in `out` already; their names."""
    files = {f"{MODELING}.py": Path(__file__).with_name(f"{MODELING}.py").read_text(encoding="utf-8")}
    if eos_id is not None:
        files["generation_config.json"] = _json({"eos_token_id": eos_id, "pad_token_id": eos_id})
    length = {} if seq_len is None else {"model_max_length": seq_len}
    if (out / TOKENIZER).is_file():
        module, name = _TOKENIZER_CLASS
        files[f"{TOKENIZATION}.py"] = _TOKENIZATION.format(module=module, name=name)
        auto = {"auto_map": {"AutoTokenizer": [f"{TOKENIZATION}.{name}", None]}, "tokenizer_class": name}
        files["tokenizer_config.json"] = _json({**auto, **length})
    elif (out / HF_TOKENIZER).is_file():
        eos = {} if eos_id is None else {"eos_token": _piece(out / HF_TOKENIZER, eos_id)}
        files["tokenizer_config.json"] = _json({"tokenizer_class": "PreTrainedTokenizerFast", **eos, **length})
    for name, content in files.items():
        write_durably(out / name, content)
    return list(files)


def _piece(path: Path, number: int) -> str | None:
    known = json_of(path.read_text(encoding="utf-8"))
    added = {entry["id"]: str(entry["content"]) for entry in known.get("added_tokens", ())}
    return added.get(number)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"
