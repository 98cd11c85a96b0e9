"""Extractors: an unpacked package below `root` to (name, text) pairs in a fixed order. Standard library only."""

import gzip
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from data_prep.corpora.debian_text import clean, html_text, matching, pod_text, read_any
from data_prep.errors import DataError

Named = tuple[str, str]
Extractor = Callable[[Path], Iterator[Named]]

# Single glosses are too short to be a document: neighbours are joined until there are so many characters.
JOINED_CHARACTERS = 2000
_DICT_DIGITS = {
    character: value
    for value, character in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}


def files_as(convert: Callable[[str], str], *patterns: str, without: str = "") -> Extractor:
    """One document per file; `without` is a part of a path that is left out."""

    def extract(root: Path) -> Iterator[Named]:
        for path in matching(root, patterns):
            name = path.relative_to(root).as_posix()
            if not without or without not in name:
                yield name.removeprefix("usr/share/doc/"), convert(read_any(path))

    return extract


def plain(*patterns: str, without: str = "") -> Extractor:
    """Text files."""
    return files_as(clean, *patterns, without=without)


def pages(*patterns: str) -> Extractor:
    """HTML files."""
    return files_as(html_text, *patterns)


def pod(*patterns: str) -> Extractor:
    """Perl POD files."""
    return files_as(pod_text, *patterns)


def joined(name: str, entries: Iterable[str]) -> Iterator[Named]:
    """Neighbouring short entries as documents of about JOINED_CHARACTERS."""
    held: list[str] = []
    size = number = 0
    for entry in entries:
        held.append(entry)
        size += len(entry)
        if size > JOINED_CHARACTERS:
            yield f"{name}/{number}", "\n\n".join(held)
            held, size, number = [], 0, number + 1
    if held:
        yield f"{name}/{number}", "\n\n".join(held)


def dictd(name: str) -> Extractor:
    """A dictionary of the DICT server (RFC 2229): .index lines are headword, offset, length in base 64."""

    def extract(root: Path) -> Iterator[Named]:
        folder = root / "usr/share/dictd"
        data = gzip.decompress((folder / f"{name}.dict.dz").read_bytes())
        spans = _dict_spans((folder / f"{name}.index").read_text("utf-8", errors="replace"))
        entries = (data[start : start + size].decode("utf-8", "replace") for start, size in spans)
        yield from joined(name, (clean(re.sub(r"(?m)^\s*\[1913 Webster\]\s*$", "", text)) for text in entries))

    return extract


def _dict_spans(index: str) -> list[tuple[int, int]]:
    """(offset, length) of every entry once, in file order; headwords share entries."""
    spans = set()
    for line in index.splitlines():
        fields = line.split("\t")
        if len(fields) >= 3 and not fields[0].startswith(("00database", "00-database")):
            spans.add((_base64_number(fields[1]), _base64_number(fields[2])))
    return sorted(spans)


def _base64_number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DICT_DIGITS[digit]
    return value


def wordnet(root: Path) -> Iterator[Named]:
    """WordNet's data files: "words: gloss" lines, 40 to a document. Layout: wndb(5WN)."""
    for part in ("noun", "verb", "adj", "adv"):
        lines = (root / f"usr/share/wordnet/data.{part}").read_text("utf-8").splitlines()
        glosses = [_gloss(line) for line in lines if not line.startswith("  ")]
        for start in range(0, len(glosses), 40):
            yield f"{part}/{start // 40}", "\n".join(glosses[start : start + 40])


def _gloss(line: str) -> str:
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    count = int(fields[3], 16)
    words = (word.replace("_", " ").split("(")[0] for word in fields[4 : 4 + 2 * count : 2])
    return f"{', '.join(words)}: {gloss.strip()}"


def jargon(root: Path) -> Iterator[Named]:
    """The Jargon File is one file: its entries (":word:" at the start of a line) are joined to documents."""
    (path,) = matching(root, ["usr/share/doc/jargon-text/jargon.txt*"])
    entries = re.split(r"(?m)^(?=\s{0,3}:[^:\n]+:)", clean(read_any(path)))
    yield from joined("jargon", (entry.strip() for entry in entries if entry.strip()))


def kjv(root: Path) -> Iterator[Named]:
    """One document per chapter. The package keeps its text compressed in a way of its own; its program reads it."""
    command = [str(root / "usr/bin/bible"), "-f", "-p", str(root / "usr/lib"), "gen1:1-rev22:21"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        raise DataError(f"{command[0]}: cannot read the packed text ({error}); leave out the source kjv") from None
    yield from kjv_chapters(run.stdout)


def kjv_chapters(verses: str) -> Iterator[Named]:
    """Chapters out of lines like "Gen1:1 In the beginning ..."."""
    chapters: dict[str, list[str]] = {}
    for line in verses.splitlines():
        if found := re.match(r"(\S+?) ?(\d+):(\d+) (.*)", line):
            chapters.setdefault(f"{found[1]}{found[2]}", []).append(found[4])
    for name, lines in chapters.items():
        yield name, "\n".join(lines)
