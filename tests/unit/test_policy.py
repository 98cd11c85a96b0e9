"""How each parameter is updated: by declaration, by level, by name; against plain optimizers of single tensors."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from hope.config import CmsConfig, ModelConfig
from hope.model import Model
from hope.optim import newton_schulz
from hope.optim.build import build_optimizer
from hope.optim.config import M3Config, MuonConfig, OptimConfig
from hope.optim.group_config import GroupConfig
from hope.optim.levels import counters_of, parameter_groups
from hope.optim.momentum import beta1_at
from hope.optim.policy import group_problems
from hope.parameters import declarations, new_parameter, normal
from parallel.layout.report import group_table

SMALL = ModelConfig(vocab_size=32, width=16, layers=2, heads=2, cms=CmsConfig(periods=[1, 2]), tie_embeddings=False)
ADAMW = OptimConfig(name="adamw", lr=1e-2, weight_decay=0.1)
MUON = OptimConfig(name="muon", lr=1e-2, weight_decay=0.1, lr_elementwise=4e-2, level_rate=0.5)
EXCEPTIONS = [
    GroupConfig(match="blocks.0.mixer.output.*", rule="elementwise", beta1=0.7, beta2=0.8),
    GroupConfig(match="head.*", rule="matrix", rate=0.5, weight_decay=0.0),
    GroupConfig(match="blocks.*.mixer.*", rate=3.0, weight_decay=0.02, beta1=0.8),
]


def gradients(model: Model, steps: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return [{name: draw(p) for name, p in model.named_parameters()} for _ in range(steps)]


def follow(config: OptimConfig, steps: int = 4, lr: float = 1e-2) -> dict[str, torch.Tensor]:
    """Weights after some steps of a small model in float64, its gradients given."""
    model = Model(SMALL).initialise(0).double()
    optimizer = build_optimizer(parameter_groups(model, config.weight_decay, config), config)
    for given in gradients(model, steps):
        for name, p in model.named_parameters():
            p.grad = given[name].clone()
        optimizer.set_lr(lr)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def plain(kind: str, rate: float, decay: float, betas: tuple[float, float], name: str) -> torch.Tensor:
    """The same tensor under torch's AdamW, or Muon written out, at the gradients' mean over its level's period."""
    model = Model(SMALL).initialise(0).double()
    p, period = dict(model.named_parameters())[name], 2 if "levels.1" in name else 1
    seen = [given[name] for given in gradients(model, 4)]
    means = [torch.stack(seen[i : i + period]).mean(0) for i in range(0, 4, period)]
    if kind == "adamw":
        reference = torch.optim.AdamW([p], lr=rate, weight_decay=decay, betas=betas)
        for p.grad in means:
            reference.step()
        return p.detach()
    w, memory, beta1 = p.detach().clone(), torch.zeros_like(p), betas[0]
    for g in means:
        memory = beta1 * memory + (1 - beta1) * g
        ahead = (1 - beta1) * g + beta1 * memory
        size = 0.2 * math.sqrt(max(w.shape[-2:]))
        w = w * (1 - rate * decay) - rate * size * newton_schulz.orthogonalise(ahead, 5)
    return w


CASES: list[tuple[str, OptimConfig, tuple[Any, ...]]] = [
    # declared; level; exceptions
    ("embedding.weight", MUON, ("adamw", 4e-2, 0.1, (0.9, 0.95))),
    ("blocks.0.mixer.query.weight", MUON, ("muon", 1e-2, 0.1, (0.9, 0.95))),
    ("blocks.0.mixer.eta_bias", MUON, ("adamw", 4e-2, 0.0, (0.9, 0.95))),
    ("blocks.1.cms.levels.1.mlp.up.weight", MUON, ("muon", 1e-2 * 2**0.5, 0.1, (0.9, 0.95))),
    ("blocks.1.cms.levels.1.norm.weight", MUON, ("adamw", 4e-2 * 2**0.5, 0.0, (0.9, 0.95))),
    ("blocks.1.cms.levels.0.mlp.up.weight", MUON, ("muon", 1e-2, 0.1, (0.9, 0.95))),
    ("embedding.weight", dataclasses.replace(ADAMW, lr_elementwise=5e-3), ("adamw", 5e-3, 0.1, (0.9, 0.95))),
    ("blocks.0.mixer.query.weight", dataclasses.replace(ADAMW, lr_elementwise=5e-3), ("adamw", 1e-2, 0.1, (0.9, 0.95))),
    ("blocks.0.norm.weight", dataclasses.replace(ADAMW, lr_elementwise=5e-3), ("adamw", 5e-3, 0.0, (0.9, 0.95))),
    ("blocks.0.mixer.output.weight", dataclasses.replace(MUON, groups=EXCEPTIONS), ("adamw", 4e-2, 0.1, (0.7, 0.8))),
    ("blocks.1.mixer.output.weight", dataclasses.replace(MUON, groups=EXCEPTIONS), ("muon", 3e-2, 0.02, (0.8, 0.95))),
    ("blocks.1.mixer.key.weight", dataclasses.replace(MUON, groups=EXCEPTIONS), ("muon", 3e-2, 0.02, (0.8, 0.95))),
    ("blocks.1.mixer.norm.weight", dataclasses.replace(MUON, groups=EXCEPTIONS), ("adamw", 12e-2, 0.02, (0.8, 0.95))),
    ("head.weight", dataclasses.replace(MUON, groups=EXCEPTIONS), ("muon", 5e-3, 0.0, (0.9, 0.95))),
]


