"""The plan is complete for every kind of model, and cutting and joining are inverse."""

import itertools

import pytest
import torch

from hope.config import CmsConfig, MemoryConfig, ModelConfig
from hope.model import Model
from parallel.layout.plan import PLAN, ROWS, PlanError, Rule, layout_of

MODELS = list(
    itertools.product(["hope", "hope_attention", "transformer"], ["matrix", "mlp"], ["sequential", "independent"])
)


def model(kind: str, memory: str, variant: str) -> Model:
    config = ModelConfig(
        kind=kind,
        vocab_size=64,
        width=32,
        layers=2,
        heads=4,
        tie_embeddings=False,
        memory=MemoryConfig(kind=memory, adaptive_query=True),
        cms=CmsConfig(variant, [1, 2]),
    )
    return Model(config).initialise(0)


@pytest.mark.parametrize(("kind", "memory", "variant"), MODELS)
def test_every_parameter_has_one_row_and_divides_over_ranks(kind, memory, variant):
    for name, parameter in model(kind, memory, variant).named_parameters():
        layout = layout_of(name)
        parts = [layout.cut(parameter, rank, 4) for rank in range(4)]
        assert torch.equal(layout.join(parts), parameter), name
        assert (layout.dim is None) == (layout.rule is not Rule.LOCAL), name
        if layout.dim is not None:
            assert sum(p.numel() for p in parts) == parameter.numel(), name


def test_every_row_is_used_by_some_model():
    names = {n for m in MODELS for n, _ in model(*m).named_parameters()}
    for pattern, layout in PLAN.items():
        assert any(layout_of(n, {pattern: layout}) for n in names if _matches(pattern, layout, n)), pattern


def _matches(pattern, layout, name) -> bool:
    try:
        layout_of(name, {pattern: layout})
    except PlanError:
        return False
    return True


def test_unlisted_and_twice_listed_parameters_are_errors():
    with pytest.raises(PlanError, match=r"blocks\.0\.mixer\.new\.weight matches no row"):
        layout_of("blocks.0.mixer.new.weight")
    with pytest.raises(PlanError, match=r"rows blocks\.\*\.norm\.weight and \*\.\*\.norm\.weight"):
        layout_of("blocks.0.norm.weight", {"blocks.*.norm.weight": ROWS, "*.*.norm.weight": ROWS})


def test_a_star_is_one_part_of_the_name():
    """`blocks.*.norm.weight` must not catch the norm inside a mixer, whose gradient rule is another."""
    assert layout_of("blocks.3.norm.weight").rule is Rule.PARTIAL_UNDER_SEQUENCE
    assert layout_of("blocks.3.mixer.norm.weight").rule is Rule.PARTIAL


def test_dimensions_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"dimension 0 of \(64, 32\) is not a multiple of 3"):
        layout_of("embedding.weight").cut(torch.zeros(64, 32), 0, 3)
