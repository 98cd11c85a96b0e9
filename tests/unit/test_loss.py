"""The loss in blocks is the plain one, value and gradients, for every remainder; and it never holds all scores."""

import json
from pathlib import Path

import pytest
import torch
from models import named
from multirank import run_ranks
from tiny import config_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain_hope
from hope.loss import LARGEST, Unscored, block_of, blockwise_loss
from hope.model import Embedding, Model, next_token_loss
from hope.optim.config import OptimConfig
from hope.train.config import TrainConfig
from parallel.compute.tensor import shard_model, sharded_loss
from parallel.layout.memory import StepShape, part_activations, rank_memory
from parallel.layout.topology import ParallelConfig
from parallel.start import groups

LENGTH, BATCH, WIDTH, ROWS = 7, 3, 8, 11


def drawn(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Hidden, weights of the head, targets, and what places count, some nothing."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    counts = draw(LENGTH, BATCH).abs() * (torch.rand(LENGTH, BATCH, generator=generator) < 0.6)
    targets = torch.randint(0, ROWS, (LENGTH, BATCH), generator=generator)
    assert (counts == 0).any()
    return (3 * draw(LENGTH, BATCH, WIDTH)).to(dtype), draw(ROWS, WIDTH).to(dtype), targets, counts.to(dtype)


def results(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(0.3 * loss, leaves)]


@pytest.mark.parametrize("counted", [False, True], ids=["all count 1", "weights"])
@pytest.mark.parametrize("block", [1, 2, 5, 20, 21, 22])
def test_blocks_are_the_plain_form_in_float64(block, counted):
    hidden, weight, targets, counts = drawn()
    hidden.requires_grad_(), weight.requires_grad_()
    weights = counts if counted else None
    plain = results(next_token_loss(F.linear(hidden, weight), targets, weights), hidden, weight)
    blocks = results(blockwise_loss(Unscored(hidden, weight, 0, block), targets, weights), hidden, weight)
    for ours, theirs in zip(blocks, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


def test_bf16_is_as_near_to_float64_as_the_plain_form():
    """Scores are rounded to bf16 in both; sums and the softmax are fp32."""
    exact = drawn()
    exact[0].requires_grad_(), exact[1].requires_grad_()
    wanted = results(next_token_loss(F.linear(exact[0], exact[1]), exact[2]), *exact[:2])
    hidden, weight, targets, _ = drawn(torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    plain = results(next_token_loss(F.linear(hidden, weight), targets), hidden, weight)
    blocks = results(blockwise_loss(Unscored(hidden, weight, 0, 4), targets), hidden, weight)
    assert [t.dtype for t in blocks] == [t.dtype for t in plain] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for ours, theirs, true in zip(blocks, plain, wanted, strict=True):
        distance = lambda t, true=true: ((t.double() - true).norm() / true.norm()).item()
        assert distance(ours) < 1.5 * distance(theirs) + 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_the_embedding_has_both_of_its_uses(tied):
    config = named("transformer", vocab_size=64, width=32, layers=1, heads=2, tie_embeddings=tied)
    ids = torch.randint(0, 64, (18, 2), generator=torch.Generator().manual_seed(0))

    def gradients(chunk: int) -> dict[str, torch.Tensor]:
        model = Model(config).initialise(3).double()
        scores = model.vocabulary.scores(model.trunk(ids[:-1])[0], chunk)
        assert isinstance(scores, Unscored) == (chunk > 0)
        sharded_loss(scores, ids[1:], 1).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain = gradients(0)
    assert ("head.weight" in plain) == (not tied)
    for name, gradient in gradients(5).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-11, atol=1e-14, msg=name)


def test_without_gradients_none_are_made():
    hidden, weight, targets, counts = drawn()
    with torch.no_grad():
        loss = blockwise_loss(Unscored(hidden, weight, 0, 4), targets, counts)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(next_token_loss(F.linear(hidden, weight), targets, counts).item(), rel=1e-13)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = found if isinstance(found, tuple | list) else [found]
        self.size = max([self.size, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return found


def test_all_scores_are_never_there():
    hidden, weight, targets = torch.randn(64, 2, 4, requires_grad=True), torch.randn(50, 4), torch.zeros(64, 2).long()
    with Largest() as blocks:
        blockwise_loss(Unscored(hidden, weight, 0, 16), targets).backward()
    assert blocks.size == 16 * 50
    with Largest() as plain:
        next_token_loss(F.linear(hidden, weight), targets).backward()
    assert plain.size == 64 * 2 * 50


def test_small_models_keep_the_plain_form():
    assert block_of(21 * 3, 64, None) == 0
    assert block_of(LARGEST // 8192, 8192, None) == 0
    assert block_of(4 * 4096, 32000, None) == 4096
    assert LARGEST >= 4096 * 32000
    assert block_of(2**20, 10**6, None) == 256  # one block too many scores is better than no end of blocks
    assert (block_of(21, 64, 5), block_of(2**30, 64, 0)) == (5, 0)


def test_a_negative_chunk_is_refused_by_name():
    sizes = {"steps": 1, "seq_len": 16, "global_batch": 1, "micro_batch": 1}
    assert [p.path for p in TrainConfig(**sizes, loss_chunk=-1).problems()] == ["train.loss_chunk"]


def vocabulary_loss(chunk: int, sequence: bool) -> list[float]:
    """Worst relative error of the loss and of the gradients of hidden and of the whole embedding, in float64."""
    torch.set_num_threads(1)
    with groups.start(ParallelConfig(tensor=2, sequence=sequence)) as ranks:
        config = named("transformer", vocab_size=64, width=32, layers=1, heads=2)
        head = shard_model(Embedding(config), ranks.tp_rank, 2, sequence)
        generator = torch.Generator().manual_seed(4)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        hidden, table = draw(6, 3, 32), draw(64, 32)
        targets, counts = torch.randint(0, 64, (6, 3), generator=generator), draw(6, 3).abs()
        head.weight = torch.nn.Parameter(table.chunk(2)[ranks.tp_rank].clone())
        mine = hidden.chunk(2)[ranks.tp_rank] if sequence else hidden
        mine = mine.clone().requires_grad_()
        loss = sharded_loss(head.scores(mine, chunk), targets, 2, counts)
        ours = results(loss, mine, head.weight)
        hidden.requires_grad_(), table.requires_grad_()
        wanted = results(next_token_loss(F.linear(hidden, table), targets, counts), hidden, table)
        wanted[2] = wanted[2].chunk(2)[ranks.tp_rank]
        wanted[1] = wanted[1].chunk(2)[ranks.tp_rank] if sequence else wanted[1]
        return [((a - b).norm() / b.norm()).item() for a, b in zip(ours, wanted, strict=True)]


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "tp+sp"])
def test_a_divided_vocabulary_is_the_whole_one(sequence):
    for found in run_ranks(vocabulary_loss, 2, 5, sequence):
        assert max(found) < 1e-13


def test_predicted_memory_follows_the_blocks():
    """One block of scores instead of all of them; what is saved is the gradient of hidden and of the head."""
    config = named("transformer", vocab_size=4096, width=32, layers=2, heads=2)
    whole, blocks = (StepShape(256, 4, True, loss_chunk=chunk) for chunk in (0, 64))
    parts = [Model(config).part]
    before, after = (rank_memory(config, parts, 1, shape, OptimConfig()) for shape in (whole, blocks))
    assert before.loss == 4 * 256 * 4 * 4096
    assert after.loss == 64 * 4096 * 6 + 4096 * 32 * 4
    saved = 256 * 4 * 32 * 2 + 4096 * 32 * 2
    scores = 256 * 4 * 4096 * 4  # log-softmax in fp32
    head = part_activations(config, parts[0], whole) - part_activations(config, parts[0], blocks)
    assert head == pytest.approx(scores - saved, rel=0.02)


def run(path: str, name: str, chunk: int) -> int:
    torch.set_num_threads(1)
    flags = [f"run.name={name}", f"train.loss_chunk={chunk}", "train.steps=3", "parallel.pipeline=2"]
    return pretrain_hope.main([path, *flags])


def test_a_run_over_stages_has_the_same_losses_in_training_and_evaluation(tmp_path: Path):
    path, found = config_file(tmp_path, "attention"), {}
    for name, chunk in (("blocks", 5), ("whole", 0)):
        assert run_ranks(run, 2, path, name, chunk, timeout=120) == [0, 0]
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        keys = ("loss", "grad_norm", "heldout_loss")
        found[name] = [record.get(key) or 0.0 for record in map(json.loads, lines) for key in keys]
    assert found["blocks"] == pytest.approx(found["whole"], rel=1e-6)
    assert found["blocks"] != found["whole"]  # it was the other form
    assert len(found["whole"]) == 12
