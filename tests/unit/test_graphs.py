"""`train.cuda_graphs`: a pass that a graph repeats is the pass, to the last bit. Without a GPU: when what is recorded.

A stand-in for a recording runs the pass itself at every replay.
"""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from models import named
from multirank import run_ranks
from tiny import config_file

import pretrain_hope
from configs.errors import ConfigError
from configs.schema import load
from hope.batch import Batch
from hope.config import CmsConfig, ModelConfig
from hope.mixers.titans_attention import LayerConfig
from hope.model import Model
from hope.optim.config import OptimConfig
from hope.train.diagnostics import MixerProbe
from parallel.compute import graphs, replica
from parallel.compute.graphs import Graphs
from parallel.compute.recording import Recorder
from parallel.compute.replica import build_replica
from parallel.layout.topology import ParallelConfig
from parallel.referee import parity
from parallel.start import groups

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
MODEL = named("hope", vocab_size=64, width=64, layers=2, heads=2, cms=CmsConfig(periods=[1, 2]))


class Repeated:
    """In the place of a recording: the pass, made anew."""

    log: ClassVar[list[str]] = []

    def __init__(self, key, batch, recorder, pool, one_pass):
        self.key, self.one_pass = key, one_pass
        self.log.append("record")

    def replay(self, batch):
        self.log.append("replay")
        return self.one_pass(batch)


@pytest.fixture
def passes(monkeypatch):
    """(graphs of a small model, its step): what a step did, and its losses."""
    Repeated.log.clear()
    monkeypatch.setattr(graphs, "_Graph", Repeated)
    for name in ("synchronize", "empty_cache", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: Repeated.log.append(name))
    model = Model(MODEL).initialise(1)

    def step_fn(model, hidden, batch):
        loss = model(batch.tokens_TB)[0].float().logsumexp(-1).mean()
        return loss, {"loss": loss}

    made = Graphs(step_fn, Recorder(torch.device("cpu")))

    def as_it_is(own: bool) -> list:
        assert own
        Repeated.log.append("as it is")
        return []

    def step(count: int = 2, length: int = 8, watched: bool = False, **extra) -> list[str]:
        Repeated.log.clear()
        for block in model.blocks.values():
            block.mixer.watched = watched
        ids = torch.arange(length * count * 2).view(count, length, 2) % 64
        batches = [Batch(row, row, **extra) for row in ids]
        reports = made.run([model], batches, lambda given: as_it_is(given is step_fn))
        assert len(reports) == (0 if "as it is" in Repeated.log else count)
        return list(Repeated.log)

    return model, step


def test_a_step_is_made_as_it_is_once_and_recorded_then(passes):
    _, step = passes
    ready = ["synchronize", "empty_cache", "graph_pool_handle", "record"]
    assert step() == ["as it is"]
    assert step() == [*ready, "replay", "replay"]
    assert step() == ["replay", "replay"]
    # a watched step is another recording, in the same memory; before a pass as it is all memory is given back
    assert step(watched=True) == ["synchronize", "empty_cache", "as it is"]
    assert step(watched=True) == [*ready, "replay", "replay"]
    assert step() == ["record", "replay", "replay"]
    assert step(watched=True) == ["replay", "replay"]
    # so is one with other shapes, or another number of micro-batches, by which its loss is divided
    for other in ({"length": 4}, {"count": 3}):
        assert step(**other)[-1] == "as it is"
        assert step(**other)[:4] == ready
    assert step()[:4] == ready


def test_marks_of_documents_are_never_recorded(passes):
    _, step = passes
    marks = {"starts_TB": torch.zeros(8, 2, dtype=torch.bool)}
    assert [step(**marks) for _ in range(3)] == [["as it is"]] * 3


def test_gradients_are_the_mean_over_micro_batches(passes):
    model, step = passes
    step()
    model.zero_grad()
    step()
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    step()
    for name, parameter in model.named_parameters():  # two micro-batches of half the weight each, and once more
        torch.testing.assert_close(parameter.grad, 2 * once[name])
    ids = torch.arange(32).view(2, 8, 2) % 64
    model.zero_grad()
    torch.stack([model(row)[0].float().logsumexp(-1).mean() for row in ids]).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, once[name])


def test_a_memory_within_a_layer_is_not_what_is_watched():
    """The layer tells it in a forward pass, which a replay is not: steps after a watched one would be another kind."""
    sections = {"titans_mal": LayerConfig(chunk=4, window=4)}
    model = Model(ModelConfig(pattern=["titans_mal"], mixers=sections, vocab_size=64, width=32, layers=1, heads=2))
    probe, tokens = MixerProbe([model]), torch.zeros(8, 2, dtype=torch.long)
    for on in (True, False):
        probe.arm(on)
        assert model.watched == on
        model.initialise(1)(tokens)
    assert "memory_norm.0" in probe.scalars()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["train.precision=fp32"], "train.precision fp32 leaves gradients where no graph can add to them"),
        (["train.precision=bf16", "data.documents=reset"], "shapes depend on where documents begin"),
    ],
)
def test_what_cannot_be_recorded_is_refused(tmp_path, flags, said):
    with pytest.raises(ConfigError) as error:
        load(config_file(tmp_path, "attention"), ["train.cuda_graphs=true", *flags])
    [what] = [what for path, what, _ in error.value.problems if path == "train.cuda_graphs"]
    assert said in what


