"""Prompts from a file: one in each line, or JSON lines with "prompt"."""

from __future__ import annotations

from pathlib import Path

from hope.generate.errors import GenerationError
from hope.nesting import json_of


def read_prompts(path: Path) -> list[str]:
    """The prompts in `path`, UTF-8. If the first line is a JSON object, all are.

    Raises:
        GenerationError: the file cannot be read or has no prompt, or a line has none; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise GenerationError(f"--batch {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise GenerationError(
            f"--batch {path} is not UTF-8 text: byte {error.start} is {error.object[error.start]}"
        ) from None
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise GenerationError(f'--batch {path} is empty; it takes one prompt a line, or JSON lines with "prompt"')
    as_json = _object(lines[0]) is not None
    return [_prompt(line, f"--batch {path} line {number}", as_json) for number, line in enumerate(lines, 1)]


def checked(text: str, place: str) -> str:
    """`text`, from `place`. Raises GenerationError if it is not Unicode: bytes that are no UTF-8 arrive as halves of
    characters, and would be other tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GenerationError(f"{place} is not UTF-8 text: character {error.start} is {text[error.start]!r}") from None
    return text


def _prompt(line: str, place: str, as_json: bool) -> str:
    if not as_json:
        if not line:
            raise GenerationError(f"{place} is empty; a prompt needs at least one character")
        return line
    entry = _object(line)
    prompt = None if entry is None else entry.get("prompt")
    if not isinstance(prompt, str):
        raise GenerationError(f'{place} is not a JSON object with a text "prompt", such as {{"prompt": "Once"}}')
    if not prompt:
        raise GenerationError(f"{place} has an empty prompt; it needs at least one character")
    return checked(prompt, place)


def _object(line: str) -> dict[str, object] | None:
    try:
        value = json_of(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
