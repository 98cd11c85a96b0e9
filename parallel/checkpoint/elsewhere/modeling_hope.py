"""A model trained with hope-pretrain, for `transformers`: a copy of this file lies in every export for it.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

The package `hope-pretrain` must be installed: the model is its `hope.model.Model`. Needs transformers 5.24 or newer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from hope.config import ModelConfig
from hope.mixers.base import map_tensors
from hope.model import Model, States


class HopeConfig(PretrainedConfig):
    """config.json: `model` is the model section of the run, `seq_len` its training window in tokens."""

    model_type = "hope"

    def __init__(self, model: dict[str, Any] | None = None, **more: Any) -> None:
        self.model = model or {}
        section = ModelConfig.of(self.model)
        self.vocab_size, self.hidden_size = section.vocab_size, section.width
        self.num_hidden_layers, self.num_attention_heads = section.layers, section.heads
        # ours is one parameter that is used twice: there is nothing to tie
        super().__init__(**{**more, "tie_word_embeddings": False})


class HopeCache:
    """What the model carries from one call to the next, after `seen` tokens of every sequence."""

    is_compileable = False
    is_linear = (True,)
    """transformers cuts the input itself only for caches that hold every key."""

    def __init__(self, states: States, seen: int) -> None:
        self.states, self.seen = states, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i goes on from what was sequence beam_idx[i]."""
        chosen = lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device))
        self.states = {block: map_tensors(states, chosen) for block, states in self.states.items()}


@dataclass
class HopeOutput(ModelOutput):
    """loss: mean cross-entropy in nats, with labels. logits: [B, T, V]. cache: for the next call."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: HopeCache | None = None


class HopeForCausalLM(PreTrainedModel, GenerationMixin):
    """`hope.model.Model` with batch first. Without a cache a call starts every sequence anew."""

    config_class = HopeConfig
    base_model_prefix = "model"
    _is_stateful = True  # a state cannot be cut back, as assisted generation would want it

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        self.model = Model(ModelConfig.of(config.model))
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Every weight is in the file."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, cache: HopeCache | None = None, **more: Any
    ) -> dict[str, Any]:
        """The tokens that the cache has not seen."""
        used: dict[str, Any] = {name: more[name] for name in ("attention_mask", "use_cache") if name in more}
        return {"input_ids": input_ids[:, cache.seen if cache else 0 :], "cache": cache, **used}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: HopeCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> HopeOutput | tuple[Any, ...]:
        """Token ids [B, T] -> logits [B, T, V], of the last `logits_to_keep` tokens if that is not 0.

        Raises:
            ValueError: the mask hides a token. A recurrent memory would have to be told; batch prompts of one length.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("padded prompts are not supported: batch prompts of one length, or give one at a time")
        keep = bool(use_cache) and not self.training
        logits_TBV, states = self.model(input_ids.T, cache.states if cache else None, keep_state=keep)
        logits = logits_TBV.transpose(0, 1)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        after = HopeCache(states, input_ids.shape[1] + (cache.seen if cache else 0)) if keep else None
        output = HopeOutput(loss, logits[:, -logits_to_keep:], after)
        return output.to_tuple() if return_dict is False else output
