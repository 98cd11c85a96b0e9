"""The referee: it passes right layouts, and notices every rule that is broken."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from doubles import compute_in_float64
from multirank import run_ranks
from spoilers import forget
from tiny import config_text

from configs.schema import load
from hope.memory.linear_config import RULES
from hope.memory.matrix import MatrixBank
from hope.memory.titans_config import TITANS_RULES
from hope.model import Model
from parallel.compute import gradients, tensor
from parallel.layout.plan import plan_of_config
from parallel.referee import parity
from parallel.referee import verdict as verdicts

ROOT = Path(__file__).parents[2]
BASE = ["model.layers=4", "model.heads=4", "model.width=32", "data.train=none", "data.heldout=none"]
FAST = "chunk: 4, rate: 0.5, forget_bias: -2.0"
KINDS = {
    "matrix": [],
    "mlp": ["model.mixers.hope.memory=mlp", "model.cms.variant=independent"],
    "hope_attention": ["model.pattern=[attention]"],
    "transformer": ["model.pattern=[attention]", "model.cms.periods=[1]", "model.tie_embeddings=false"],
    "hybrid": ["model.pattern=[hope,hope,hope,attention]", "model.layers=7"],
    "in_context": [
        "model.pattern=[attention]",
        f"model.cms.in_context=[{{{FAST}}}, {{{FAST}, head_dim: 4, hidden: 6, objective: target, read: causal}}]",
    ],
    "in_context_independent": [
        "model.pattern=[hope]",
        f"model.cms.in_context=[{{{FAST}}}, {{{FAST}, objective: target}}]",
        "model.cms.variant=independent",
    ],
    "in_context_nested": [
        "model.pattern=[attention]",
        f"model.cms.in_context=[{{{FAST}}}, {{{FAST.replace('4', '8')}}}]",
        "model.cms.variant=nested",
    ],
    "own": ["model.imports=[gated_delta]", "model.pattern=[gated_delta_of_a_test]"],
    **{rule: ["model.pattern=[linear]", f"model.mixers.linear.rule={rule}"] for rule in RULES},
    "mamba2": ["model.pattern=[mamba2]", "model.mixers.mamba2.state=12"],
    "mamba2_groups": ["model.pattern=[mamba2]", "model.mixers.mamba2.state=6", "model.mixers.mamba2.groups=4"],
    **{
        rule: ["model.pattern=[titans]", f"model.mixers.titans.rule={rule}", "model.mixers.titans.chunk=4"]
        for rule in TITANS_RULES
    },
    **{
        name: [f"model.pattern=[{name}]", f"model.mixers.{name}.window=6", f"model.mixers.{name}.chunk=4"]
        for name in ("titans_mag", "titans_mal")
    },
    "titans_mac": [
        "model.pattern=[titans_mac]",
        "model.mixers.titans_mac.chunk=2",
        "model.mixers.titans_mac.segment=8",
    ],
}
SHARED = [f"{stem}{name}.{part}" for name in ("key", "query")
          for stem, part in (("", "weight"), ("conv_", "weight"), ("conv_", "bias"))]  # fmt: skip
"""Parameters of `mamba2` that all heads share."""
LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2+sp": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "tp4": (4, ["parallel.tensor=4"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp4": (4, ["parallel.pipeline=4"]),
    "pp2-vpp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "tp2-pp2+sp": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "dp2": (2, []),
    "tp2-dp2": (4, ["parallel.tensor=2"]),
    "pp2-dp2": (4, ["parallel.pipeline=2"]),
    "tp2-pp2-dp2": (8, ["parallel.tensor=2", "parallel.pipeline=2"]),
}
# In the suite every kind of layout and every kind of model, `test_whole_matrix` has all pairs.
QUICK = [
    ("tp2-pp2+sp", "hybrid"),
    ("tp2+sp", "in_context_nested"),
    ("pp2", "in_context"),
    ("tp2+sp", "own"),
    ("pp2", "own"),
    ("tp2+sp", "gated_deltanet"),
    ("pp2", "gated_deltanet"),
    ("tp2+sp", "mamba2"),
    ("tp2-pp2+sp", "mamba2_groups"),
    ("tp2+sp", "ttt_mlp"),
    ("pp2", "lmm"),
    ("tp2+sp", "titans_mag"),
    ("tp2-pp2+sp", "titans_mal"),
    ("tp2+sp", "titans_mac"),
    ("tp2+sp", "mlp"),
    ("tp4", "hope_attention"),
    ("pp2-vpp2", "matrix"),
    ("dp2", "mlp"),
    ("tp2-dp2", "transformer"),
    ("tp2-pp2-dp2", "matrix"),
]


def config_file(folder: Path, words: Sequence[str] = ()) -> str:
    """For these overrides: keys of the mixer hope are only in the file if the pattern has it."""
    path, patterns = folder / "tiny.yaml", [word for word in words if word.startswith("model.pattern=")]
    path.write_text(config_text(folder, "matrix" if all("hope" in word for word in patterns) else "attention"))
    return str(path)


def judge(path: str, overrides: list[str], spoil: str = "", double: bool = False) -> dict:
    """The verdict of rank 0; {} elsewhere."""
    torch.set_num_threads(1)
    if double:
        compute_in_float64()
    undo = SPOILERS[spoil]() if spoil else None
    config = load(path, [*BASE, *overrides], check=False)
    task = parity.make_task(config, 4)
    with parity.groups.start(config.parallel) as ranks:
        found = parity.run_layout(config, task, ranks)
        if undo is not None:
            undo()  # what is broken in hope/ itself would break the reference too
        if found is None:
            return {}
        return verdicts.judge(task, found, ranks.device)


def verdict(tmp_path: Path, layout: str, kind: str, *more: str, spoil: str = "", double: bool = False) -> dict:
    world, overrides = LAYOUTS[layout]
    words = [*KINDS[kind], *overrides, *more]
    arguments = config_file(tmp_path, words), words, spoil, double
    return run_ranks(judge, world, *arguments, timeout=120)[0]


@pytest.mark.parametrize(("layout", "kind"), QUICK, ids=lambda v: v)
def test_layout_equals_one_device(tmp_path, layout, kind):
    found = verdict(tmp_path, layout, kind)
    print(f"worst error over what is allowed: {found['worst']:.2g} of at most 1")
    assert found["equal"], verdicts.table(found, 8)
    assert found["worst"] <= 1
    assert found["tolerance"] == 1e-5
    assert found["state_norm_error"] is not None  # every mixer here offers its state for comparison
    assert len(found["losses"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_whole_matrix(tmp_path, layout, kind):
    found = verdict(tmp_path, layout, kind)
    assert found["equal"], verdicts.table(found, 8)


@pytest.mark.parametrize("layout", ["tp2+sp", "pp2", "dp2"])
def test_bf16_within_its_bound(tmp_path, layout):
    found = verdict(tmp_path, layout, "matrix", "train.precision=bf16")
    assert found["equal"], verdicts.table(found, 8)


def test_packed_documents_and_recomputation(tmp_path):
    found = verdict(tmp_path, "tp2-pp2+sp", "matrix", "data.documents=reset", "train.recompute=block")
    assert found["equal"], verdicts.table(found, 8)


def sum_twice() -> None:
    original = gradients.combine_over_tensor_ranks

    def twice(*args) -> None:
        original(*args)
        original(*args)

    gradients.combine_over_tensor_ranks = twice


def forget_tied() -> None:
    gradients.combine_tied_embeddings = lambda *args: None


def share_fast_weights() -> Callable[[], None]:
    """The state of the first sequence's first forward pass is handed to every later micro-batch."""
    kept: dict[tuple, tuple] = {}
    original = MatrixBank.start

    def start(self, batch):
        fresh = original(self, batch)
        return kept.get((batch, fresh[0].weight.dtype), fresh)

    original_write = MatrixBank.write

    def write(self, state, *rest):
        after, reads = original_write(self, state, *rest)
        weight = after[0].weight
        kept[weight.shape[0], weight.dtype] = tuple(type(s)(s.weight.detach()) for s in after)
        return after, reads

    MatrixBank.start, MatrixBank.write = start, write

    def undo() -> None:
        MatrixBank.start, MatrixBank.write = original, original_write

    return undo