@pytest.mark.parametrize("flags", [[], ["parallel.pipeline=2"], ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]])
def test_what_can_be_recorded_is_not(tmp_path, flags):
    flags = ["train.cuda_graphs=true", "train.precision=bf16", *flags]
    assert load(config_file(tmp_path, "attention"), flags).train.cuda_graphs


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_machine_without_a_gpu_says_so(tmp_path: Path, capfd):
    words = [config_file(tmp_path, "attention"), "run.name=none", "train.precision=bf16", "train.cuda_graphs=true"]
    for more in ([], ["--dry-run"]):
        assert run_ranks(pretrain_hope.main, 1, [*words, *more], timeout=120) == [2]
        said = "config error: train.cuda_graphs=true needs a GPU, and this runs on the CPU; train.cuda_graphs=false"
        assert said in capfd.readouterr().err
    assert pretrain_hope.main([*words, "--dry-run", "--devices", "1"]) == 0


def closed(main, *words: str) -> list[bool]:
    """Whether the groups were there at every close of a replica, in a program that ends as it should."""
    found, close = [], replica.Replica.close

    def noted(one):
        found.append(dist.is_initialized())
        close(one)

    replica.Replica.close = noted
    assert main(list(words)) == 0
    assert not dist.is_initialized()
    return found


@pytest.mark.parametrize("main", [pretrain_hope.main, parity.main], ids=["train", "parity"])
def test_graphs_are_gone_before_the_groups_that_they_use(tmp_path: Path, main):
    """NCCL destroys no communicator that a graph has recorded: the program would never end."""
    assert run_ranks(closed, 1, main, config_file(tmp_path, "attention"), timeout=120) == [[True]]


SHARED = ParallelConfig(tensor=2, sequence=True)
"""Collectives are in the passes."""


def trained(name: str, layout: ParallelConfig, recompute: str, cuda_graphs: bool) -> dict:
    """Six steps of two micro-batches, the fourth of them watched: losses, what mixers report, and weights."""
    torch.use_deterministic_algorithms(True)
    losses = []
    with groups.start(layout, timeout_s=60) as ranks:
        built = build_replica(
            MODEL, OptimConfig(name=name), layout, ranks, seq_len=128, precision="bf16", seed=1,
            recompute=recompute, cuda_graphs=cuda_graphs,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        for step in range(6):
            for block in built.models[0].blocks.values():
                block.mixer.watched = step == 3
            ids = torch.randint(0, 64, (2, 128, 2), generator=generator).to(ranks.device)
            reports = built.run([Batch(row, row.roll(-1, 0)) for row in ids])
            built.reduce()
            losses.append([report["loss"].item() for report in reports])
            losses.append(list(built.optimizer.grad_norms().values()))
            built.optimizer.set_lr(1e-2)
            built.optimizer.step()
        norms = [block.mixer.report().scalars["memory_norm"].item() for block in built.models[0].blocks.values()]
        weights = [p.double().sum().item() for p in built.models[0].parameters()]
        built.close()
    return {"losses": losses, "norms": norms, "weights": weights}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("name", "layout", "recompute"),
    [
        ("dmgd", ParallelConfig(), "none"),
        ("muon", ParallelConfig(), "none"),
        ("dmgd", ParallelConfig(), "mlp"),
        pytest.param("dmgd", SHARED, "none", marks=TWO_GPUS),
        pytest.param("muon", SHARED, "mlp", marks=TWO_GPUS),
    ],
)
def test_a_graph_repeats_the_pass_to_the_last_bit(name, layout, recompute, monkeypatch):
    """The processes also end, which those with collectives in graphs do only if the graphs go first."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    eager, recorded = (run_ranks(trained, layout.tensor, name, layout, recompute, graphs, timeout=110)
                       for graphs in (False, True))  # fmt: skip
    assert len({loss for losses in eager[0]["losses"][::2] for loss in losses}) == 12
    assert recorded == eager


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_steps_that_are_compared_on_a_gpu_are_steps_and_the_same_with_mlps_computed_again():
    """Also where the MLPs that are computed again have collectives."""
    plain, again = (run_ranks(trained, 2, "dmgd", SHARED, what, False, timeout=110) for what in ("none", "mlp"))
    assert len({loss for losses in plain[0]["losses"][::2] for loss in losses}) == 12
    assert again == plain
