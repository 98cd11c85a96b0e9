"""Model sections by the names of the models that this project began with."""

from typing import Any

from hope.config import CmsConfig, ModelConfig
from hope.memory.config import MemoryConfig


def named(kind: str = "hope", *, memory: MemoryConfig | None = None, **settings: Any) -> ModelConfig:
    """hope, hope_attention (attention and CMS) or transformer (attention and one MLP)."""
    if kind == "hope":
        return ModelConfig(mixers={"hope": memory or MemoryConfig()}, **settings)
    if kind == "transformer":
        settings = {**settings, "cms": CmsConfig(periods=[1])}
    return ModelConfig(pattern=["attention"], **settings)
