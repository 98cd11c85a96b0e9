"""House rules that a tool does not know: who may import what, no circles between folders, and how long things are.

Every checker is also shown something bad, which it must refuse: see `house`.
"""

import itertools
import statistics
from collections import Counter

import pytest
from house import (
    ROOT,
    circle,
    folder_edges,
    group_makers,
    imported_programs,
    imports,
    impure,
    lengths_of_functions,
    module_edges,
    own_files,
)

MEDIAN_FILE, LONGEST_FILE, LONGEST_FUNCTION = 200, 500, 80  # lines
WING = 12  # files


def test_hope_imports_torch_only():
    """hope/ says what is computed, not where: no process group, no engine, no launcher. Kernels alone know triton."""
    files = [path for path in own_files() if path.is_relative_to(ROOT / "hope")]
    assert len(files) > 30
    for path in files:
        assert impure(path.read_text(), path.name) == set(), path


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("from torch import distributed", "fused.py"),
        ("from torch import nn, distributed as dist", "layers.py"),
        ("import torch.distributed as dist", "layers.py"),
        ("from torch.distributed import all_reduce", "layers.py"),
        ("from torch.distributed.nn import functional", "layers.py"),
        ("import torch\ntorch.distributed.barrier()", "layers.py"),
        ("import importlib\nimportlib.import_module('torch.distributed')", "layers.py"),
        ("def f():\n    import triton", "layers.py"),
        ("import triton.language as tl", "fused_too.py"),
        ("from megatron.core import parallel_state", "layers.py"),
        ("import deepspeed", "fused.py"),
        ("from parallel import layout", "layers.py"),
        ("from configs.schema import Config", "layers.py"),
        ("from . import layers", "layers.py"),
        ("from parallel.start import groups", "main.py"),
    ],
)
def test_what_hope_may_not_import_is_refused(line, file):
    assert impure(line, file)


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("import triton\nfrom triton import language", "fused.py"),
        ("import torch.distributions\nfrom torch import Tensor, nn", "layers.py"),
        ("import math\nimport numpy as np\nfrom hope.memory import delta", "layers.py"),
        ("from parallel.start import groups\nfrom data_prep.tokenizing import tokenizer", "__main__.py"),
    ],
)
def test_what_hope_may_import_is_not(line, file):
    assert impure(line, file) == set()


def test_no_module_imports_a_program():
    """What a program puts together would come with it: hope's own may import parallel."""
    for path in own_files():
        assert imported_programs(path.read_text()) == set(), path


@pytest.mark.parametrize(
    "line",
    [
        "from hope.generate.__main__ import main",
        "from hope.generate import __main__",
        "def f():\n    import hope.generate.__main__ as program",
        "import importlib\nimportlib.import_module('data_prep.__main__')",
    ],
)
def test_an_import_of_a_program_is_found(line):
    assert imported_programs(line)


def test_what_only_looks_like_a_program_is_none():
    assert imported_programs("import hope.main\nif __name__ == '__main__':\n    main()") == set()


