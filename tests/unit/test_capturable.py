"""What a CUDA graph cannot hold: tensors made of numbers of the host, which are copied, and questions to the device.

Both wait for the device. A pass that does so cannot be recorded (`train.cuda_graphs`), and elsewhere it makes the GPU
wait. On a CPU such operations are seen as torch dispatches them. Kernels are not run here, but their plain forms are.
"""

import importlib
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from configs.schema import load
from hope.model import Model, next_token_loss

ROOT = Path(__file__).parents[2]
LENGTH = 66
"""A whole chunk of 64, and one that is cut short."""
MADE_OR_ASKED = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
TINY = ["model.width=64", "model.heads=2", "model.layers=2", "model.vocab_size=64", "model.cms.hidden=16"]


class NothingOfTheHost(TorchDispatchMode):
    """Refuses operations that copy from the host, or wait for an answer."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        places = args[1] if name.startswith("index") and isinstance(args[1], list) else ()
        by_mask = any(place is not None and place.dtype == torch.bool for place in places)
        if name in MADE_OR_ASKED or by_mask:
            raise AssertionError(f"{name} cannot be recorded")
        return func(*args, **(kwargs or {}))


def models() -> dict[str, list[str]]:
    """Every preset, and the models of the plans that no preset is: name -> words."""
    found = {path.stem: [str(path)] for path in sorted((ROOT / "configs/models").glob("*.yaml"))}
    for name in ("recipe_ablation", "recipe_in_context"):
        plan = yaml.safe_load((ROOT / f"benchmarks/{name}.yaml").read_text())
        own = {
            model: words for model, words in plan["models"].items() if "hybrid" not in model and model != "transformer"
        }
        found |= {f"{name}-{model}": words for model, words in own.items()}
    return found


@pytest.mark.parametrize("name", models())
def test_a_pass_asks_the_device_nothing_and_copies_nothing_from_the_host(name, monkeypatch):
    """Forward, backward and what mixers report."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    words = [*importlib.import_module("recipe").flat(models()[name]), *TINY]
    config = load(str(ROOT / "configs/hope_17m_1xh200.yaml"), words, check=False)
    model = Model(config.model).initialise(1)
    for block in model.blocks.values():
        for mixer in block.mixing().values():
            mixer.watched = True
    tokens = torch.arange(2 * LENGTH).view(LENGTH, 2) % 64
    with NothingOfTheHost():
        outputs, _ = model.trunk(tokens, keep_state=False)
        next_token_loss(model.vocabulary.logits(outputs), tokens).backward()
    assert all(p.grad is not None for p in model.embedding.parameters())


@pytest.mark.parametrize(
    "work",
    [
        lambda x: torch.as_tensor(0.9, device=x.device) * x,
        lambda x: x.new_tensor(1.0) + x,
        lambda x: x[:, [0, 1]],
        lambda x: x[x > 0],
        lambda x: float(x.sum()),
        lambda x: torch.full_like(x, 2.0) if x.any() else x,
    ],
)
def test_the_test_sees_what_it_looks_for(work):
    with NothingOfTheHost(), pytest.raises(AssertionError, match="cannot be recorded"):
        work(torch.ones(2, 3))
