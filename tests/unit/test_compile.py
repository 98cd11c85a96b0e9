"""`train.compile=dense`: the compiled dense parts compute what they compute as they are, in float64 to 1e-12.

The suite lets torch trace and differentiate them (aot_eager). Its code generator, which takes a C++ compiler a minute
here, is a slow test.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from interpreted import calls
from models import named
from multirank import run_ranks
from tiny import config_file
from torch._dynamo.testing import CompileCounterWithBackend

import pretrain_hope
from configs.errors import ConfigError
from configs.schema import load
from hope import dense, model
from hope.config import CmsConfig, ModelConfig
from hope.dense import CannotCompile, Compiled, Form, eager, set_form, whole
from hope.heads import ops
from hope.heads.kernels import HeadsChoice
from hope.layers import unit
from hope.loss import block_alone
from hope.memory.config import MemoryConfig
from hope.memory.fused_scan import fused_scan
from hope.memory.kernels import ScanChoice
from hope.memory.linear_config import RULES, LinearConfig
from hope.memory.scan import Given, scan
from hope.mixers import Trunk, self_modifying
from hope.mixers.mamba2 import Mamba2Config
from hope.mixers.self_modifying import SelfModifyingTitans, memory_input
from hope.mixers.titans_attention import LayerConfig
from hope.mixers.titans_context import ContextConfig
from hope.model import Model
from hope.parameters import initialise
from hope.train.config import SeqLenStage, TrainConfig
from launch import outlook
from parallel.compute.tensor import sharded_loss

SIZES = {"steps": 8, "seq_len": 64, "global_batch": 1, "micro_batch": 1}
PARTS = {
    "hope": {"rms_norm", "gated", "memory_input", "merge_heads", "block_alone"},
    "transformer": {"rms_norm", "gated", "rotated", "block_alone"},
    "retnet": {"rms_norm", "gated", "rotated", "block_alone", "keys_of", "heads_of", "normed_and_joined"},
    "kda": {
        "rms_norm",
        "gated",
        "block_alone",
        "keys_of",
        "heads_of",
        "normed_and_joined",
        "convolved",
        "steps",
    },
    "mamba2": {
        "rms_norm",
        "gated",
        "block_alone",
        "heads_of",
        "convolved",
        "steps",
        "gated_squares",
        "normed",
    },
    "titans_mal": {
        "rms_norm",
        "gated",
        "block_alone",
        "keys_of",
        "heads_of",
        "normed_and_joined",
        "convolved",
        "rotated",
    },
    "titans_mac": {"rms_norm", "gated", "block_alone", "heads_of", "normed_and_joined"},
}
OTHERS = {
    "mamba2": Mamba2Config(state=12, chunk=8),
    "titans_mal": LayerConfig(chunk=8, window=6, persistent=2, theta_max=0.1),
    "titans_mac": ContextConfig(chunk=4, segment=8, persistent=2, theta_max=0.1),
}


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch.compiler.reset()


@pytest.fixture
def interpreter(monkeypatch):
    yield from calls(monkeypatch)


def config(kind: str) -> ModelConfig:
    memory, cms = MemoryConfig(projection_chunk=4, main_chunk=8), CmsConfig(periods=[1, 2])
    size = {"vocab_size": 64, "width": 32, "layers": 2, "heads": 2, "cms": cms}
    if kind in RULES:
        return ModelConfig(["linear"], mixers={"linear": LinearConfig(rule=kind, chunk=8)}, **size)
    if kind in OTHERS:
        return ModelConfig([kind], mixers={kind: OTHERS[kind]}, **size)
    return named(kind, memory=memory, **size)


def trained(kind: str, form: Form, packed: bool, recompute: str = "none") -> dict[str, torch.Tensor]:
    """The loss, in blocks with a shorter last one, and every gradient."""
    model = Model(config(kind)).initialise(7).double()
    model.set_recompute(recompute)
    set_form(model, form)
    generator = torch.Generator().manual_seed(3)
    ids, starts = torch.randint(0, 64, (18, 3), generator=generator), None
    if packed:
        starts = torch.rand(17, 3, generator=generator) < 0.2
    loss = sharded_loss(model.vocabulary.scores(model.trunk(ids[:-1], starts=starts)[0], 20), ids[1:], 1)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def assert_equal(kind: str, form: Compiled, packed: bool, recompute: str = "none") -> None:
    found, expected = trained(kind, form, packed, recompute), trained(kind, eager, packed)
    assert {function.__name__ for function in form._made} == PARTS[kind]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize(
    ("kind", "recompute"),
    [
        ("hope", "memory"),
        ("transformer", "block"),
        ("kda", "memory"),
        ("retnet", "sublayer"),
        ("mamba2", "memory"),
        ("titans_mal", "memory"),
        ("titans_mac", "memory"),
    ],
)
def test_traced_parts_equal_eager_ones(kind, recompute):
    assert_equal(kind, Compiled("aot_eager"), True, recompute)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(PARTS))
def test_generated_code_equals_eager(kind):
    assert_equal(kind, Compiled(), True)


def test_a_part_that_computes_something_else_is_seen():
    class Spoiled(Compiled):
        def __call__(self, function, /):
            self._made[function] = function
            return (lambda *args: 1.001 * function(*args)) if function.__name__ == "memory_input" else function

    with pytest.raises(AssertionError, match="loss"):
        assert_equal("hope", Spoiled(), False)


def trained_whole(kind: str, backend: str | None, recompute: str = "none") -> dict[str, torch.Tensor]:
    """As `trained`, of sequences without marks; with a backend through compiled blocks, each of which must be used."""
    model = Model(config(kind)).initialise(7).double()
    model.set_recompute(recompute)
    calls = []
    for block in model.blocks.values():
        if backend is not None:
            compiled = whole(block.stateless, backend)
            block.whole = lambda x, compiled=compiled: calls.append(x) or compiled(x)
    ids = torch.randint(0, 64, (18, 3), generator=torch.Generator().manual_seed(3))
    x = model.trunk(ids[:-1], keep_state=False)[0]
    loss = sharded_loss(model.vocabulary.scores(x, 20), ids[1:], 1)
    loss.backward()
    assert len(calls) == (0 if backend is None else len(model.blocks) * (2 if recompute == "block" else 1))
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def assert_whole_equals(kind: str, backend: str, recompute: str = "none") -> None:
    found, expected = trained_whole(kind, backend, recompute), trained_whole(kind, None)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize(
    ("kind", "recompute"),
    [
        ("hope", "none"),
        pytest.param("hope", "block", marks=pytest.mark.slow),
        ("transformer", "none"),
        ("kda", "none"),
        pytest.param("titans_mal", "none", marks=pytest.mark.slow),
        pytest.param("titans_mac", "none", marks=pytest.mark.slow),
    ],
)
def test_whole_blocks_equal_eager_ones(kind, recompute):
    counter = CompileCounterWithBackend("aot_eager")
    assert_whole_equals(kind, counter, recompute)
    assert counter.frame_count == 1  # blocks that are alike share their graph


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(PARTS))
def test_generated_code_of_whole_blocks_equals_eager(kind):
    assert_whole_equals(kind, "inductor")


def test_the_kernels_of_a_memory_are_nodes_of_a_whole_block(monkeypatch, interpreter):
    """The memory loop and the heads' kernels, interpreted: their calls stand in the graph, one each."""
    choice = ScanChoice(functools.partial(fused_scan, operands=torch.float32, precision="ieee"), "fused")
    heads = HeadsChoice(ops.memory_input, ops.merge_heads, "fused")
    monkeypatch.setattr(self_modifying, "scan_for", lambda *_: choice)
    monkeypatch.setattr(self_modifying, "heads_for", lambda *_: heads)
    memory = MemoryConfig(projection_chunk=16, main_chunk=16, static="projected")
    settings = named("hope", memory=memory, vocab_size=64, width=64, layers=1, heads=2, cms=CmsConfig(periods=[1]))
    block, graphs = Model(settings).initialise(7).blocks["0"], []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    x = torch.randn(32, 2, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole(block.stateless, keep)(x), block.stateless(x), rtol=0, atol=1e-6)
    [graph] = graphs
    nodes = [str(node.target) for node in graph.graph.nodes]
    count = lambda name: sum(name in node for node in nodes)
    assert (count("memory_loop"), count("memory_input"), count("merge_heads")) == (1, 4, 1)


