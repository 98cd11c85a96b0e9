"""Ways to break a layout on purpose, in a process of its own."""

import re
from collections.abc import Callable

from parallel.compute import gradients


def forget(pattern: str) -> Callable[[], None]:
    """Break the rule of some parameters: their gradients are no longer summed. `*` is one part of a name."""

    def spoil() -> None:
        original = gradients.partial_parameters
        forgotten = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        gradients.partial_parameters = lambda models, sequence: (
            (name, parameter) for name, parameter in original(models, sequence) if not forgotten.fullmatch(name)
        )

    return spoil
