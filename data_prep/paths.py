"""Paths as users give them: `~` is a home folder, a prefix may carry a suffix, and a refusal names the path."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import DataError, PathError

_SUFFIXES = (".bin", ".idx", ".manifest.json")


def user_path(text: str) -> str:
    """The path with a leading `~` or `~NAME` expanded.

    Raises:
        DataError: nobody here has that name, and no file has it either.
    """
    path = os.path.expanduser(text)
    first = path.split(os.sep, 1)[0]
    if first.startswith("~") and not os.path.exists(first):
        raise DataError(f"{text}: no user {first[1:]!r} is known here; ./{text} names a file of this folder")
    return path


def token_prefix(text: str) -> str:
    """The prefix of a token set, given as such, with a slash behind it, or as one of the set's files."""
    path = user_path(text)
    path = path.rstrip(os.sep) or path
    if os.path.exists(f"{path}.idx") or os.path.isdir(path):
        return path
    suffix = next((end for end in _SUFFIXES if path.endswith(end) and os.path.basename(path) != end), "")
    return path.removesuffix(suffix)


def output_prefix(text: str) -> str:
    """`token_prefix` of a set to be written.

    Raises:
        DataError: the text is empty, or names a folder and not a set in it.
    """
    if not text:
        raise DataError("--out is empty; data/mine/train works")
    if text.endswith(os.sep) and os.path.isdir(user_path(text)):
        raise DataError(f"{text}: a folder, and the files need a name; {text}train works")
    return token_prefix(text)


@contextmanager
def naming(path: str | Path, missing: str = "no such file") -> Iterator[None]:
    """What the system refuses inside the block becomes a PathError that names the path and the reason."""
    try:
        yield
    except PathError:
        raise
    except FileNotFoundError as error:
        raise PathError(f"{_named(error, path)}: {missing}") from None
    except OSError as error:
        raise PathError(f"{_named(error, path)}: cannot be read ({reason(error)})") from None


def reason(error: OSError) -> str:
    """The system's words, such as "Permission denied"."""
    return error.strerror or str(error) or type(error).__name__


def _named(error: OSError, path: str | Path) -> str:
    return str(error.filename or path)
