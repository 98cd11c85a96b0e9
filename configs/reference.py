"""A reference table of every configuration key, made from the fields' own docstrings."""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from typing import Any

from configs.tree import Use, leaves, strip_optional
from configs.used import word


def key_table(cls: type) -> str:
    """Markdown table of path, type, default and meaning of every key below the dataclass `cls`."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    docs: dict[type, dict[str, str]] = {}
    for path, hint, owner, field, uses in leaves(cls):
        meaning = docs.setdefault(owner, field_docs(owner)).get(field.name, "")
        cells = (f"`{path}`", type_name(hint), default_text(field), meaning + "".join(map(_condition, uses)))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _condition(use: Use) -> str:
    if use.listed:
        return f" Only with {use.values[0]} in {use.governor}."
    values = " or ".join(map(word, use.values))
    return f" Only with {use.governor} {values}." if values else f" Only with {use.governor} set."


def field_docs(cls: type) -> dict[str, str]:
    """{field: meaning}: the string under each field, else the class docstring's `Attributes:` entry, else the
    comment on the field's line or right below it."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    attributes = _attributes(inspect.getdoc(cls) or "")
    docs: dict[str, str] = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[node.target.id] = " ".join(str(following.value.value).split())
        else:
            docs[node.target.id] = attributes.get(node.target.id) or _comment(lines, node)
    return docs


def _attributes(doc: str) -> dict[str, str]:
    """Entries `name: meaning` of a docstring's `Attributes:` block, continuation lines joined."""
    _, _, block = doc.partition("Attributes:\n")
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", block, flags=re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in entries}


def _comment(lines: list[str], node: ast.AnnAssign) -> str:
    last = node.end_lineno or node.lineno
    beside = lines[last - 1][node.end_col_offset or 0 :].strip()
    below = []
    for line in lines[last:]:
        if not line.strip().startswith("#"):
            break
        below.append(line.strip().lstrip("# "))
    return " ".join(part for part in [beside.lstrip("# "), *below] if part)


def type_name(hint: Any) -> str:
    """`int`, `float or null`, `cosine, linear`: the type as a reader of YAML thinks of it."""
    inner = strip_optional(hint)
    if inner is not hint:
        return f"{type_name(inner)} or null"
    if typing.get_origin(inner) is typing.Literal:
        return ", ".join(map(str, typing.get_args(inner)))
    if typing.get_origin(inner) is types.UnionType:
        return " or ".join(map(type_name, typing.get_args(inner)))
    if typing.get_origin(inner) is not None:
        return str(inner).replace("typing.", "")
    return getattr(inner, "__name__", str(inner))


def default_text(field: dataclasses.Field[Any]) -> str:
    """The default as YAML would write it; `required` without one."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return word(value)
