"""Levels in context as a part of the model: configuration, sizes, what is printed and logged, and how they begin."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from models import named
from stored import store
from tiny import config_file

import pretrain_hope
from configs.changes import differences as changes
from configs.errors import ConfigError
from configs.renamed import current
from configs.schema import load, of_record, to_yaml
from configs.used import recorded
from data_prep.config import DataConfig
from hope.block import Block
from hope.config import CmsConfig, ModelConfig
from hope.initial import differences, open_start
from hope.memory.in_context_config import InContextConfig
from hope.model import Model, Slice
from hope.optim.config import OptimConfig
from hope.optim.levels import parameter_groups
from hope.parameters import declarations
from hope.train.diagnostics import MixerProbe
from launch.speeds import slowest
from parallel.layout.memory import StepShape, activation_bytes, build_part, part_activations, rank_memory, state_bytes
from parallel.layout.plan import plan_of_config
from parallel.layout.topology import ParallelConfig

QUICKSTART = str(Path(__file__).parents[2] / "configs/quickstart.yaml")
QUICK = (("sequential", "memory"), ("nested", "none"))
TWO = "model.cms.in_context=[{chunk: 16, objective: next}, {chunk: 64, rate: 0.05}]"


@pytest.fixture(autouse=True)
def _data_is_there(monkeypatch):
    monkeypatch.setattr(DataConfig, "problems", lambda *args: iter(()))


def fast(*chunks: int, **keys) -> list[InContextConfig]:
    return [InContextConfig(chunk=chunk, **keys) for chunk in chunks]


def config(variant: str = "sequential", levels: list[InContextConfig] | None = None, **settings) -> ModelConfig:
    cms = CmsConfig(variant, [1, 2], hidden=16, in_context=levels or [])
    values = {"pattern": ["attention"], "vocab_size": 32, "width": 16, "layers": 2, "heads": 2, **settings}
    return ModelConfig(**values, cms=cms)


def test_it_is_read_recorded_and_read_again():
    found = load(QUICKSTART, [TWO])
    assert found.model.cms.in_context == [InContextConfig(chunk=16), InContextConfig(chunk=64, rate=0.05)]
    assert found.model.periods == [1, 4]  # as it was
    assert of_record(recorded(found)) == found
    assert "in_context:\n    - chunk: 16\n" in to_yaml(found)
    assert ModelConfig.of(recorded(found)["model"]) == found.model


def test_a_record_of_before_has_none_and_differs_in_nothing():
    now = recorded(load(QUICKSTART, []))
    old = json.loads(json.dumps(now))
    del old["model"]["cms"]["in_context"]
    assert ModelConfig.of(old["model"]).cms.in_context == []
    assert changes(current(old), now, {}) == []
    [change] = changes(current(old), recorded(load(QUICKSTART, [TWO])), {})
    assert (change.path, change.rule) == ("model.cms.in_context", "ask")


BAD = {
    "{chunk: 0}": ("[0].chunk", "0 is less than 1"),
    "{heads: 0}": ("[0].heads", "0 is less than 1"),
    "{head_dim: 0}": ("[0].head_dim", "0 is less than 1"),
    "{hidden: -4}": ("[0].hidden", "-4 is less than 1"),
    "{rate: -1}": ("[0].rate", "-1.0 is not a rate"),
    "{rate: .inf}": ("[0].rate", "inf is not a finite number"),
    "{forget_bias: .nan}": ("[0].forget_bias", "nan is not a finite number"),
    "{heads: 3}": ("[0].heads", "model.width 128 is not a multiple of heads 3"),
    "{chunk: 64}, {chunk: 16}": ("", "chunks [64, 16] are not fastest first"),
    "{objective: both}": ("[0].objective", "'both' is not one of next, target"),
    "{hiden: 4}": ("[0].hiden", "unknown key"),
}
BAD_NESTED = {
    "{chunk: 16}": ("variant", "nested is about levels within one another, and model.cms.in_context has 1"),
    "": ("variant", "nested is about levels within one another, and model.cms.in_context has 0"),
    "{chunk: 16}, {chunk: 40}": ("in_context[1].chunk", "40 is not two or more chunks of 16"),
    "{chunk: 16}, {chunk: 16}": ("in_context[1].chunk", "16 is not two or more chunks of 16"),
    "{chunk: 16}, {chunk: 32, heads: 2}": ("in_context[1].heads", "2, and the faster level has None"),
    "{chunk: 16, objective: target}, {chunk: 32}": ("in_context[1].objective", "next, and the faster level has target"),
    "{chunk: 16}, {chunk: 32, read: causal}": ("in_context[1].read", "causal, and the faster level has boundary"),
}


def the_problem(*words: str):
    with pytest.raises(ConfigError) as caught:
        load(QUICKSTART, list(words))
    [problem] = caught.value.problems
    assert problem.fix or " is not one of " in problem.what  # which says what would work
    return problem


@pytest.mark.parametrize("entries", list(BAD))
def test_what_cannot_work_is_a_problem_with_its_path(entries):
    where, what = BAD[entries]
    problem = the_problem(f"model.cms.in_context=[{entries}]")
    assert problem.path == f"model.cms.in_context{where}"
    assert problem.what.startswith(what)


@pytest.mark.parametrize("entries", list(BAD_NESTED))
def test_nested_levels_are_one_mlp_at_several_clocks(entries):
    where, what = BAD_NESTED[entries]
    problem = the_problem(f"model.cms.in_context=[{entries}]", "model.cms.variant=nested")
    assert problem.path == f"model.cms.{where}"
    assert problem.what.startswith(what)


def test_tensor_ranks_must_divide_the_heads():
    model = config(levels=[*fast(4), *fast(8, heads=1)])
    [problem] = ParallelConfig(tensor=2).problems(2, 8, 2, model)
    assert (problem.path, problem.what) == (
        "parallel.tensor", "heads of level 1 in context 1 is not a multiple of tensor 2"
    )  # fmt: skip
    assert "model.cms.in_context[1].heads 2" in problem.fix


def test_the_default_rate_falls_with_long_chunks():
    rates = {chunk: InContextConfig(chunk=chunk).rate_bound() for chunk in (1, 16, 64, 512)}
    assert rates == pytest.approx({1: 0.025, 16: 0.025, 64: 0.025, 512: 0.003125})
    assert InContextConfig(rate=0.0).rate_bound() == 0.0


def test_a_rate_that_diverged_is_warned_of():
    with pytest.warns(UserWarning, match=r"model.cms.in_context\[1\]: rate 0.1 is four times 0.025 or more") as caught:
        config(levels=[*fast(16), *fast(16, rate=0.1), *fast(64, rate=0.05)]).warn_hazards()
    assert len(caught) == 1


def test_they_belong_to_the_optimizers_fastest_level_and_are_cut_by_heads():
    levels = [*fast(4, objective="target"), *fast(8)]
    for variant in ("sequential", "independent", "nested"):
        made = config(variant, levels if variant != "nested" else fast(4, 8, objective="target"))
        names = {n: group["name"] for group in parameter_groups(Model(made), 0.1) for n in group["names"]}
        own = {n: name for n, name in names.items() if ".in_context." in n}
        assert own
        assert {name.partition(".")[0] for name in own.values()} == {"base"}
        uncut = {n for n, layout in plan_of_config(made).items() if ".in_context." in n and layout.dim is None}
        assert uncut == {n for n in own if n.endswith(".norm.weight")}
        declared = {n: d.update for n, _, d in declarations(Model(made))}
        assert {n for n, u in declared.items() if u == "matrix_per_head" and ".in_context." in n} == {
            n for n in own if n.endswith(("mlp.first", "mlp.second"))
        }


def test_bytes_that_a_sequence_carries():
    levels = [*fast(4, heads=3, head_dim=4, hidden=5), *fast(8, objective="target")]
    model = config(levels=levels, layers=4)
    without = rank_memory(config(layers=4), [Slice(0, 4)], 1, StepShape(32, 2, False), OptimConfig()).fast_weights
    with_levels = rank_memory(model, [Slice(0, 4)], 1, StepShape(32, 2, False), OptimConfig()).fast_weights
    # layers x sequences x (two maps per head, and the last input of the level that predicts) x bytes
    own = 4 * 2 * (2 * 3 * 4 * 5 + 3 * 4 + 2 * 2 * 8 * 8) * 4
    assert with_levels - without == own
    half = build_part(model, Slice(0, 1), StepShape(32, 2, False, tensor=1))
    assert state_bytes(half, 2) == own // 4 + without // 4


@pytest.mark.parametrize(
    ("variant", "recompute"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(("sequential", "independent", "nested"), ("none", "memory", "block"))
    ],
)
def test_activations_of_a_long_sequence_from_short_ones(variant, recompute):
    model, shape = config(variant, fast(4, 12), layers=4), StepShape(96, 2, False, recompute=recompute)
    part = Slice(1, 3)
    assert part_activations(model, part, shape) == activation_bytes(build_part(model, part, shape), shape)


def test_flops_per_token():
    one = config(levels=fast(4, heads=3, head_dim=4, hidden=5, objective="target", read="causal"))
    [level] = Model(one).blocks["0"].cms.fast()
    maps, rates, weights = 3 * 2 * 16 * 12, 2 * 2 * 16 * 3, 2 * 2 * 4 * 5
    assert level.mlp.flops(64).dense == maps + rates + 3 * (2 * weights + 2 * 4 * (4 + 5))
    assert level.mlp.flops(64).writes == 3 * (2 * weights + weights / 2 + weights)
    [nested] = Model(config("nested", fast(4, 8))).blocks["0"].cms.fast()
    weights = 2 * 2 * 8 * 8
    assert nested.mlp.flops(64).dense == 2 * 2 * 16 * 16 + 2 * 4 * 16 * 2 + 2 * weights
    assert nested.mlp.flops(64).writes == 2 * 2 * (weights + weights / 2 + weights)
    [still] = Model(config(levels=fast(4, rate=0.0))).blocks["0"].cms.fast()
    assert still.mlp.flops(64).forward == 2 * sum(p.numel() for p in still.mlp.parameters())


def test_a_block_with_them_is_not_compiled_whole():
    """A graph of a loop over chunks would be one per length."""
    assert Block(config(pattern=["linear"]), "linear").compiles_whole
    assert not Block(config(pattern=["linear"], levels=fast(4)), "linear").compiles_whole


@pytest.mark.parametrize("recompute", ["memory", "mlp", "sublayer", "block"])
def test_recomputed_gradients_are_the_same(recompute):
    ids, found = torch.arange(40).view(20, 2) % 32, []
    for what in ("none", recompute):
        model = Model(config("independent", fast(4, 8, rate=0.5))).double().initialise(1)
        model.set_recompute(what)
        model(ids)[0].logsumexp(-1).sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_a_dry_run_prints(tmp_path, capsys):
    path = config_file(tmp_path)
    assert pretrain_hope.main([path, "model.cms.in_context=[{chunk: 4}, {chunk: 8, objective: target, read: causal}]",
                               "--dry-run"]) == 0  # fmt: skip
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("in context")]
    assert told == [
        "in context  2 MLPs 8 -> 8 -> 8, rewritten every 4 tokens for the next (boundary), 1,088 bytes of state per "
        "sequence, layer and rank",
        "in context  2 MLPs 8 -> 8 -> 8, rewritten every 8 tokens for the target (causal), 1,024 bytes of state per "
        "sequence, layer and rank",
    ]
    nested = ["model.cms.in_context=[{chunk: 4}, {chunk: 8}]", "model.cms.variant=nested"]
    assert pretrain_hope.main([path, *nested, "--dry-run"]) == 0
    [told] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("in context")]
    assert told.startswith("in context  nested, 2 MLPs 8 -> 8 -> 8, rewritten every 4 within 8 tokens")


def test_what_the_log_shows():
    made = Model(config("sequential", [*fast(4), *fast(8, forget_bias=None)])).initialise(1)
    probe = MixerProbe([made])
    probe.arm(True)
    made(torch.randint(0, 32, (9, 2)))
    assert set(probe.scalars()) == {f"in_context{n}_written.{layer}" for n in (0, 1) for layer in (0, 1)}
    assert all(value > 0 for value in probe.scalars().values())
    assert {name for name, _ in probe.histograms()} == {
        f"{name}.{layer}"
        for name in ("in_context0_theta", "in_context0_alpha", "in_context1_theta")
        for layer in (0, 1)
    }


def test_bf16_keeps_what_is_written_in_fp32():
    model = config(levels=fast(4, 8, rate=0.5))
    x = torch.randn(19, 2, 16, generator=torch.Generator().manual_seed(1))
    [block] = Model(model, Slice(0, 1)).initialise(1).blocks.values()
    expected = block(x)[0]
    y, states = block.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert {layer.weight.dtype for state in states[1:3] for layer in state.weights} == {torch.float32}
    assert (y.float() - expected).norm() < 0.05 * expected.norm()


def test_an_estimate_takes_them_for_a_loop_over_chunks():
    words = ["model.pattern=[attention]"]
    assert slowest(load(QUICKSTART, words)) == {"attention"}
    assert slowest(load(QUICKSTART, [*words, TWO])) == {"hope matrix"}


@pytest.mark.parametrize("variant", ["sequential", "nested"])
def test_a_trained_model_gets_levels_that_add_nothing_at_first(tmp_path, variant):
    """And they learn: the gradient reaches them through what they would add."""
    store(
        tmp_path / "source", Model(named("hope_attention", vocab_size=32, width=16, layers=2, heads=2)).initialise(1), 5
    )
    target = ModelConfig(["attention"], 32, 16, 2, 2, cms=CmsConfig(variant, in_context=fast(4, 8)))
    target.init = str(tmp_path / "source")
    start, problems = open_start(target, {})
    assert problems == []
    model, ids = Model(target).initialise(2), torch.arange(24).view(12, 2) % 32
    start.fill(model)
    torch.testing.assert_close(model.double()(ids)[0], start.found.model.double()(ids)[0], rtol=0, atol=1e-12)
    model(ids)[0].logsumexp(-1).sum().backward()
    assert all(level.mlp.output.weight.grad.norm() > 0 for level in model.blocks["0"].cms.fast())


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (config(levels=fast(4)), config()),
        (config(levels=fast(4)), config(levels=fast(8))),
        (config(levels=fast(4)), config(levels=fast(4, 8))),
        (config(levels=fast(4, 8)), config("nested", fast(4, 8))),
        (config(levels=fast(4, heads=2)), config(levels=fast(4, heads=4))),
    ],
)
def test_what_would_compute_something_else_is_refused(source, target):
    assert list(differences(source, source)) == list(differences(target, target)) == []
    [problem] = differences(source, target)
    assert problem.path == "model.cms.in_context"
    assert "the chain would compute something else" in problem.what


def test_a_level_that_was_never_rewritten_is_rewritten_from_its_trained_weights(tmp_path):
    """Section 7.3: as the inner rate goes to 0 the model is the trained one. Rates have no origin and are drawn."""
    old = config(levels=fast(4, 8, rate=0))
    store(tmp_path / "source", Model(old).initialise(1), 5)
    ids = torch.arange(24).view(12, 2) % 32
    moved = []
    for rate in (1e-9, 0.025):
        target = config(levels=fast(4, 8, rate=rate))
        target.init = str(tmp_path / "source")
        [problem] = open_start(target, {})[1]
        assert problem.path == "model.cms.in_context"
        assert "rate: 0}" in problem.what
        assert problem.fix == "those of model.init; or model.init_allow=[settings]"
        target.init_allow = ["settings"]
        start, problems = open_start(target, {})
        assert problems == []
        model = Model(target).initialise(2)
        start.fill(model)
        known = dict(start.found.model.named_parameters())
        new = {
            name
            for name, value in model.named_parameters()
            if not torch.equal(value, known.get(name, value * torch.nan))
        }
        assert new
        assert all(".mlp.rates." in name for name in new), new
        moved.append((model.double()(ids)[0] - start.found.model.double()(ids)[0]).abs().max().item())
    assert moved[0] < 1e-6
    assert moved[1] > 1e-4


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (config(levels=fast(4)), config(levels=fast(4, 8))),
        (config(levels=fast(4, 8)), config("nested", fast(4, 8))),
        (config(levels=fast(4, heads=2)), config(levels=fast(4, heads=4))),
        (config(levels=fast(4)), config()),
    ],
)
def test_the_word_for_settings_is_none_for_other_weights(source, target):
    [problem] = differences(source, dataclasses.replace(target, init_allow=["settings"]))
    assert (problem.path, problem.fix) == ("model.cms.in_context", "those of model.init")