def test_only_programs_of_hope_may_lead_out_of_it(tmp_path):
    sources = {
        "hope/generate/__main__.py": "from parallel.start import groups",
        "parallel/start/groups.py": "from hope.generate import loop",
        "hope/generate/loop.py": "import torch",
        "parallel/start/__main__.py": "import configs",
        "configs/__init__.py": "",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert folder_edges(tmp_path) == {("parallel/start", "hope/generate"), ("parallel/start", "configs")}
    (tmp_path / "hope/generate/loop.py").write_text("from parallel.start import groups")
    assert circle(folder_edges(tmp_path)) is not None


def test_layouts_make_no_process_group():
    files = sorted((ROOT / "parallel/layout").rglob("*.py"))
    assert len(files) > 5
    for path in files:
        assert group_makers(path.read_text()) == set(), path


@pytest.mark.parametrize(
    "line",
    [
        "from torch import distributed",
        "import torch.distributed as dist",
        "def f():\n    from megatron.core import parallel_state",
        "import deepspeed",
        "from parallel import start",
        "from parallel.optimizer import zero",
        "import parallel.compute.replica",
        "from parallel.checkpoint.errors import SaveError",
        "from parallel.referee import evidence",
        "from ..start import groups",
    ],
)
def test_what_makes_a_process_group_is_refused_in_layouts(line):
    assert group_makers(line)


def test_numbers_and_shapes_are_not():
    assert group_makers("import torch\nfrom parallel.layout import plan\nfrom parallel.starting import x") == set()


def test_folders_do_not_import_each_other_in_circles():
    edges = folder_edges()
    assert {("parallel/layout", "hope"), ("launch", "configs"), (".", "parallel/layout")} <= edges
    assert circle(edges) is None


def test_no_module_imports_itself_through_others():
    """Imports inside functions count: a circle that loads is still a circle."""
    edges = module_edges()
    assert len(edges) > 400
    assert circle(edges) is None


def test_a_circle_of_modules_is_found(tmp_path):
    for name, source in {"hope/a.py": "from hope.b import x", "hope/b.py": "def f():\n    import hope.a"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert sorted(circle(module_edges(tmp_path))[:-1]) == ["hope.a", "hope.b"]


def test_a_circle_is_found(tmp_path):
    """Through three folders, with an import inside a function and one by name, and from a package's `__init__`."""
    sources = {
        "pretrain_hope.py": "import hope",
        "hope/__init__.py": "def f():\n    from parallel.layout import plan",
        "parallel/__init__.py": "",
        "parallel/layout/__init__.py": "",
        "parallel/layout/plan.py": "import importlib\nimportlib.import_module('configs.schema')",
        "configs/__init__.py": "",
        "configs/schema.py": "from hope import layers",
        "launch/job.py": "import configs.schema\nimport numpy.hope",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    edges = folder_edges(tmp_path)
    back, harmless = ("configs", "hope"), ("launch", "configs")
    assert edges == {(".", "hope"), ("hope", "parallel/layout"), ("parallel/layout", "configs"), back, harmless}
    found = circle(edges)
    assert found is not None
    assert sorted(found[:-1]) == ["configs", "hope", "parallel/layout"]
    assert set(itertools.pairwise(found)) < edges
    assert circle(edges - {back}) is None


def test_a_relative_import_is_no_way_around(tmp_path):
    (tmp_path / "pretrain_hope.py").write_text("from . import hope")
    with pytest.raises(ValueError, match="relative"):
        folder_edges(tmp_path)


def test_imports_are_full_names():
    source = "import a.b as c, d\nfrom e import f, g as h\nfrom i.j import *\nfrom .k import l\nimport_module('m.n')"
    assert imports(source) == {"a.b", "d", "e.f", "e.g", "i.j.*", ".k.l", "m.n"}


def test_files_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in own_files()}
    assert statistics.median(lengths.values()) < MEDIAN_FILE
    assert {str(path): length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_functions_are_short():
    found = {path: lengths_of_functions(path.read_text()) for path in own_files()}
    assert sum(map(len, found.values())) > 500
    for path, lengths in found.items():
        assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}, path


def test_lengths_count_from_def_to_the_end_wherever_a_function_is():
    source = (
        "class A:\n    @x\n    def f(\n        self,\n    ):\n        def g(): pass\n        return 1\ndef f(): 2\n"
    )
    assert lengths_of_functions(source) == {"f": 5, "g": 1}


def test_wings_are_small():
    """At most twelve files in a folder of parallel/, `__init__` and `__main__` apart."""
    files = [path for path in own_files() if path.is_relative_to(ROOT / "parallel") and not path.name.startswith("__")]
    counts = Counter(path.parent.name for path in files)
    assert set(counts) >= {"layout", "start", "optimizer", "compute", "checkpoint", "referee"}
    assert {wing: count for wing, count in counts.items() if count > WING} == {}
