"""What source files import, how folders depend on each other, and how long things are: read, not imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("hope", "parallel", "configs", "launch", "data_prep")
KERNELS = "fused.py"  # of any folder: the files that may know triton
PROGRAM = "__main__.py"  # below hope/: puts together what it needs, as pretrain_hope.py does, and nothing imports it
MAKES_NO_GROUPS = ("torch.distributed", "megatron", "deepspeed", "parallel.start", "parallel.optimizer",
                   "parallel.compute", "parallel.checkpoint", "parallel.referee")  # fmt: skip

Edge = tuple[str, str]


def own_files(root: Path = ROOT) -> list[Path]:
    """The product's source files, without tests and benchmarks."""
    return [root / "pretrain_hope.py", *(path for name in PACKAGES for path in sorted((root / name).rglob("*.py")))]


def imports(source: str) -> set[str]:
    """Full names of all that a file imports, wherever in it: `from torch import distributed` is `torch.distributed`.

    Also `importlib.import_module("a.b")`, and `torch.distributed` as an attribute of torch. Relative imports, which
    this repository does not use, begin with a dot.
    """
    return {name for node in ast.walk(ast.parse(source)) for name in _imported(node)}


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        start = "." * node.level + (node.module or "")
        yield from (f"{start}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
        yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))
    elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
        yield "torch.distributed"


def within(name: str, packages: Iterable[str]) -> bool:
    """Whether `name` is one of them or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def impure(source: str, file: str) -> set[str]:
    """Imports that a file of hope/ must not have: anything but torch, numpy, the standard library and hope.

    A program has none of these.
    """
    if file == PROGRAM:
        return set()
    allowed = {"torch", "hope", "numpy", *sys.stdlib_module_names, *(["triton"] if file == KERNELS else [])}
    found = imports(source)
    return {name for name in found if within(name, ["torch.distributed"]) or name.split(".")[0] not in allowed}


def imported_programs(source: str) -> set[str]:
    """The `__main__` modules that a file imports."""
    return {name for name in imports(source) if "__main__" in name.split(".")}


def is_program_of_hope(path: Path, root: Path = ROOT) -> bool:
    """Whether a file is a `__main__.py` below hope/."""
    return path.name == PROGRAM and path.is_relative_to(root / "hope")


def group_makers(source: str) -> set[str]:
    """Imports that a file of parallel/layout must not have: numbers and shapes know no process group."""
    return {name for name in imports(source) if within(name, MAKES_NO_GROUPS) or name.startswith(".")}


def folder_edges(root: Path = ROOT) -> set[Edge]:
    """(folder, folder that one of its modules imports from), for our own packages; "." has pretrain_hope.py.

    A folder and its sub-folders are one house: what is shared stands at the top, what puts the parts together too.
    Edges between them are left out, and those of hope's programs, which nothing imports.
    """
    files = {path: path.relative_to(root).parent.as_posix() for path in own_files(root) if path.exists()}
    folders = {_module(path.relative_to(root)): folder for path, folder in files.items()}
    edges = set()
    for path, folder in files.items():
        if is_program_of_hope(path, root):
            continue
        for name in imports(path.read_text()):
            target = _folder_of(name, folders)
            if target not in (None, folder) and not _one_inside_the_other(folder, target):
                edges.add((folder, target))
    return edges


def module_edges(root: Path = ROOT) -> set[Edge]:
    """(module, module that it imports, lazily or not), for our own packages."""
    files = {_module(path.relative_to(root)): path for path in own_files(root) if path.exists()}
    edges = set()
    for module, path in files.items():
        for name in imports(path.read_text()):
            parts = name.split(".")
            names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
            target = next((n for n in names if n in files), None)
            if target not in (None, module):
                edges.add((module, target))
    return edges


def _one_inside_the_other(folder: str, other: str) -> bool:
    return other.startswith(f"{folder}/") or folder.startswith(f"{other}/")


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _folder_of(name: str, folders: dict[str, str]) -> str | None:
    """Of the module that `name` is, or is a member of; None if it is not ours.

    Raises:
        ValueError: a relative import.
    """
    if name.startswith("."):
        raise ValueError(f"{name}: relative imports are not followed")
    parts = name.split(".")
    modules = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((folders[module] for module in modules if module in folders), None)


def circle(edges: Iterable[Edge]) -> list[str] | None:
    """Folders of which each imports the next, the last one the first again; None if there is no such circle."""
    graph: dict[str, set[str]] = {}
    for folder, target in edges:
        graph.setdefault(folder, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return None


def lengths_of_functions(source: str) -> dict[str, int]:
    """Lines per function, from `def` to the end. Of two of one name the longer."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            found[node.name] = max(length, found.get(node.name, 0))
    return found
