"""Every optimizer in a selection of layouts against one device: two CMS levels, four updates, the slow one due."""

import pytest
from test_referee import LAYOUTS, SPOILERS, verdict

from parallel import parity
from parallel.sums import TensorSums

# 3 layers: with 4, data-parallel partitions meet exactly at boundaries of tensors, and none is cut
DEEP = ["optim.memory=mlp", "optim.mlp_lr=0.5", "model.kind=hope_attention", "model.layers=3"]
SETTINGS = {
    "mlp": DEEP,
    "mlp-all": [*DEEP, "optim.mlp_key=gradient", "optim.output=rms_clip", "optim.erase=0.3",
                "optim.bias_correction=false", "optim.normalise=value"],
    "adamw": ["optim.name=adamw", "train.grad_clip=0.1"],
    "local": ["optim.accumulate=local", "train.grad_clip=0.1", "parallel.sequence=true"],
    "muon": ["optim.name=muon"],
    "m3": ["optim.name=m3", "optim.m3_slow_period=2"],
}  # fmt: skip
QUICK = [
    ("tp2", "mlp"),
    ("pp2", "mlp"),
    ("dp2", "mlp"),
    ("tp2-dp2", "mlp-all"),
    ("tp2-dp2", "adamw"),
    ("tp2-dp2", "local"),
    ("dp2", "muon"),
    ("tp2-dp2", "muon"),
    ("dp2", "m3"),
    ("tp2-dp2", "m3"),
]


def check(found: dict) -> None:
    assert found["equal"], parity.table(found, 8)
    assert len(found["losses"]) == 4


@pytest.mark.parametrize(("layout", "name"), QUICK, ids=lambda v: v)
def test_layout_equals_one_device(tmp_path, layout, name):
    check(verdict(tmp_path, layout, "matrix", *SETTINGS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["matrix", "mlp", "transformer"])
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "local"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_all_layouts(tmp_path, layout, name, kind):
    more = [flag for flag in SETTINGS[name] if not flag.startswith("model.")]
    check(verdict(tmp_path, layout, kind, *more))


def every_rank_alone() -> None:
    """Each rank teaches its networks from its own partitions."""
    TensorSums.__call__ = lambda self, parts: parts


@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_a_broken_reduction_of_the_networks_gradient_is_noticed(tmp_path, monkeypatch, layout):
    monkeypatch.setitem(SPOILERS, "alone", every_rank_alone)
    found = verdict(tmp_path, layout, "matrix", *DEEP, "optim.mlp_key=gradient", spoil="alone")
    assert not found["equal"], parity.table(found, 8)
