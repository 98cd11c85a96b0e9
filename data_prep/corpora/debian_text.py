"""Files of documentation packages to plain text: HTML, POD, gzip; encodings and white space made uniform."""

import gzip
import html.parser
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

_HIDDEN = {"script", "style", "nav", "head", "svg", "noscript", "footer", "header"}
_LISTS_AND_TABLES = {"li", "ul", "ol", "dl", "dt", "dd", "table", "tr"}
_BLOCKS = (
    _LISTS_AND_TABLES | {"p", "div", "pre", "section", "blockquote", "page", "title"} | {f"h{n}" for n in range(1, 7)}
)
_VOID = {"br", "hr", "img", "meta", "link", "input", "col", "area", "base", "wbr"}
_NAVIGATION = re.compile(r"\b(navheader|navfooter|sphinxsidebar|related|footer|toc|navigation|headerlink)\b")
_POD_COMMAND = re.compile(r"(?m)^=(head\d|item|over|back|cut|encoding|for|begin|end|pod)\b ?")
_POD_FORMAT = re.compile(r"[BCIFLSXZ]<+ ?([^<>]*?) ?>+")


def clean(text: str) -> str:
    """NFC, newlines only, no trailing blanks, at most one empty line in a row, no paragraph marks of HTML manuals."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\xa0", " ").replace("\u00b6", ""))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def read_any(path: Path) -> str:
    """A text file, gzip-compressed if its name says so; UTF-8, or Latin-1 where that fails."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def html_text(source: str) -> str:
    """The readable text of an HTML (or Mallard) page, without navigation, scripts and sidebars."""
    page = _Page()
    page.feed(source)
    page.close()
    return clean("".join(page.pieces))


def pod_text(source: str) -> str:
    """Perl's POD without its commands and formatting codes."""
    return clean(_POD_FORMAT.sub(r"\1", _POD_COMMAND.sub("", source)))


def matching(root: Path, patterns: Iterable[str]) -> list[Path]:
    """Regular files below `root` for glob patterns, sorted, each once; links are left out (they repeat text)."""
    found = {path for pattern in patterns for path in root.glob(pattern)}
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._hidden: list[str] = []  # open elements from the hidden one inwards
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            if tag in ("br", "hr") and not self._hidden:
                self.pieces.append("\n")
            return
        names = " ".join(value or "" for key, value in attrs if key in ("class", "id", "role"))
        if self._hidden or tag in _HIDDEN or _NAVIGATION.search(names):
            self._hidden.append(tag)
            return
        self._preformatted += tag == "pre"
        if tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            if tag in self._hidden:
                while self._hidden.pop() != tag:
                    pass
            return
        self._preformatted -= tag == "pre" and self._preformatted > 0
        if tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(data if self._preformatted else re.sub(r"\s+", " ", data))
