"""CMS levels that are rewritten inside the sequence, against a token loop whose inner gradients are autograd's."""

import pytest
import torch
from in_context_reference import chain_of_rows, level_of_a_document
from titans_reference import by_documents

from hope.config import CmsConfig, ModelConfig
from hope.documents import Documents
from hope.memory.in_context_config import InContextConfig
from hope.model import Model

BOUND = 1e-11
LENGTH, BATCH, WIDTH, HEADS = 19, 2, 8, 2
OBJECTIVES, READS = ("next", "target"), ("boundary", "causal")
CHUNKS = {"one": [4], "online": [1], "odd": [5], "longer than all": [32]}
NESTED = {"two": [2, 6], "three": [2, 4, 8], "online in odd": [1, 5]}


def levels(chunks: list[int], **keys) -> list[InContextConfig]:
    """Rates and forgetting that a few tokens show."""
    settings = {"rate": 0.6, "forget_bias": -1.0, "hidden": 3, **keys}
    return [InContextConfig(chunk=chunk, **settings) for chunk in chunks]


def model(variant: str, fast: list[InContextConfig], layers: int = 1, **settings) -> Model:
    cms = CmsConfig(variant, [1, 2], hidden=6, in_context=fast)
    config = ModelConfig(["attention"], 32, WIDTH, layers, HEADS, cms=cms, **settings)
    assert not list(config.problems())
    made = Model(config).double().initialise(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # away from special initial values
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return made


def activations(length: int = LENGTH) -> torch.Tensor:
    return torch.randn(length, BATCH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def marks(packed: bool, length: int = LENGTH) -> torch.Tensor | None:
    return torch.rand(length, BATCH, generator=torch.Generator().manual_seed(2)) < 0.2 if packed else None


def with_gradients(function, module, x: torch.Tensor) -> list[torch.Tensor]:
    """y, and the gradients of a fixed weighting by the input and every parameter."""
    x = x.clone().requires_grad_()
    y = function(x)
    total = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    return [y, *torch.autograd.grad(total, [x, *module.parameters()])]


def assert_same(module, function, reference) -> None:
    found, expected = (with_gradients(f, module, activations()) for f in (function, reference))
    names = ["y", "x", *(n for n, _ in module.named_parameters())]
    for what, one, other in zip(names, found, expected, strict=True):
        assert other.abs().max() > 0, what
        assert (one - other).abs().max() <= BOUND * max(1.0, other.abs().max()), what


def assert_level(variant: str, fast: list[InContextConfig], packed: bool) -> None:
    [level], starts = model(variant, fast).blocks["0"].cms.in_context, marks(packed)
    documents = None if starts is None else Documents(starts)
    assert_same(
        level.mlp,
        lambda x: level.mlp(x, None, documents)[0],
        lambda x: by_documents(lambda d: level_of_a_document(level.mlp, d), x, starts),
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["one", "odd"])
def test_one_level(name, objective, read, packed):
    assert_level("sequential", levels(CHUNKS[name], objective=objective, read=read), packed)


@pytest.mark.parametrize("name", ["online", "longer than all"])
def test_the_shortest_and_the_longest_chunk(name):
    """A chunk that no document fills is read at the start only; causally it is one of plain gradient steps."""
    assert_level("sequential", levels(CHUNKS[name], objective="target", read="causal"), True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["two", *(pytest.param(n, marks=pytest.mark.slow) for n in list(NESTED)[1:])])
def test_nested_levels(name, objective, read, packed):
    assert_level("nested", levels(NESTED[name], objective=objective, read=read), packed)


SHAPES = {
    "nothing forgotten": {"forget_bias": None},
    "narrow heads": {"heads": 3, "head_dim": 2},
    "one wide head": {"heads": 1, "hidden": None},
    "default rate": {"rate": None},
}


@pytest.mark.parametrize("name", list(SHAPES))
def test_every_shape_and_rate(name):
    assert_level("sequential", levels([4], **SHAPES[name]), True)
    assert_level("nested", levels([2, 4], **SHAPES[name]), True)


@pytest.mark.parametrize("biases", [(None, -1.0), (-1.0, None)])
def test_nested_levels_of_which_one_forgets(biases):
    fast = [level for bias, chunk in zip(biases, (2, 6), strict=True) for level in levels([chunk], forget_bias=bias)]
    assert_level("nested", fast, True)
    [level] = model("nested", fast).blocks["0"].cms.in_context
    level.mlp.watched = True
    level.mlp(activations())
    shown = {name for name in level.mlp.report().histograms if name.endswith("_alpha")}
    assert shown == {f"in_context0.{biases.index(-1.0)}_alpha"}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", ["sequential", "independent"])
def test_two_levels_of_either_objective_before_the_slow_ones(variant, packed):
    """Mixed freely: two levels in context and two on the optimizer's clock, in one chain or side by side."""
    fast = levels([3], objective="next", read="causal") + levels([4], objective="target", rate=0.3)
    cms, starts = model(variant, fast).blocks["0"].cms, marks(packed)
    documents = None if starts is None else Documents(starts)

    def ours(x):
        for sublayer in cms.sublayers():
            x = x + sublayer(x, None, documents)[0]
        return x

    assert_same(cms, ours, lambda x: chain_of_rows(cms, x, starts, variant == "independent"))


def test_a_nested_level_begins_anew_when_the_slower_one_is_rewritten():
    """Its weights at the slower one's border are the slower one's alone: what it wrote before does not matter."""
    x = activations(12)
    for rate in (0.0, 0.6):
        [level] = model("nested", [*levels([2], rate=rate), *levels([6])]).blocks["0"].cms.in_context
        y = level.mlp(x)[0]
        if rate == 0.0:
            still = y
    assert torch.equal(y[:2], still[:2])
    assert (y[2:6] - still[2:6]).abs().max() > 1e-3
    assert torch.equal(y[6:8], still[6:8])  # boundary reads of the first chunk after
    assert (y[8:] - still[8:]).abs().max() > 1e-3


def test_a_nested_level_whose_slower_one_never_writes_is_one_that_forgets_all_at_its_border():
    x = activations(12)
    [nested] = model("nested", [*levels([2]), *levels([6], rate=0.0)]).blocks["0"].cms.in_context
    whole = nested.mlp(x)[0]
    halves = torch.cat([nested.mlp(part)[0] for part in x.split(6)])
    assert (whole[1:6] - halves[1:6]).abs().max() == 0
    # the first pair of the second half has its key before the border
    assert (whole[6:8] - halves[6:8]).abs().max() <= 1e-15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunks", [[1], [8], [16, 32]])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_with_rate_zero_it_is_the_ordinary_mlp_to_the_bit(objective, read, chunks, dtype):
    fast = [InContextConfig(chunk=chunk, rate=0.0, objective=objective, read=read, heads=2, head_dim=16, hidden=32)
            for chunk in chunks]  # fmt: skip
    made = Model(ModelConfig(
        ["attention"], 32, 64, 1, 2,
        cms=CmsConfig("nested" if len(chunks) > 1 else "sequential", [1], in_context=fast),
    )).initialise(3).to(dtype)  # fmt: skip
    [level] = made.blocks["0"].cms.in_context
    x = torch.randn(67, 3, 64, dtype=dtype, generator=torch.Generator().manual_seed(1))
    u = (x @ level.mlp.input.weight.T).unflatten(-1, (2, 16)).permute(1, 2, 0, 3)
    u = u * torch.rsqrt(u.square().sum(-1, keepdim=True) + 1e-6) * 4.0
    y = torch.nn.functional.silu(u @ level.mlp.first.mT) @ level.mlp.second.mT
    with torch.no_grad():
        found, state = level.mlp(x)
        assert torch.equal(found, y.permute(2, 0, 1, 3).flatten(-2) @ level.mlp.output.weight.T)
        assert state is None


@pytest.mark.parametrize("name", ["next", "target", "nested"])
def test_a_loop_that_writes_nothing_comes_to_the_ordinary_mlp(name):
    variant, fast = CASES[name]
    [level] = model(variant, fast).blocks["0"].cms.in_context
    with torch.no_grad():
        ordinary = level.mlp.ordinary(activations())
        assert (level.mlp(activations())[0] - ordinary).abs().max() > 1e-3
        for rates in level.mlp.rates:
            rates.theta_max = 0.0
        assert (level.mlp(activations())[0] - ordinary).abs().max() <= 1e-14


CASES = {
    "next": ("sequential", levels([4], objective="next", read="causal")),
    "target": ("sequential", levels([4], objective="target")),
    "two": ("sequential", levels([3], objective="next") + levels([5], objective="target", read="causal")),
    "independent": ("independent", levels([3], objective="next") + levels([5], objective="target")),
    "nested": ("nested", levels([2, 6], objective="next")),
    "nested target": ("nested", levels([2, 4], objective="target", read="causal")),
}


@pytest.mark.parametrize("name", list(CASES))
def test_tokens_see_only_what_came_before(name):
    made = model(*CASES[name])
    x = activations().requires_grad_()
    [level, *_] = made.blocks["0"].cms.in_context
    y = level.mlp(x)[0]
    [seen] = torch.autograd.grad(y[9].sum(), x)
    assert seen[10:].abs().max() == 0
    assert seen[:5].abs().max() > 0  # through the writes