def test_only_plain_passes_of_training_go_through_a_whole_block():
    model, used = Model(config("hope")).initialise(7), []
    for block in model.blocks.values():
        block.whole = lambda x: used.append(1) or x
    ids, starts = torch.zeros(8, 2, dtype=torch.long), torch.zeros(8, 2, dtype=torch.bool)
    state = model.trunk(ids)[1]
    model.trunk(ids, state, keep_state=False)
    model.trunk(ids, starts=starts, keep_state=False)
    with torch.no_grad():
        model.trunk(ids, keep_state=False)
    for block in model.blocks.values():
        block.mixer.watched = True
    model.trunk(ids, keep_state=False)
    assert used == []
    for block in model.blocks.values():
        block.mixer.watched = False
    model.trunk(ids, keep_state=False)
    assert len(used) == 2


def test_blocks_of_attention_keep_to_their_dense_parts():
    model = Model(named("hope", pattern=["hope", "attention"], vocab_size=64, width=32, layers=2, heads=2))
    model.set_compile("block", "cpu")
    assert [block.whole is None for block in model.blocks.values()] == [False, True]


def test_the_functional_loss_of_a_block_is_that_of_the_model():
    scores = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    row, count = torch.tensor([0, 3, 10, 3, 5, 7]), torch.tensor([0.5, 0.0, 1.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    expected = (torch.nn.functional.cross_entropy(scores, row, reduction="none") * count).sum()
    loss, gradient = block_alone(scores.detach(), row, count)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, scores)[0])


