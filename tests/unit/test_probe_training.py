"""A small model is trained on a probe, and its accuracy is measured against the bytes of its state."""

import json

import pytest
import torch
from evaluated import TEXT, stored_model
from models import named

from hope.evaluate.probes import __main__ as program
from hope.evaluate.probes.base import IGNORE
from hope.evaluate.probes.flat import flatten
from hope.evaluate.probes.options import best_of
from hope.evaluate.probes.passes import Passes, asked, one_pass
from hope.evaluate.probes.recall import Mqar, SelectiveCopy
from hope.evaluate.probes.state import Word
from hope.evaluate.probes.train import Plan, accuracy, adamw, batch_of, batches, train, training_batch
from hope.model import Model, next_token_loss
from hope.optim.build import build_optimizer
from hope.optim.config import OptimConfig
from hope.optim.levels import parameter_groups

CPU = torch.device("cpu")
SMALL = ("configs/quickstart.yaml", "configs/models/transformer.yaml", "model.width=16", "model.heads=2")


def test_a_probe_that_can_be_learnt_is_learnt():
    """One token among noise: from chance to nearly all right. With AdamW of our optimizer code."""
    probe = SelectiveCopy(length=6, copied=1, vocab_size=6)
    config = named("transformer", vocab_size=6, width=16, layers=1, heads=2)
    optim = adamw(OptimConfig(), 1e-2, 0.0, 120)
    before = train(config, optim, Plan([(probe, 500)], 0, 32, 1), CPU)
    after = train(config, optim, Plan([(probe, 500)], 120, 32, 1), CPU)
    assert accuracy(before, probe, 1, 200, 64, CPU)["accuracy"]["value"] < 0.5
    found = accuracy(after, probe, 1, 200, 64, CPU)
    assert found["accuracy"]["value"] > 0.95
    assert found["state_bytes"] == 2 * 6 * 16 * 4  # keys and values of 6 tokens


def test_accuracy_counts_what_is_asked():
    """A model that always says 0: of parities the share of zeros, of whole examples those that are all zeros."""

    class Zero(torch.nn.Module):
        def forward(self, tokens_TB):
            return torch.nn.functional.one_hot(torch.zeros_like(tokens_TB), 2).float(), {}

    probe = Word(3, "Z2")
    found = accuracy(Zero(), probe, 1, 300, 64, CPU)
    _, targets_TB = batch_of([probe.example(1 + 2**32, index) for index in range(300)])
    assert found["accuracy"]["value"] == pytest.approx((targets_TB == 0).double().mean().item())
    assert found["whole"]["value"] == pytest.approx((targets_TB == 0).all(0).double().mean().item())
    assert 0 < found["whole"]["value"] < found["accuracy"]["value"]


def test_sizes_are_taken_by_their_shares_and_examples_from_their_number():
    plan = Plan([(Word(3, "S3"), 30), (Word(5, "S3"), 10)], 100, 4, 1)
    drawn = [training_batch(plan, step) for step in range(1, 401)]
    short = [batch for batch in drawn if len(batch[0].tokens) == 3]
    assert 250 < len(short) < 350
    known = {Word(3, "S3").example(1, index).tokens.tobytes() for index in range(30)}
    assert {example.tokens.tobytes() for batch in short for example in batch} == known


def test_batches_come_in_order_however_many_processes_make_them():
    plan = Plan([(Word(3, "S3"), 30), (Word(5, "S3"), 10)], 7, 4, 1)
    alone, shared = list(batches(plan, 0)), list(batches(plan, 2))
    assert len(alone) == len(shared) == 7
    for step, (mine, theirs) in enumerate(zip(alone, shared, strict=True), 1):
        made = batch_of(training_batch(plan, step))
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(mine, theirs, made, strict=True))


def test_the_loss_is_that_of_the_places_that_are_asked():
    """Loss and gradients of scoring all places, where those that are not asked weigh nothing; in float64."""
    tokens_TB, targets_TB = batch_of([Mqar(32, 4, 64).example(1, index) for index in range(3)])
    model = Model(named("hope", vocab_size=64, width=16, layers=2, heads=2)).initialise(1).double()
    loss = one_pass(model, asked(tokens_TB, targets_TB, CPU))
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    counts = (targets_TB != IGNORE).double()
    whole = next_token_loss(model(tokens_TB)[0], targets_TB.clamp(min=0), counts * counts.numel() / counts.sum())
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-13)


def test_flat_groups_train_as_their_parameters_do():
    """AdamW on HOPE with a slow level, and with weight decay for matrices alone: the same weights to the bit."""
    optim, ends = OptimConfig(name="adamw", lr=1e-2, weight_decay=0.1), []
    for of in (list, flatten):
        model = Model(named("hope", vocab_size=64, width=16, layers=2, heads=2)).initialise(1)
        groups = of(parameter_groups(model, 0.1, optim))
        assert len(groups) > 3
        optimizer = build_optimizer(groups, optim)
        for step in range(1, 6):
            one_pass(model, asked(*batch_of(training_batch(Plan([(Mqar(32, 4, 64), 9)], 5, 3, 1), step)), CPU))
            optimizer.step()
            optimizer.zero_grad(set_to_none=of is list)
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    start = Model(named("hope", vocab_size=64, width=16, layers=2, heads=2)).initialise(1)
    for name, p in start.named_parameters():
        assert torch.equal(ends[0][name], ends[1][name]), name
        assert not torch.equal(ends[0][name], p), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mixer", ["transformer", "hope"])
