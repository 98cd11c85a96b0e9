"""Model sections by the names of the models that this project began with."""

from typing import Any

from hope.config import CmsConfig, ModelConfig
from hope.memory.config import MemoryConfig
from hope.memory.in_context_config import InContextConfig


def named(kind: str = "hope", *, memory: MemoryConfig | None = None, **settings: Any) -> ModelConfig:
    """hope, hope_attention (attention and CMS) or transformer (attention and one MLP)."""
    if kind == "hope":
        return ModelConfig(mixers={"hope": memory or MemoryConfig()}, **settings)
    if kind == "transformer":
        settings = {**settings, "cms": CmsConfig(periods=[1])}
    return ModelConfig(pattern=["attention"], **settings)


def fast(chunk: int, **keys: Any) -> InContextConfig:
    """A level in context that writes and forgets enough to be seen."""
    return InContextConfig(**{"chunk": chunk, "rate": 0.5, "forget_bias": -2.0, **keys})


LEVELS = {
    "in-context": CmsConfig(
        periods=[1, 2], hidden=16, in_context=[fast(2), fast(4, objective="target", read="causal")]
    ),
    "in-context-independent": CmsConfig("independent", [1, 2], hidden=16, in_context=[fast(3), fast(4)]),
    "in-context-nested": CmsConfig("nested", [1, 2], hidden=16, in_context=[fast(2), fast(6)]),
}
"""CMS of models with levels in context."""
