"""Mixers, one file per family. Importing this package registers those that come with it."""

from hope.mixers import attention, linear, mamba2, self_modifying, titans, titans_attention, titans_context
from hope.mixers.base import MIXERS, Mixer, MixerKind, Report, State, Trunk, mixer

__all__ = [
    "MIXERS",
    "Mixer",
    "MixerKind",
    "Report",
    "State",
    "Trunk",
    "attention",
    "linear",
    "mamba2",
    "mixer",
    "self_modifying",
    "titans",
    "titans_attention",
    "titans_context",
]
