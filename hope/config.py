"""Model section of the configuration: what is computed, nothing about where.

Every mixer owns its section (`model.mixers.NAME`, hope/mixers/). The paper's open choices are fields there and here.
"""

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from hope.memory.in_context_config import InContextConfig, order_problems
from hope.mixers import MIXERS, Mixer, Trunk
from hope.parameters import UndeclaredParameter, declarations
from hope.renamed import current_model
from hope.sections import MixerSection, Problem, only_if, sections_named_by

INIT_WORDS = ("vocab", "tokenizer", "settings", "mixers")
"""What `model.init_allow` may name; hope/initial.py says what each allows."""


def import_modules(names: Iterable[str]) -> None:
    """Import `model.imports`, also from the current directory. Whatever a module raises is raised here."""
    for name in names:
        # At the end: a job runs a copy of the program, which a checkout in the current directory must not replace.
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())
        importlib.import_module(name)


def mixer_sections() -> dict[str, type[MixerSection]]:
    """The section of every mixer that is registered now, by name."""
    return {name: kind.section for name, kind in MIXERS.items()}


@dataclass
class CmsConfig:
    """Continuum memory system (Eq. 70-74): a chain of MLP blocks, each with its own clock."""

    variant: Literal["sequential", "independent", "nested"] = "sequential"
    """sequential: Eq. 70/73, one block after the other; independent: Eq. 74, a learned weighted sum; nested: Eq. 72,
    of the levels in context each starts from the slower one's weights, and anew when those are rewritten."""
    periods: list[int] = field(default_factory=lambda: [1, 4])
    """Time between updates of each level, fastest first; its length is the number of levels. [1]: one ordinary MLP."""
    unit: Literal["steps", "tokens"] = "steps"
    """What periods count: optimizer steps, or tokens (multiples of train.global_batch x train.seq_len)."""
    hidden: int | Literal["matched"] | None = None
    """Hidden width of each level's SwiGLU; null: 8/3 width, divided over the levels, rounded to 16; matched: the one
    that gives the model the parameters of a Transformer++ with its trunk, within 2 %. A run records the number."""
    in_context: list[InContextConfig] = field(default_factory=list)
    """[{chunk: 16, objective: next}, {chunk: 64}, ...]: levels before these, fastest first, whose MLPs every sequence
    rewrites as it goes (`hope.memory.in_context_config.InContextConfig`, docs/model.md)."""

    def __post_init__(self) -> None:
        """Records have entries as plain values."""
        typed = lambda entry: InContextConfig(**entry) if isinstance(entry, Mapping) else entry
        self.in_context = [typed(entry) for entry in self.in_context]

    @property
    def chain(self) -> str:
        """sequential or independent: how levels are put together."""
        return "independent" if self.variant == "independent" else "sequential"

    @property
    def groups(self) -> list[list[InContextConfig]]:
        """The levels in context by the modules that they are: nested ones are one."""
        nested = self.variant == "nested" and self.in_context
        return [self.in_context] if nested else [[level] for level in self.in_context]

    def problems(self, path: str) -> Iterator[Problem]:
        if not self.periods or min(self.periods) < 1:
            yield Problem(f"{path}.periods", f"{self.periods}: need at least one level, every period >= 1", "[1, 4]")
        elif self.periods != sorted(self.periods):
            yield Problem(f"{path}.periods", f"{self.periods} is not fastest first", f"{sorted(self.periods)}")
        if isinstance(self.hidden, int) and self.hidden < 1:
            yield Problem(f"{path}.hidden", f"{self.hidden} is less than 1", "null")
        yield from order_problems(self.in_context, self.variant == "nested", f"{path}.in_context")