def test_recorded_passes_are_the_passes(mixer):
    """Sizes come in turn: loss and gradients of every batch are what a pass as it is gives, bit for bit."""
    device = torch.device("cuda")
    config = named(mixer, vocab_size=64, width=128, layers=2, heads=2)
    plan = Plan([(Mqar(64, 4, 64), 100), (Mqar(64, 8, 64), 100), (Mqar(128, 8, 64), 100)], 12, 4, 1)
    model = Model(config).initialise(1).to(device)
    wholes = [group["params"][0] for group in flatten(parameter_groups(model, 0.1))]
    passes, sizes = Passes(model, device), set()
    for step in range(1, 13):
        batch = asked(*batch_of(training_batch(plan, step)), device)
        sizes.add(batch.size)
        loss = passes(batch).clone()
        found = [whole.grad.clone() for whole in wholes]
        torch._foreach_zero_([whole.grad for whole in wholes])
        assert torch.equal(one_pass(model, batch), loss)
        assert all(g.any() and torch.equal(whole.grad, g) for whole, g in zip(wholes, found, strict=True))
        torch._foreach_zero_([whole.grad for whole in wholes])
    assert len(sizes) == 3


def run(*words):
    return program.main([*map(str, words), "--device", "cpu"])


def test_the_command_trains_a_grid_and_goes_on_from_its_file(tmp_path, monkeypatch, capsys):
    words = ("s3", *SMALL, "--steps", 2, "--batch", 4, "--tested", 6, "--test-sizes", 1, "--seeds", 1, 2)
    words = (*words, "--json", tmp_path / "out.json", "--rates")
    assert run(*words, 1e-3) == 0
    whole = json.loads((tmp_path / "out.json").read_text())
    assert set(whole["sources"]) == {"rate0.001.seed1", "rate0.001.seed2"}
    out = capsys.readouterr().out
    assert "T128" in out
    assert f"{2 * 128 * 16 * 4:,}" in out
    trained = []
    plain = program.train
    monkeypatch.setattr(program, "train", lambda *given: trained.append(given[2].seed) or plain(*given))
    assert run(*words, 1e-3, 1e-2) == 0
    assert trained == [1, 2]  # the other rate alone
    assert "the best of 2; 2 seeds" in capsys.readouterr().out
    assert run(*words, 1e-3, "--steps", 3) == 2
    assert "was made with steps 2, now 3" in capsys.readouterr().err


def test_the_best_rate_is_that_of_the_mean_over_seeds_and_tests():
    cell = lambda value: {"accuracy": {"value": value}}
    runs = [(1e-3, {"a": cell(0.9), "b": cell(0.1)}), (1e-2, {"a": cell(0.6), "b": cell(0.6)}),
            (1e-3, {"a": cell(1.0), "b": cell(0.0)}), (1e-2, {"a": cell(0.3), "b": cell(0.6)})]  # fmt: skip
    assert best_of(runs) == 1e-2


def test_needles_and_facts_ask_a_trained_model(tmp_path, capsys):
    (tmp_path / "hay.txt").write_text(TEXT)
    words = (stored_model(tmp_path), "--haystack", tmp_path / "hay.txt", "--tested", 2, "--lengths", 800)
    assert run("needle", *words, "--kinds", "single_1", "multikey", "--json", tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())["sources"]
    assert {name: entry["result"]["items"] for name, entry in found.items()} == {"single_1.T800": 2, "multikey.T800": 2}
    assert run("facts", *words) == 0
    assert "facts.T800  chance" in re_spaced(capsys.readouterr().out)
    for bad, said in (
        (("needle", stored_model(tmp_path)), "--haystack FILE names it"),
        (("facts", *words, "--lengths", 5), "a length of"),
        (("needle", tmp_path, "--haystack", tmp_path / "hay.txt"), "is no run"),
        (("needle", words[0], "--haystack", tmp_path / "none.txt"), "none.txt: no such file"),
        (("mqar", "none.yaml"), "none.yaml"),
        (("mqar", *SMALL, "model.heads=3"), "heads"),
    ):
        assert run(*bad) == 2, bad
        assert said in capsys.readouterr().err


def re_spaced(text):
    return "  ".join(text.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rates", "nan"], "--rates nan is not a positive number; 1e-3 works"),
        (["--rates", "1e-3", "inf"], "--rates inf is not a positive number"),
    ],
)
def test_numbers_that_cannot_work_are_refused(capsys, words, said):
    assert run("s3", *SMALL, *words) == 2
    assert said in capsys.readouterr().err
