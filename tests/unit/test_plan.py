"""The plan is derived from declarations, complete for every kind of model. Cutting and joining are inverse."""

import itertools

import pytest
import torch
from models import named
from torch import nn

from hope.config import CmsConfig
from hope.layers import SwiGlu
from hope.memory.config import MemoryConfig
from hope.model import Model
from hope.parameters import UndeclaredParameter, constant, new_parameter
from parallel import plan
from parallel.layout.plan import GradientRule, layout_of, plan_of, plan_of_config, plan_table
from parallel.layout.regions import outermost_regions

MODELS = list(
    itertools.product(["hope", "hope_attention", "transformer"], ["matrix", "mlp"], ["sequential", "independent"])
)


def model(kind: str, memory: str, variant: str) -> Model:
    memories = MemoryConfig(memory=memory, adaptive_query=True)
    cms = CmsConfig(variant, [1, 2])
    config = named(kind, memory=memories, vocab_size=64, width=32, layers=2, heads=4, tie_embeddings=False, cms=cms)
    return Model(config).initialise(0)


@pytest.mark.parametrize(("kind", "memory", "variant"), MODELS)
def test_every_parameter_has_a_layout_and_divides_over_ranks(kind, memory, variant):
    for name, parameter in model(kind, memory, variant).named_parameters():
        layout = layout_of(parameter, name)
        parts = [layout.cut(parameter, rank, 4) for rank in range(4)]
        assert torch.equal(layout.join(parts), parameter), name
        assert (layout.dim is None) == (layout.rule is not GradientRule.LOCAL), name
        if layout.dim is not None:
            assert sum(p.numel() for p in parts) == parameter.numel(), name


def test_what_is_used_on_heads_is_partial_and_what_is_used_on_the_trunk_only_under_sequence():
    """The norm before a mixer and the norm inside it have other rules, whatever they are called."""
    found = plan_of(model("hope", "matrix", "sequential"))
    assert found["blocks.1.norm.weight"].rule is GradientRule.PARTIAL_UNDER_SEQUENCE
    assert found["blocks.1.mixer.norm.weight"].rule is GradientRule.PARTIAL


def test_slices_have_the_plan_of_the_whole():
    whole = model("hope", "matrix", "sequential")
    assert plan_of_config(whole.config) == plan_of([whole]) == plan_of(whole)


def test_an_undeclared_parameter_is_named():
    whole = model("hope", "matrix", "sequential")
    whole.blocks["1"].mixer.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(UndeclaredParameter, match=r"blocks\.1\.mixer\.extra declares nothing; create it with"):
        plan_of(whole)
    with pytest.raises(UndeclaredParameter, match=r"blocks\.1\.mixer\.extra"):
        whole.initialise(0)


@pytest.mark.parametrize(
    "declared",
    [{}, {"cut": 0, "used": "trunk"}, {"cut": 0, "update": "matrix"}, {"used": "heads", "update": "matrix_per_head"}],
    ids=["neither", "both", "vector-as-matrix", "vector-as-stack"],
)
def test_a_declaration_that_contradicts_itself_is_refused(declared):
    with pytest.raises(ValueError, match=r"a parameter \(3,\)"):
        new_parameter(3, init=constant(0.0), **{"update": "elementwise", **declared})


def test_dimensions_that_do_not_divide_are_refused():
    layout = plan_of(model("hope", "matrix", "sequential"))["embedding.weight"]
    with pytest.raises(ValueError, match=r"dimension 0 of \(64, 32\) is not a multiple of 3"):
        layout.cut(torch.zeros(64, 32), 0, 3)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_head_starts_from_its_own_alpha_whatever_the_layout(ranks):
    """Evenly from alpha_bias - alpha_spread to alpha_bias + alpha_spread."""
    config = named(width=32, heads=4, layers=1, memory=MemoryConfig(alpha_bias=4.0, alpha_spread=3.0))
    bias = Model(config).initialise(0).blocks["0"].mixer.alpha_bias
    found = [layout_of(bias).cut(bias.data, rank, ranks).tolist() for rank in range(ranks)]
    assert [len(of_rank) for of_rank in found] == [4 // ranks] * ranks
    assert list(itertools.chain(*found)) == [1.0, 3.0, 5.0, 7.0]


class Nested(nn.Module):
    """A region around a region, as a mixer that is made of others has."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Identity(), nn.Identity()
        self.inner, self.other = SwiGlu(8, 16), nn.ModuleList([SwiGlu(8, 16)])


def test_of_nested_regions_the_outermost_has_borders():
    alone, nested = SwiGlu(8, 16), Nested()
    assert list(outermost_regions(nn.ModuleList([alone, nested]))) == [alone, nested]


def test_the_table(tmp_path, capsys):
    text = plan_table(named(memory=MemoryConfig(static="learned"), vocab_size=64, width=32, layers=3, heads=4))
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert "row-parallel" in rows["blocks.*.mixer.output.weight"]
    assert "column-parallel" in rows["blocks.*.mixer.query.weight"]
    assert "matrix, 8 rows a head" in rows["blocks.*.mixer.query.weight"]
    assert rows["blocks.*.mixer.norm.weight"].split()[2:4] == ["replicated", "partial"]
    assert rows["blocks.*.mixer.static_k"].split()[-2:] == ["matrix_per_head", "0-2"]
    path = tmp_path / "c.yaml"
    path.write_text(
        "run: {name: x}\nmodel: {layers: 2}\ndata: {train: a, heldout: b}\n"
        "train: {steps: 1, seq_len: 8, global_batch: 1, micro_batch: 1}\n"
    )
    assert plan.main([str(path)]) == 0
    assert "blocks.*.cms.levels.0.mlp.down.weight" in capsys.readouterr().out
    assert plan.main([str(path), "model.pattern=[unheard_of]"]) == 2
    assert "no mixer is called unheard_of" in capsys.readouterr().err
