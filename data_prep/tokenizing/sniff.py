"""What a file is, by its first bytes, where reading it as text would go wrong from the first record to the last."""

import json

from data_prep.compressed import open_bytes
from data_prep.errors import DataError

HEAD = 1 << 16
_UTF16_MARKS = {b"\xff\xfe": "UTF-16LE", b"\xfe\xff": "UTF-16BE"}


def check_head(path: str, format: str) -> None:
    """Look at the first 64 KiB of a file that is to be read as JSON lines, lines or text.

    Raises:
        DataError: UTF-16 or binary, parquet, a JSON array or objects over several lines.
    """
    with open_bytes(path) as stream:
        head = stream.read(HEAD)
    if head.startswith(b"PAR1"):
        raise DataError(f"{path}: byte offset 0: a parquet file; --format parquet reads it")
    if name := _UTF16_MARKS.get(head[:2]):
        raise DataError(f"{path}: byte offset 0: the byte-order mark of {name}; {_iconv(path, name)} converts it")
    if found := nul_bytes(head):
        offset, what, encoding = found
        converts = f"{_iconv(path, encoding)} converts it" if encoding else "give its text as UTF-8"
        raise DataError(f"{path}: byte offset {offset}: {what}; {converts}")
    if format == "jsonl" and (wrong := _not_lines(head)):
        what, command = wrong
        converts = f"`{command} {path} > NEW.jsonl` converts it"
        raise DataError(f"{path}: byte offset 0: {what}, not JSON lines (an object on each); {converts}")


def nul_bytes(data: bytes) -> tuple[int, str, str] | None:
    """(offset of the first, what is wrong, encoding or "") if the bytes hold too many NULs to be text; else None.

    One NUL in 32 bytes is enough: UTF-16 has one per space or newline in any language.
    """
    count = data.count(0)
    if count * 32 <= len(data) or (count < 4 and count * 3 < len(data)):
        return None
    odd = data[1::2].count(0)
    encoding = "" if count < 4 else "UTF-16LE" if odd >= 0.9 * count else "UTF-16BE" if odd <= 0.1 * count else ""
    kind = f"{encoding}, by their places" if encoding else "not text in UTF-8"
    return data.index(0), f"{count} of {len(data)} bytes are NUL: {kind}", encoding


def _iconv(path: str, encoding: str) -> str:
    return f"`iconv -f {encoding} -t UTF-8 {path} > NEW`"


def _not_lines(head: bytes) -> tuple[str, str] | None:
    """(what it is, the command that makes JSON lines of it) of a JSON text that is not lines; else None."""
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    first, _, rest = text.partition("\n")
    value, end = _first_value(text)
    second, length = _first_value(rest)
    if value is None and isinstance(second, dict) and not rest[length:].split("\n")[0].strip():
        return None  # one bad line before a good one
    inside = text[1:].lstrip()
    if text.startswith("[") and inside.startswith("{") and (end == 0 or end > len(first) or not rest.strip()):
        return "a JSON array", "jq -c '.[]'"
    if text.startswith("{") and (end > len(first) if value is not None else first.strip() == "{"):
        return "JSON objects over several lines", "jq -c ."
    return None


def _first_value(text: str) -> tuple[object, int]:
    """The JSON value that the text begins with and where it ends; (None, 0) if that is cut off or wrong."""
    try:
        return json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, 0
