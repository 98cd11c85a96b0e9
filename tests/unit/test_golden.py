"""What the models of the first version were: plan, optimizer groups and losses, as they were before mixers had a
protocol and parameters declared themselves. tests/golden/models.json was written by that version."""

import hashlib
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from models import named

from hope.config import CmsConfig, ModelConfig
from hope.memory.config import MemoryConfig
from hope.model import Model, next_token_loss
from hope.optim.build import build_optimizer
from hope.optim.config import OptimConfig
from hope.optim.levels import parameter_groups
from parallel.layout.plan import plan_of

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "models.json").read_text())
CMS = CmsConfig(periods=[1, 2])
zero = partial(MemoryConfig, forget="zero", static="learned", output_gate="silu")  # what their memories were
MODELS = {
    "hope matrix": (
        "hope", {"memory": zero(projection_chunk=4, main_chunk=8, adaptive_query=True), "cms": CMS},
    ),
    "hope matrix shared chunk, momentum": (
        "hope",
        {"memory": zero(projection_chunk=8, main_chunk=8, momentum=0.5, static="identity"), "cms": CMS},
    ),
    "hope mlp, independent": (
        "hope",
        {
            "memory": zero(memory="mlp", projection_chunk=8, main_chunk=8),
            "cms": CmsConfig(variant="independent", periods=[1, 2]),
        },
    ),
    "hope_attention": ("hope_attention", {"cms": CMS}),
    "transformer untied": ("transformer", {"tie_embeddings": False}),
}  # fmt: skip
# In float64 no CPU's order of sums reaches this far. In fp32 four steps of training stay within it.
RTOL = {"float64": 1e-11, "float32": 2e-6}
# Of the weights that the first version drew. A CPU without AVX2 draws some that differ in the last bit of fp32.
DRAWN = {
    "hope matrix": "17a3d16ce8726342",
    "hope matrix shared chunk, momentum": "0bd77b13c54bf1b7",
    "hope mlp, independent": "9f7fe2a15ce6e181",
    "hope_attention": "c10255c527f1cac5",
    "transformer untied": "cf12191036cd3d39",
}


def config(name: str) -> ModelConfig:
    kind, settings = MODELS[name]
    return named(kind, vocab_size=64, width=32, layers=2, heads=2, **settings)


def anywhere(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "blocks.*.", name)


@pytest.mark.parametrize("name", list(GOLDEN))
def test_the_plan(name):
    model = Model(config(name))
    shapes = {n: list(p.shape) for n, p in model.named_parameters()}
    found = {anywhere(n): [shapes[n], layout.dim, layout.rule.value] for n, layout in plan_of(model).items()}
    assert found == GOLDEN[name]["plan"]


@pytest.mark.parametrize("optimizer", ["dmgd", "muon"])
@pytest.mark.parametrize("name", list(GOLDEN))
def test_the_optimizer_groups(name, optimizer):
    found = {
        group["name"]: {
            "period": group["period"],
            "weight_decay": group["weight_decay"],
            "names": list(dict.fromkeys(map(anywhere, group["names"]))),
        }
        for group in parameter_groups(Model(config(name)), 0.1, OptimConfig(name=optimizer))
    }
    assert found == GOLDEN[name]["groups"][optimizer]


def losses(settings: ModelConfig, dtype: torch.dtype, reset: bool) -> list[float]:
    """Four steps of training, with documents that reset or without."""
    model = Model(settings).initialise(7).to(dtype)
    optim = OptimConfig(lr=1e-2, warmup=0)
    optimizer = build_optimizer(parameter_groups(model, 0.1, optim), optim)
    generator, found = torch.Generator().manual_seed(3), []
    for _ in range(4):
        tokens = torch.randint(0, 64, (22, 3), generator=generator)
        starts = None
        if reset:
            starts = torch.rand(21, 3, generator=generator) < 0.2
            starts[0] = True
        loss = next_token_loss(model(tokens[:-1], starts=starts)[0], tokens[1:])
        loss.backward()
        for group in optimizer.param_groups:
            group["grad_scale"] = 1.0
        optimizer.step()
        model.zero_grad()
        found.append(loss.item())
    return found


def drawn(name: str) -> str:
    """Digest of the initial weights."""
    digest = hashlib.sha256()
    for parameter in Model(config(name)).initialise(7).parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("name", list(GOLDEN))
def test_the_initial_weights(name):
    """Bit by bit where torch draws with AVX2 or AVX-512, so on every CPU of the last ten years."""
    assert drawn(name) == DRAWN[name] or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512")


@pytest.mark.parametrize("dtype", list(RTOL))
@pytest.mark.parametrize("documents", ["carry", "reset"])
@pytest.mark.parametrize("name", list(GOLDEN))
def test_the_losses(name, documents, dtype):
    found = losses(config(name), getattr(torch, dtype), documents == "reset")
    known = dtype if drawn(name) == DRAWN[name] else "float32"  # what the weights that it begins with are equal to
    assert found == pytest.approx(GOLDEN[name]["losses"][f"{documents} {dtype}"], rel=RTOL[known])
