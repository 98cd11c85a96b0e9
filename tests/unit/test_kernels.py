"""Which kernels the optimizer takes, and the reason that it gives for the plain ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreted import GPU, VARIABLE, interpreting
from optims import with_dmgd

from hope.config import ModelConfig
from hope.optim import fused, kernels
from hope.optim.config import OptimConfig
from hope.optim.rules import Stretch, UpdateRule
from parallel.layout.memory import StepShape
from parallel.layout.report import describe, kernel_facts
from parallel.layout.topology import ParallelDims

MLP = with_dmgd(memory="mlp")
MATCH = with_dmgd(MLP, output="rms_match")


def stretch(dtype: torch.dtype = torch.float32, device: str = "cpu", **others: torch.Tensor) -> Stretch:
    zeros = torch.zeros(4, dtype=dtype, device=device)
    return Stretch(zeros, zeros, None, zeros)._replace(**others)


@pytest.mark.parametrize("config", [OptimConfig(), MLP, MATCH], ids=["linear", "mlp", "rms_match"])
def test_a_cpu_takes_the_plain_way_even_where_kernels_can_be_interpreted(config):
    with interpreting():
        choice = kernels.kernels_for(UpdateRule.of(config), stretch())
    assert choice.kernels == (kernels.update, kernels.sums)
    assert str(choice) == "plain (CPU)"


@pytest.mark.parametrize(
    ("config", "device", "expected"),
    [
        (OptimConfig(), "cuda", "fused"),
        (MLP, "cuda", "fused"),
        (MATCH, "cuda", "plain (rms_match)"),
        (OptimConfig(), "cpu", "plain (CPU)"),
        (MATCH, "cpu", "plain (CPU)"),
    ],
)
def test_the_choice_of_a_run_needs_no_tensor(config, device, expected):
    choice = kernels.kernels_of_run(config, device)
    assert str(choice) == expected
    plain, kernel = (kernels.update, kernels.sums), (fused.update, fused.sums)
    assert choice.kernels == (kernel if expected == "fused" else plain)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    choice = kernels.kernels_of_run(MLP, "cuda")
    assert choice.kernels == (kernels.update, kernels.sums)
    assert str(choice) == "plain (no triton)"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_single_precision_on_a_gpu_takes_the_kernels():
    found = lambda x, config=MLP: str(kernels.kernels_for(UpdateRule.of(config), x))
    single = stretch(device="cuda")
    assert found(single) == str(kernels.kernels_of_run(MLP, "cuda")) == "fused"
    assert kernels.kernels_for(UpdateRule.of(MLP), single).kernels == (fused.update, fused.sums)
    assert found(single, MATCH) == "plain (rms_match)"
    assert found(stretch(torch.float64, "cuda")) == "plain (fp64)"
    assert found(single._replace(g=single.g.bfloat16())) == "plain (bf16)"
    assert found(single._replace(v=single.g.cpu())) == "plain (CPU)"


@pytest.mark.parametrize(("dtype", "reason"), [(torch.float64, "fp64"), (torch.bfloat16, "bf16"), (torch.int8, "int8")])
def test_other_precisions_are_named(dtype, reason):
    assert kernels._against_fused(UpdateRule.of(MLP), "cuda", dtype) == reason


def test_parts_are_joined():
    assert kernel_facts([("hope", "fused"), ("optimizer", "plain (CPU)")]) == "hope: fused  optimizer: plain (CPU)"
    assert kernel_facts([]) == ""


@pytest.mark.parametrize(
    ("optim", "device", "line"),
    [
        (MLP, "cpu", "kernels     hope: plain (CPU)  optimizer: plain (CPU)"),
        (MLP, "cuda", "kernels     hope: fused  optimizer: fused"),
        (
            OptimConfig(name="muon"),
            "cuda",
            "kernels     hope: fused  muon of all but matrices: fused",
        ),
    ],
)
def test_the_table_at_the_start_has_the_line(optim, device, line):
    model = ModelConfig(vocab_size=64, width=128, layers=2, heads=2)
    shape = StepShape(seq_len=64, micro_batch=2, bf16=True)
    assert line in describe(model, ParallelDims(world_size=1), shape, 4, optim, device).splitlines()


def test_a_process_started_from_here_interprets_nothing():
    """It inherits this one's variables, takes the plain way on a CPU and does not even import the kernels."""
    program = """
import os, sys, torch
from hope.optim.config import DmgdConfig, OptimConfig
from hope.optim.dmgd import Dmgd
p = torch.nn.Parameter(torch.ones(4, 4))
p.grad = torch.ones(4, 4)
Dmgd([{"params": [p]}], OptimConfig(dmgd=DmgdConfig(memory="mlp"))).step()
print("moved" if (p < 1).all() else "still", os.environ.get("VARIABLE"), "hope.optim.fused" in sys.modules)
""".replace("VARIABLE", VARIABLE)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["moved", str(os.environ.get(VARIABLE)), "False"], done.stderr


@pytest.mark.parametrize("before", [None, "0"])
def test_the_variable_is_taken_back(before, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(VARIABLE, before)

    def fail() -> None:
        with interpreting():
            assert os.environ[VARIABLE] == "1"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.environ.get(VARIABLE) == before