@dataclass
class ModelConfig:
    """The trunk: embedding, `layers` blocks of width `width`, norm, head."""

    pattern: list[str] = field(default_factory=lambda: ["hope"])
    """Mixer of each layer by name, repeated from the first layer on until model.layers are named; the last repetition
    may be cut. [hope]; [attention]; [hope, hope, hope, attention]."""
    vocab_size: int = 8192
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    width: int = 384
    """Model width d."""
    layers: int = 8
    """Number of blocks."""
    heads: int = 6
    """Heads of the memory or the attention; width / heads is the size of one memory."""
    tie_embeddings: bool = True
    """Share the embedding with the output head."""
    norm_eps: float = 1e-6
    """Added to the mean square in the norms of the trunk."""
    depth_scaled_init: bool = False
    """Initial output maps of mixers and MLPs over the root of their number in the model (Radford et al., 2019)."""
    mixers: dict[str, Any] = sections_named_by("pattern", mixer_sections)
    """A section for every mixer that the pattern names, with that mixer's keys."""
    cms: CmsConfig = field(default_factory=CmsConfig)
    """Continuum memory system: the MLPs of every block."""
    imports: list[str] = field(default_factory=list)
    """Python modules to import first: they register mixers of your own (docs/extending.md)."""
    init: str | None = None
    """Weights that a new run starts from: a run, a checkpoint or exported weights (docs/weights.md). Optimizer,
    schedule, data and clocks begin anew. A run that resumes from its own checkpoint does not read it."""
    init_allow: list[str] = only_if("init", factory=list)
    """Differences from `init` that change what is computed: vocab, tokenizer, settings, mixers."""
    init_levels: list[int] | None = only_if("init", default=None)
    """The level of cms.periods, from 0, that each of `init`'s levels becomes, in order; null: the first ones. Others
    start as the identity. [1] places a pretrained MLP in the second level, behind a new fast one."""

    def __post_init__(self) -> None:
        """Give every mixer of the pattern its section, and every section its type. What is unknown stays as it is, for
        `problems` to name."""
        import_modules(self.imports)
        for name in dict.fromkeys((*self.pattern, *self.mixers)):
            section = self.mixers.get(name, {})
            if name in MIXERS and not isinstance(section, MixerSection):
                self.mixers = {**self.mixers, name: MIXERS[name].section(**(section or {}))}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "ModelConfig":
        """The section that a checkpoint or an export records, which may be that of an earlier version.

        Raises:
            ValueError: it has a key that this version does not know, or says what this version cannot do.
        """
        values = current_model(record)
        try:
            return cls(**{**values, "cms": CmsConfig(**values.get("cms", {}))})
        except TypeError as error:  # an unknown key
            raise ValueError(f"the recorded model section cannot be read: {error}") from None

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def mixer_of_layer(self) -> list[str]:
        """The mixer's name of each layer: layer i has pattern[i mod len(pattern)]."""
        return [self.pattern[layer % len(self.pattern)] for layer in range(self.layers)]

    def build_mixer(self, name: str) -> Mixer:
        """A new mixer of this kind, parameters not yet filled."""
        build: Callable[[Trunk, Any], Mixer] = MIXERS[name].build
        return build(Trunk(self.width, self.heads, self.layers), self.mixers[name])

    @property
    def periods(self) -> list[int]:
        """Clock of each level of MLPs."""
        return list(self.cms.periods)

    def in_context_heads(self) -> list[int]:
        """MLPs side by side of every level in context."""
        return [self.heads if level.heads is None else level.heads for level in self.cms.in_context]

    def divided_by_mixers(self) -> list[tuple[str, int]]:
        """(key, value) of what tensor-parallel ranks divide in mixers besides heads."""
        names = [name for name in dict.fromkeys(self.pattern) if name in MIXERS]
        return [(f"model.mixers.{name}.{key}", size) for name in names for key, size in self.mixers[name].divided()]

    def hidden_per_level(self) -> int:
        """SwiGLU width of a level: all levels together cost as many parameters as one 4x MLP, 8 d^2.

        Raises:
            ValueError: it is `matched`, and nobody has found the number (`hope.matched`).
        """
        if self.cms.hidden == "matched":
            raise ValueError("cms.hidden matched is no number yet: hope.matched.match(config)")
        if self.cms.hidden is not None:
            return self.cms.hidden
        return max(16, 8 * self.width // 3 // len(self.periods) // 16 * 16)

    def problems(self, path: str = "model") -> Iterator[Problem]:
        """Everything in this section that cannot work."""
        for name in ("vocab_size", "width", "layers", "heads"):
            if getattr(self, name) < 1:
                yield Problem(f"{path}.{name}", f"{getattr(self, name)} is less than 1", "a positive number")
        if min(self.width, self.heads) > 0 and self.width % self.heads:
            fits = [h for h in range(1, self.width + 1) if self.width % h == 0 and abs(h - self.heads) <= self.heads]
            yield Problem(
                f"{path}.heads",
                f"width {self.width} is not a multiple of heads {self.heads}",
                "heads " + ", ".join(map(str, sorted(fits, key=lambda h: abs(h - self.heads))[:3])),
            )
        if not self.norm_eps > 0:
            yield Problem(f"{path}.norm_eps", f"{self.norm_eps} is not positive", "1e-6")
        yield from self._pattern_problems(path)
        yield from self.cms.problems(f"{path}.cms")
        for number, level in enumerate(self.cms.in_context):
            yield from level.problems(f"{path}.cms.in_context[{number}]", self.width, self.heads)
        for word in self.init_allow:
            if word not in INIT_WORDS:
                yield Problem(f"{path}.init_allow", f"there is no word {word!r}", f"some of [{', '.join(INIT_WORDS)}]")

    def _pattern_problems(self, path: str) -> Iterator[Problem]:
        known = ", ".join(MIXERS)
        if not self.pattern:
            yield Problem(f"{path}.pattern", "names no mixer", f"[hope]; known: {known}")
        elif len(self.pattern) > self.layers >= 1:
            what = f"names {len(self.pattern)} mixers for {self.layers} layers, so that some are never used"
            fix = f"{self.pattern[: self.layers]}, or model.layers {len(self.pattern)}"
            yield Problem(f"{path}.pattern", what, fix)
        for name in dict.fromkeys(self.pattern):
            if name not in MIXERS:
                near = "".join(f"did you mean: {found}; " for found in difflib.get_close_matches(name, MIXERS, n=1))
                fix = f"{near}known: {known}; or model.imports"
                yield Problem(f"{path}.pattern", f"no mixer is called {name}", fix)
            elif self._shaped:
                section, place = self.mixers[name], f"{path}.mixers.{name}"
                own = [*section.problems(place, self.head_dim), *section.problems_of_heads(place, self.heads)]
                yield from own
                yield from [] if own else self._undeclared(path, name)

    @property
    def _shaped(self) -> bool:
        return min(self.width, self.heads) > 0 and self.width % self.heads == 0

    def _undeclared(self, path: str, name: str) -> Iterator[Problem]:
        try:
            with torch.device("meta"):
                list(declarations(self.build_mixer(name)))
        except UndeclaredParameter as error:
            yield Problem(f"{path}.pattern", f"mixer {name}: {error}", "")

    def warn_hazards(self) -> None:
        """Warn, once per setting, about choices that diverged when they were measured."""
        for name in dict.fromkeys(self.mixer_of_layer):
            for sentence in self.mixers[name].hazards():
                warnings.warn(f"model.mixers.{name}: {sentence} (docs/results.md)", stacklevel=2)
        for number, level in enumerate(self.cms.in_context):
            for sentence in level.hazards():
                warnings.warn(f"model.cms.in_context[{number}]: {sentence} (docs/LOG.md)", stacklevel=2)
