"""Any layout to any layout: every weight and state by value, every clock, and the losses that follow.

A few pairs here; all 49 for both memories of DMGD, and a selection for the other optimizers, with `make matrix`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layout_matrix import LAYOUTS, State, load, save

SEVEN = [name for name in LAYOUTS if name != "pp2-vpp2"]
QUICK = [  # load layout, optimizer, save layouts
    pytest.param("1", "mlp", ["tp2-pp2-dp2"], marks=pytest.mark.slow),
    ("dp2", "m3", ["dp4"]),
    ("tp2-pp2", "mlp", ["dp4", "pp2-vpp2"]),
]
WHOLE = [(layout, optimizer) for optimizer in ("linear", "mlp") for layout in SEVEN]
OTHERS = [(layout, optimizer) for optimizer in ("mlp-local", "muon", "m3") for layout in ("tp2-dp2", "pp2-dp2")]


def assert_same_run(loaded: State, saved: State, bit_equal: bool) -> None:
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, values in saved.tensors.items():
        assert torch.equal(loaded.tensors[name], values), name
    assert loaded.counters == saved.counters
    if bit_equal:
        assert loaded.losses == saved.losses
    else:
        assert loaded.losses == pytest.approx(saved.losses, rel=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], State]]:
    """A folder per optimizer and what was saved there, filled as tests ask for it."""
    return tmp_path_factory.mktemp("matrix"), {}


def check(saved: tuple[Path, dict[tuple[str, str], State]], layout: str, sources: list[str], optimizer: str) -> None:
    folder, states = saved[0] / optimizer, saved[1]
    for source in sources:
        if (optimizer, source) not in states:
            states[optimizer, source] = save(folder, source, optimizer)
    for source, state in load(folder, sources, layout, optimizer).items():
        assert_same_run(state, states[optimizer, source], bit_equal=source == layout)


@pytest.mark.parametrize(("layout", "optimizer", "sources"), QUICK)
def test_resume_in_another_layout(saved, layout: str, optimizer: str, sources: list[str]) -> None:
    check(saved, layout, sources, optimizer)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("layout", "optimizer"), WHOLE + OTHERS)
def test_the_whole_matrix(saved, layout: str, optimizer: str) -> None:
    check(saved, layout, SEVEN, optimizer)


def test_states_are_there_and_are_not_zero(tmp_path: Path) -> None:
    """Else equality would show nothing: moments of all tensors, accumulators of the slow level, mid-period."""
    state = save(tmp_path, "1", "linear", further=0)
    keys = {name.partition("/")[0] for name in state.tensors}
    assert keys == {"master", "memory", "square", "accumulator"}
    slow = [name for name in state.tensors if ".cms.levels.1." in name]
    assert {name.partition("/")[0] for name in slow} == keys
    assert all(state.tensors[name].abs().sum() > 0 for name in state.tensors if "read" not in name), "a state is zero"
    assert state.counters["cms1"] == {"clock": 4, "updates": 1}
    assert state.counters["base"] == {"clock": 4, "updates": 4}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_steps_after_a_change_of_layout(tmp_path: Path) -> None:
    straight = save(tmp_path, "pp2-dp2", "linear", further=20)
    resumed = load(tmp_path, ["pp2-dp2"], "tp2-pp2", "linear", further=20)["pp2-dp2"]
    assert resumed.losses == pytest.approx(straight.losses, rel=1e-5)
    assert straight.losses[-1] != straight.losses[0]