@pytest.mark.parametrize(("name", "config", "expected"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_a_tensor_moves_as_under_a_plain_optimizer_at_its_own_rate(name, config, expected):
    """In a period of two steps the slow level's tensors see the mean gradient, at a rate times C^g."""
    torch.testing.assert_close(follow(config)[name], plain(*expected, name), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_a_levels_rate_is_its_period_to_the_power_of_level_rate(exponent):
    model = dataclasses.replace(SMALL, cms=CmsConfig(periods=[1, 4, 16]))
    config = dataclasses.replace(ADAMW, level_rate=exponent)
    rates = {group["name"]: group["rate"] for group in parameter_groups(Model(model), 0.1, config)}
    assert (rates["base"], rates["cms0"]) == (1.0, 1.0)
    assert (rates["cms1"], rates["cms1.undecayed"], rates["cms2"]) == (4**exponent, 4**exponent, 16**exponent)


@pytest.mark.parametrize("rows", [3, 4])
@pytest.mark.parametrize("name", ["muon", "m3", "m3 literal"])
def test_per_head_is_each_heads_block_alone(name, rows):
    m3 = M3Config(slow_period=2, reading="literal" if "literal" in name else "ema")
    config = OptimConfig(name=name.split()[0], lr=0.02, m3=m3)
    generator = torch.Generator().manual_seed(1)
    seen = [torch.randn(12, 10, generator=generator, dtype=torch.float64) for _ in range(5)]

    def moved(part: slice, **more: Any) -> torch.Tensor:
        p = torch.nn.Parameter(torch.ones(12, 10, dtype=torch.float64)[part])
        optimizer = build_optimizer([{"params": [p], "matrices": True, "weight_decay": 0.1, **more}], config)
        for g in seen:
            p.grad = g[part].clone()
            optimizer.step()
        return p.detach()

    apart = torch.cat([moved(slice(i, i + rows)) for i in range(0, 12, rows)])
    torch.testing.assert_close(moved(slice(None), head_rows=rows), apart, rtol=1e-10, atol=1e-12)
    assert (moved(slice(None)) - apart).norm() > 1e-2


@pytest.mark.parametrize(
    ("mixer", "maps"), [("hope", {"input", "query", "key", "value"}), ("attention", {"query", "key", "value"})]
)
def test_which_maps_are_taken_per_head(mixer, maps):
    config = dataclasses.replace(MUON, muon=MuonConfig(per_head=True))
    groups = parameter_groups(Model(dataclasses.replace(SMALL, pattern=[mixer], layers=1)), 0.1, config)
    found = {group["name"]: group for group in groups}["base.matrices.heads_of_8"]
    assert {name.removeprefix("blocks.0.mixer.").removesuffix(".weight") for name in found["names"]} == maps
    assert found["head_rows"] == 8


@pytest.mark.parametrize(("shape", "more"), [((6, 4), {"cut": 1}), ((7, 4), {"cut": 0}), ((3, 2, 4), {"cut": 0})])
def test_a_parameter_that_has_no_such_heads_cannot_declare_them(shape, more):
    update = "matrix" if len(shape) == 2 else "matrix_per_head"
    with pytest.raises(ValueError, match="has no heads of 2 rows"):
        new_parameter(*shape, init=normal(1.0), update=update, head_rows=2, **more)


@pytest.mark.parametrize("period", [1, 2])
def test_momentum_warms_up_and_its_bias_is_the_product_of_all_betas(period):
    config = OptimConfig(name="adamw", lr=1e-2, weight_decay=0.0, momentum_warmup=5, beta1_start=0.5, beta1=0.9)
    p = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = build_optimizer([{"params": [p], "period": period}], config)
    generator = torch.Generator().manual_seed(2)
    w, s, v, kept, t, total = torch.ones(6, dtype=torch.float64), 0.0, 0.0, 1.0, 0, torch.zeros(6, dtype=torch.float64)
    for step in range(1, 11):
        g = torch.randn(6, generator=generator, dtype=torch.float64)
        p.grad, total = g.clone(), total + g
        optimizer.step()
        if step % period == 0:
            u, total, t = total / period, torch.zeros_like(total), t + 1
            beta1 = min(0.9, 0.5 + 0.4 * (step - 1) / 5)
            s, v, kept = beta1 * s + (1 - beta1) * u, 0.95 * v + 0.05 * u * u, kept * beta1
            w = w - 1e-2 * (s / (1 - kept)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), w, rtol=1e-11, atol=1e-13)


def test_a_warm_up_of_the_momentum_reaches_muon_and_ends():
    at = lambda step: beta1_at(step, final=0.95, start=0.85, warmup=4)
    assert [at(step) for step in (1, 3, 5, 6)] == [0.85, pytest.approx(0.9), 0.95, 0.95]
    warm = dataclasses.replace(MUON, momentum_warmup=100, beta1_start=0.9)
    name = "blocks.0.mixer.query.weight"
    torch.testing.assert_close(follow(warm)[name], follow(MUON)[name])  # from beta1 to beta1
    assert (follow(dataclasses.replace(warm, beta1_start=0.1))[name] - follow(MUON)[name]).abs().max() > 1e-4


def test_settings_that_change_nothing_leave_names_and_numbers():
    for config in (ADAMW, dataclasses.replace(MUON, lr_elementwise=None, level_rate=0.0)):
        for group in parameter_groups(Model(SMALL), 0.1, config):
            assert (group["rate"], group["beta1"], group["beta2"], group["head_rows"]) == (1.0, None, None, 0)
            assert group["name"].count(".") <= 1


@pytest.mark.parametrize(
    ("config", "groups", "path", "words"),
    [
        (MUON, [{"match": "blocks.*.mixer.qury.*", "rate": 2.0}], "[0].match", ("matches no parameter", "mixer.query")),
        (MUON, [{"match": "blocks.*", "rate": 2.0}, {"match": "blocks.1.*", "rate": 3.0}], "[1].match",
         ("only names that optim.groups[0] take first", "put it before")),
        (ADAMW, [{"match": "*query*", "rule": "elementwise"}], "[0].rule", ("updates everything", "muon or m3")),
        (MUON, [{"match": "blocks.*.norm.*", "rule": "matrix"}], "[0].rule", ("blocks.0.norm.weight", "shape (16,)")),
        (MUON, [{"match": "*.query.weight", "beta2": 0.9}], "[0].beta2", ("not used", "leave it out")),
    ],
)  # fmt: skip
def test_entries_that_cannot_work_are_refused(config, groups, path, words):
    [problem] = group_problems(SMALL, dataclasses.replace(config, groups=[GroupConfig(**one) for one in groups]))
    assert problem.path == f"optim.groups{path}"
    assert all(word in f"{problem.what} {problem.fix}" for word in words)


def test_a_tied_embedding_is_no_matrix_and_a_head_of_its_own_can_be():
    exceptional = dataclasses.replace(MUON, groups=[GroupConfig(match="embedding.*", rule="matrix")])
    assert list(group_problems(SMALL, exceptional)) == []
    [problem] = group_problems(dataclasses.replace(SMALL, tie_embeddings=True), exceptional)
    assert "embedding.weight cannot be updated as a matrix: it is the head too" in problem.what


def test_what_cannot_work_whatever_the_model():
    bad = OptimConfig(
        lr_elementwise=0.0, level_rate=9.0, momentum_warmup=5, beta1_start=0.95, warmup=0.5, decay="wsd",
        decay_length=2.5, groups=[GroupConfig(match="", rate=-1.0, beta2=1.0), GroupConfig(match="a")],
    )  # fmt: skip
    assert {problem.path.removeprefix("optim.") for problem in bad.problems()} == {
        "lr_elementwise", "level_rate", "beta1_start", "decay_length", "groups[1]", "groups[0].match",
        "groups[0].rate", "groups[0].beta2",
    }  # fmt: skip


def test_regrouped_parameters_find_their_levels_clock_in_an_older_checkpoint():
    old = {"base": {"clock": 8, "updates": 8}, "cms1": {"clock": 8, "updates": 2}}
    assert counters_of("base", old) == old["base"]
    assert counters_of("base.group0", old) == old["base"]
    assert counters_of("cms1.elementwise", old) == old["cms1"]
    with pytest.raises(KeyError):
        counters_of("cms2", old)


def test_the_table_of_groups_has_every_parameter_once():
    config = dataclasses.replace(MUON, groups=EXCEPTIONS, muon=MuonConfig(per_head=True))
    lines = group_table(SMALL, config, None).splitlines()
    rows = {line.split()[0]: line.split() for line in lines[1:]}
    total = sum(p.numel() for _, p, _ in declarations(Model(SMALL)))
    assert sum(int(row[-1].replace(",", "")) for row in rows.values()) == total
    assert rows["base.matrices.group1"][1:-2] == ["muon", "1", "5.00e-03", "0.5", "0", "0.9", "0.95"]
    assert rows["base.matrices.heads_of_8.group2"][1:4] == ["muon", "per", "head"]
    assert rows["cms1.undecayed"][1:5] == ["adamw", "2", "5.66e-02", "5.66"]