def test_inputs_of_the_kernels_are_rounded_once_and_lie_without_gaps():
    generator = torch.Generator().manual_seed(0)
    x, history = (torch.randn(n, 2, 32, generator=generator).bfloat16() for n in (9, 3))
    weight = torch.randn(32, 4, generator=generator).bfloat16()
    wide, narrow = (memory_input(x, weight, history, None, 16, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert narrow.shape == (2, 2, 9, 16)
    assert narrow.is_contiguous()
    assert torch.equal(narrow, wide.bfloat16())
    torch.testing.assert_close(unit(wide), wide)


@pytest.mark.parametrize("static", ["learned", "projected"])
def test_what_is_carried_between_calls_stays_fp32(static, monkeypatch):
    """A form of the loop that wants bf16 is handed bf16; the tokens that wait for their chunk are kept in fp32."""
    seen = []

    def loop(config, memories, given: Given, layout, state):
        brought = (given.x, given.q, given.projected_k, given.projected_v)
        seen.append({t.dtype for t in brought if t is not None})
        return scan(config, memories, given._replace(x=given.x.float(), q=given.q.float()), layout, state)

    monkeypatch.setattr(self_modifying, "scan_for", lambda *_: ScanChoice(loop, "test", "", torch.bfloat16))
    mixer = SelfModifyingTitans(Trunk(32, 2, 1), MemoryConfig(static=static, projection_chunk=4, main_chunk=4))
    initialise(mixer, 0)
    mixer = mixer.bfloat16()
    x = torch.randn(11, 2, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole, _ = mixer(x)
    first, state = mixer(x[:6])
    assert {t.dtype for t in (*state.waiting, state.history)} == {torch.float32}
    assert len(state.waiting) == (4 if static == "projected" else 2)
    torch.testing.assert_close(torch.cat([first, mixer(x[6:], state)[0]]), whole)
    assert seen[:2] == [{torch.bfloat16}] * 2


def paths(**settings) -> list[str]:
    return [problem.path for problem in TrainConfig(**SIZES, compile="dense", **settings).problems()]


def test_what_cannot_be_compiled_is_refused_by_name():
    assert paths() == []
    assert paths(deterministic=True) == ["train.compile"]
    stages = lambda *lengths: [SeqLenStage(from_step=i + 1, seq_len=n) for i, n in enumerate(lengths)]
    assert paths(seq_len_stages=stages(1, 2, 4, 8, 16, 64, 32)) == ["train.compile"]
    assert paths(seq_len_stages=stages(1, 2, 4, 8, 16, 64, 16)) == []


def test_a_machine_without_a_compiler_says_so(monkeypatch, tmp_path):
    assert dense.cannot_compile("cpu") == dense.cannot_compile("cuda") == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    assert dense.cannot_compile("cuda") == "needs a C compiler, and neither CC nor gcc nor clang is one here"
    with pytest.raises(CannotCompile, match=r"train\.compile=dense needs a C\+\+ compiler"):
        Model(config("hope")).set_compile("dense", "cpu")


def run(path: str, name: str, compiler: bool, *flags: str) -> int:
    torch.set_num_threads(1)
    dense.Compiled = functools.partial(Compiled, "aot_eager")  # the process ends with this run
    used = []

    def counted(function):
        compiled = whole(function, "aot_eager")
        return lambda x: used.append(1) or compiled(x)

    model.whole = counted
    if not compiler:
        dense.cannot_compile = lambda device: "needs a C++ compiler"
    code = pretrain_hope.main([path, f"run.name={name}", "train.steps=3", *flags])
    assert bool(used) == (name == "block")
    return code


def test_a_run_that_is_compiled_is_the_run(tmp_path: Path, capfd):
    path, losses = config_file(tmp_path), {}
    for name, said in (("dense", "dense parts: compiled"), ("block", "blocks: compiled"), ("none", "")):
        flags = [f"train.compile={name}", "log.every=3"]  # a watched step does not go through whole blocks
        assert run_ranks(run, 1, path, name, True, *flags, timeout=120) == [0]
        printed = capfd.readouterr().out
        assert said in printed
        assert (": compiled" in printed) == bool(said)
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["grad_norm"] for line in lines[1:]]
    assert losses["dense"] == pytest.approx(losses["none"], rel=1e-5)
    assert losses["block"] == pytest.approx(losses["none"], rel=1e-5)
    assert len(losses["none"]) == 2
    assert run_ranks(run, 1, path, "refused", False, "train.compile=dense", timeout=120) == [2]
    assert "config error: train.compile=dense needs a C++ compiler" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["train.recompute=memory"], "block makes one graph of a block, and train.recompute=memory"),
        (["parallel.tensor=2"], "parallel.tensor 2 puts collectives into it"),
        (
            ["model.pattern=[hope, attention]", "train.seq_len_stages=[{from_step: 1, seq_len: 4}, "
             "{from_step: 2, seq_len: 8}, {from_step: 3, seq_len: 12}, {from_step: 4, seq_len: 16}]"],
            "each of 2 mixers and 4 lengths, at most 6",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_one_graph_is_refused(tmp_path, flags, said):
    with pytest.raises(ConfigError) as error:
        load(config_file(tmp_path, "attention"), ["train.compile=block", *flags])
    [what] = [what for path, what, _ in error.value.problems if path == "train.compile"]
    assert said in what


def test_a_dry_run_where_there_is_no_compiler(tmp_path: Path, monkeypatch, capsys):
    """Of a run on this machine it is refused, as the run is. For other devices it says so: jobs are submitted from
    machines without one."""
    words = [config_file(tmp_path, "attention"), "run.name=dry", "train.compile=dense", "--dry-run"]
    monkeypatch.setattr(outlook, "cannot_compile", lambda device: "needs a C++ compiler")
    monkeypatch.setattr(dense, "cannot_compile", lambda device: "needs a C++ compiler")
    assert pretrain_hope.main(words) == 2
    assert "config error: train.compile=dense needs a C++ compiler" in capsys.readouterr().err
    assert pretrain_hope.main([*words, "--devices", "1"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("compiled ")]
    assert line == "compiled    dense parts; a run on this machine needs a C++ compiler, and would be refused"
    monkeypatch.undo()
    assert pretrain_hope.main(words) == 0
    assert "compiled    dense parts\n" in capsys.readouterr().out
