"""The files that `--input` names: files as they are, folders with all that can be read in them."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from data_prep.compressed import SUFFIXES, plain_name
from data_prep.errors import DataError

INPUT_HELP = "files or folders: JSON lines, text or parquet, plain or as gzip, bzip2, xz or Zstandard"
TEXT_SUFFIXES = (".txt", ".md", ".rst")
KNOWN = (".jsonl", ".ndjson", ".json", *TEXT_SUFFIXES, ".parquet")
_OURS = ("manifest.json", ".bad.jsonl")  # what this package writes beside text
_OUR_FOLDERS = (".work", ".cache")
_SIDES = {"train.jsonl", "heldout.jsonl"}


def input_files(paths: Iterable[str], report: Callable[[str], None] = print) -> list[str]:
    """The files at `paths`; a folder stands for its files with a known ending, sorted, in all subfolders.

    What begins with a dot is passed over, and so are this package's own reports and work folders. One line per
    folder says how many files were found and passed over.

    Raises:
        DataError: a folder without such files, with a file in two compressions, or with training and held-out text.
    """
    files = []
    for path in paths:
        if os.path.isdir(path):
            found, other = _walk(path)
            _check(path, found, other)
            report(f"input      {path}: {len(found)} files, {found[0]} to {found[-1]}{_passed_over(other)}")
            files += found
        else:
            files.append(path)
    return files


def refuse_twice(files: Iterable[str]) -> None:
    """Raise DataError if a file is named twice, under any spelling."""
    seen: dict[str, str] = {}
    for number, path in enumerate(files, start=1):
        first = seen.setdefault(os.path.realpath(path), path)
        if len(seen) < number:
            same = "" if first == path else f" (also as {first})"
            raise DataError(f"{path}: named twice{same}; its documents would be in the set twice; name it once")


def _walk(folder: str) -> tuple[list[str], Counter[str]]:
    """Files to read, and how many others there are by ending."""
    found, other = [], Counter[str]()
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".") and not name.endswith(_OUR_FOLDERS)]
        for name in names:
            if name.startswith("."):
                continue
            if plain_name(name).suffix.lower() in KNOWN and not name.endswith(_OURS):
                found.append(os.path.join(parent, name))
            else:
                other[Path(name).suffix or name] += 1
    return sorted(found), other


def _raise(error: OSError) -> None:
    raise error  # os.walk passes over a folder that it may not read


def _check(folder: str, found: list[str], other: Counter[str]) -> None:
    if not found:
        endings = " ".join(KNOWN)
        raise DataError(
            f"{folder}: a folder without files that end in {endings}, compressed ({' '.join(SUFFIXES)}) or"
            f" not{_passed_over(other)}; name its files, for example {folder}/*, with --format"
        )
    plain = Counter(str(plain_name(path)) for path in found)
    twice = [path for path in found if plain[str(plain_name(path))] > 1]
    if twice:
        raise DataError(f"{twice[0]} and {twice[1]}: one text twice by their names; name the files that are meant")
    sides = [path for path in found if plain_name(path).name in _SIDES]
    if len({plain_name(path).name for path in sides}) > 1:
        raise DataError(
            f"{folder}: holds training and held-out text ({sides[0]}, {sides[1]}), which must stay apart;"
            f" name one side, for example {os.path.dirname(sides[0])}/train.jsonl"
        )


def _passed_over(other: Counter[str]) -> str:
    counts = ", ".join(f"{ending} {count}" for ending, count in sorted(other.items()))
    return f"; passed over {sum(other.values())} files ({counts})" if other else ""
