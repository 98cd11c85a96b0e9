"""`optim.groups[].rate: 0`: what is frozen takes no step, has no states, and costs neither memory nor traffic."""

import dataclasses

import pytest
import torch
from optims import with_dmgd

from hope.config import CmsConfig, ModelConfig
from hope.model import Model, Slice
from hope.optim.build import build_optimizer
from hope.optim.config import OptimConfig
from hope.optim.group_config import GroupConfig
from hope.optim.levels import parameter_groups
from hope.optim.policy import group_problems, learns
from parallel.layout.memory import StepShape, build_part, optimizer_bytes
from parallel.layout.report import group_table
from parallel.layout.traffic import reduced_bytes_per_step

SMALL = ModelConfig(vocab_size=32, width=16, layers=2, heads=2, cms=CmsConfig(periods=[1, 2]), tie_embeddings=False)
LEARNS = "*.cms.levels.1.*"
BUT_ONE_LEVEL = [GroupConfig(match=LEARNS), GroupConfig(match="*", rate=0.0)]
KINDS = {
    "adamw": OptimConfig(name="adamw"),
    "mlp": with_dmgd(memory="mlp", output="rms_match"),
    "muon": OptimConfig(name="muon", lr_elementwise=1e-2, level_rate=0.5),
    "m3": OptimConfig(name="m3"),
}


def frozen(config: OptimConfig, groups: list[GroupConfig] = BUT_ONE_LEVEL) -> OptimConfig:
    return dataclasses.replace(config, weight_decay=0.5, groups=groups)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_are_equal_to_the_bit_and_have_no_states(kind):
    config = frozen(KINDS[kind])
    model = Model(SMALL).initialise(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(parameter_groups(model, config.weight_decay, config), config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.set_lr(1e-2)
        optimizer.watch(True)
        optimizer.step()
    optimizer.allocate_states()
    for name, p in model.named_parameters():
        moves = "levels.1" in name
        assert torch.equal(p, before[name]) != moves, name
        assert bool(optimizer.state[p]) == moves, name
    assert {group["clock"] for group in optimizer.param_groups} == {4}
    assert {group["updates"] for group in optimizer.param_groups if group["rate"] == 0} == {0}


def test_clipping_sees_no_gradient_of_what_is_frozen():
    config = frozen(KINDS["adamw"], [GroupConfig(match="embedding.*", rate=0.0)])
    model = Model(SMALL).initialise(0)
    optimizer = build_optimizer(parameter_groups(model, 0.0, config), config)
    model.embedding.weight.grad = torch.full_like(model.embedding.weight, 1e6)
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    assert optimizer.norm() == pytest.approx(SMALL.width**0.5)


def test_the_first_entry_that_matches_says_whether_a_parameter_learns():
    config = frozen(KINDS["adamw"])
    assert list(group_problems(SMALL, config)) == list(config.problems()) == []
    assert learns("blocks.0.cms.levels.1.mlp.up.weight", config)
    assert not learns("blocks.0.cms.levels.0.mlp.up.weight", config)
    assert learns("embedding.weight", KINDS["adamw"])


@pytest.mark.parametrize(
    ("groups", "path", "words"),
    [
        ([{"match": "*", "rate": 0.0}], "optim.groups", ("freezes all", "would learn", "cms.levels.0")),
        ([{"match": "head.*"}, {"match": "blocks.*", "rate": 0.0}], "optim.groups[0]", ("nothing out of a later",)),
        ([{"match": "blocks.*", "rate": 0.0}, {"match": "head.*"}], "optim.groups[1]", ("changes nothing",)),
        ([{"match": "head.*", "rate": 0.0, "weight_decay": 0.1}], "optim.groups[0].weight_decay", ("0.1 is not used",)),
        ([{"match": "head.*", "rate": -1.0}], "optim.groups[0].rate", ("not a factor", "0 to freeze")),
    ],
)
def test_what_freezes_everything_or_nothing_is_refused(groups, path, words):
    config = dataclasses.replace(KINDS["adamw"], groups=[GroupConfig(**one) for one in groups])
    [problem] = [*config.problems(), *group_problems(SMALL, config)]
    assert problem.path == path
    assert all(word in f"{problem.what} {problem.fix}" for word in words)


@pytest.mark.parametrize("accumulate", ["sharded", "local"])
def test_a_frozen_group_is_printed_and_costs_its_masters_alone(accumulate):
    plain = dataclasses.replace(KINDS["muon"], accumulate=accumulate)
    config, shape = dataclasses.replace(plain, groups=BUT_ONE_LEVEL), StepShape(16, 2, False, data=2)
    part = Slice(0, SMALL.layers)
    sizes = {name: p.numel() for name, p in Model(SMALL).named_parameters()}
    still = sum(size for name, size in sizes.items() if "levels.1" not in name)
    memory = [optimizer_bytes([build_part(SMALL, part, shape)], o, shape) for o in (plain, config)]
    states = {name: 1 if group["matrices"] else 2 for group in parameter_groups(Model(SMALL), 0.1, plain)
              for name in group["names"]}  # fmt: skip
    gone = sum(4 * size * states[name] for name, size in sizes.items() if "levels.1" not in name)
    assert memory[0] - memory[1] == pytest.approx(gone / 2, abs=2)
    traffic = [reduced_bytes_per_step(SMALL, [part], shape, o) for o in (plain, config)]
    assert traffic[0] - traffic[1] == 4 * still
    rows = [line.split() for line in group_table(SMALL, config, None).splitlines()[1:]]
    assert {row[0].startswith("base") or row[0].startswith("cms0") for row in rows if row[1] == "frozen"} == {True}
    assert sum(int(row[-1].replace(",", "")) for row in rows if row[1] == "frozen") == still