def other_seed_on_a_stage() -> None:
    original = Model.initialise
    Model.initialise = lambda self, seed: original(self, seed + self.part.first)


def normed_alone() -> None:
    tensor._total = lambda x: x


SPOILERS = {
    "norm.weight": forget("norm.weight"),
    "blocks.*.norm.weight": forget("blocks.*.norm.weight"),
    "blocks.*.mixer.norm.weight": forget("blocks.*.mixer.norm.weight"),
    "blocks.*.mixer.decay_down": forget("blocks.*.mixer.decay_down"),
    "blocks.*.mixer.memory.norm.weight": forget("blocks.*.mixer.memory.norm.weight"),
    "blocks.*.mixer.norm_memory.weight": forget("blocks.*.mixer.norm_memory.weight"),
    "blocks.*.mixer.norm_attention.weight": forget("blocks.*.mixer.norm_attention.weight"),
    "blocks.*.cms.levels.*.norm.weight": forget("blocks.*.cms.levels.*.norm.weight"),
    "blocks.*.cms.in_context.*.norm.weight": forget("blocks.*.cms.in_context.*.norm.weight"),
    "blocks.*.cms.aggregate": forget("blocks.*.cms.aggregate"),
    **{f"blocks.*.mixer.{name}": forget(f"blocks.*.mixer.{name}") for name in SHARED},
    "every rank norms its own heads": normed_alone,
    "sum twice": sum_twice,
    "forget the tied gradient": forget_tied,
    "share fast weights": share_fast_weights,
    "other seed on a stage": other_seed_on_a_stage,
}
# The first ones are in the suite: a sum over tensor ranks left out, for each way of summing, and what is no such sum.
BROKEN = [
    ("tp2+sp", "mlp", "blocks.*.cms.aggregate"),
    ("tp2", "matrix", "blocks.*.mixer.norm.weight"),
    ("pp2", "matrix", "forget the tied gradient"),
    ("pp2", "matrix", "share fast weights"),
    ("tp2+sp", "matrix", "norm.weight"),
    ("tp2+sp", "matrix", "blocks.*.norm.weight"),
    ("tp2", "kda", "blocks.*.mixer.decay_down"),
    ("tp2+sp", "mamba2", "every rank norms its own heads"),
    *(("tp2", "mamba2", f"blocks.*.mixer.{name}") for name in SHARED),
    ("tp2", "titans_mal", "blocks.*.mixer.memory.norm.weight"),
    ("tp2", "titans_mag", "blocks.*.mixer.norm_memory.weight"),
    ("tp2+sp", "titans_mag", "blocks.*.mixer.norm_attention.weight"),
    ("tp2+sp", "matrix", "blocks.*.cms.levels.*.norm.weight"),
    ("tp2+sp", "in_context", "blocks.*.cms.in_context.*.norm.weight"),
    ("tp2", "matrix", "sum twice"),
    ("pp2", "matrix", "other seed on a stage"),
]


MARGIN = 100.0

# Sums in other orders, on one machine. A CPU without these instructions ignores them.
ARITHMETICS = {
    "plain": {"ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "mkl-avx2": {"MKL_CBWR": "AVX2"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
}
IN_THE_SUITE = ("plain",)


@pytest.mark.parametrize(
    "arithmetic", [pytest.param(a, marks=() if a in IN_THE_SUITE else pytest.mark.slow) for a in ARITHMETICS]
)
def test_other_arithmetics_are_no_difference(tmp_path, arithmetic):
    """The aggregate's gradient is a sum that cancels: 1e-5 to 2e-5 of rounding, depending on the instructions."""
    overrides = [*BASE, *KINDS["mlp"], *LAYOUTS["tp2+sp"][1]]
    command = [sys.executable, "-m", "parallel.parity", config_file(tmp_path), *overrides, "--json"]
    environment = {**os.environ, **ARITHMETICS[arithmetic], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    print(f"worst error over what is allowed: {found['worst']:.2g}; settled {found['settled']}")
    assert found["equal"]
    assert all(s["rounding"] > 0 for s in found["settled"])


def test_every_rule_of_the_plan_is_broken_once():
    """Whatever any of these models sums over ranks is forgotten by one of the spoilers."""
    summed = set()
    for kind in KINDS.values():
        config = load(config_file(Path(tempfile.mkdtemp()), kind), [*BASE, *kind], check=False)
        summed |= {name for name, layout in plan_of_config(config.model).items() if layout.dim is None}
    anywhere = {re.sub(r"\.\d+\.", ".*.", name) for name in summed}
    assert anywhere
    assert anywhere <= {spoil for _, _, spoil in BROKEN}


@pytest.mark.parametrize(
    ("layout", "kind", "spoil"),
    [pytest.param(*case, marks=() if case in BROKEN[:4] else pytest.mark.slow) for case in BROKEN],
    ids=lambda v: v,
)
def test_a_broken_rule_is_noticed(tmp_path, layout, kind, spoil):
    found = verdict(tmp_path, layout, kind, spoil=spoil)
    print(f"worst error over what is allowed: {found['worst']:.2g}, at least {MARGIN:g}")
    assert not found["equal"], verdicts.table(found, 8)
    assert found["worst"] >= MARGIN  # where the worst right layout has at most 1


def test_it_starts_its_own_processes(tmp_path, capfd):
    arguments = [config_file(tmp_path), *BASE, "parallel.tensor=2", "--json", "--steps", "2"]
    assert parity.main(arguments) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["equal"]
    assert len(found["losses"]) == 2


def test_the_exit_code_is_the_verdict_under_a_launcher(tmp_path, capfd):
    arguments = [config_file(tmp_path), *BASE, "parallel.tensor=2", "--steps", "1"]
    assert run_ranks(parity.main, 2, arguments, timeout=120) == [0, 0]
    assert "EQUAL" in capfd.readouterr().out
    assert run_ranks(parity.main, 2, [*arguments, "--tolerance", "1e-12"], timeout=120) == [1, 1]
    assert "DIFFERENT" in capfd.readouterr().out


def test_a_layout_that_cannot_be_is_refused(tmp_path, capfd):
    assert parity.main([config_file(tmp_path), *BASE, "parallel.tensor=3"]) == 2
    assert "parallel.tensor" in capfd.readouterr().err


def test_a_difference_is_the_last_word(tmp_path, capfd):
    """Of processes that it started itself: the exit code, and no stack of a launcher that takes it for a crash."""
    arguments = [config_file(tmp_path), *BASE, "parallel.tensor=2", "--steps", "1", "--tolerance", "1e-12"]
    assert parity.main(arguments) == 1
    told = capfd.readouterr()
    assert "DIFFERENT" in told.out
    assert "Traceback" not in told.err
