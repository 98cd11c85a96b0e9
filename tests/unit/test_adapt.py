"""Levels that learn from what is read: against a loop by hand, causality, what is frozen, and state that goes on."""

import argparse
import copy
import itertools

import pytest
import torch
from models import named
from torch.nn import functional as F

from hope.adapt.learner import Learned, Learner, detached
from hope.adapt.settings import EVERY as EVERY_DEFAULT
from hope.adapt.settings import RATE, AdaptError, Settings, settings_of
from hope.config import CmsConfig
from hope.evaluate.scorer import ModelScorer
from hope.evaluate.stream import score_and_learn
from hope.memory.config import MemoryConfig
from hope.model import Model

VOCAB, EVERY = 48, 8


def made(memory: str = "matrix", variant: str = "sequential", in_context: int = 0) -> Model:
    """float64, two blocks, CMS levels with periods 1 and 2. memory: of the mixer hope, or attention for that mixer;
    in_context: chunk of a level in context."""
    kinds = {
        "kind": "hope_attention" if memory == "attention" else "hope",
        "memory": None if memory == "attention" else MemoryConfig(memory=memory, projection_chunk=4, main_chunk=4),
    }
    cms = CmsConfig(periods=[1, 2], variant=variant, in_context=[{"chunk": in_context}] if in_context else [])
    model = Model(named(**kinds, vocab_size=VOCAB, width=16, layers=2, heads=2, cms=cms)).initialise(0)
    with torch.no_grad():
        model.embedding.weight.mul_(5)
    return model.double()


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def read(ids, settings, model=None):
    """(nats, model, learner) of ids that are scored and learned from."""
    model = model or made()
    learner = Learner(model, settings)
    nats, _ = score_and_learn(ModelScorer(model, dtype=torch.float64), learner, ids)
    return nats, model, learner


def by_hand(model, ids, levels, rate):
    """Windows one after the other with Adam written out (Kingma and Ba, 2015, Algorithm 1), a level's gradient being
    the mean over its period."""
    period = {0: 1, 1: 2}
    of_level = {
        level: [p for n, p in model.named_parameters() if f".cms.levels.{level}." in n] for level in levels
    }  # fmt: skip
    total = {p: torch.zeros_like(p) for ps in of_level.values() for p in ps}
    first, second = ({p: torch.zeros_like(p) for p in total} for _ in range(2))
    state, found = None, []
    for window in range((len(ids) - 1) // EVERY):
        piece = ids[window * EVERY : (window + 1) * EVERY + 1, None]
        logits, state = model(piece[:-1], state)
        nats = F.cross_entropy(logits[:, 0], piece[1:, 0], reduction="none")
        found.append(nats.detach())
        gradients = torch.autograd.grad(nats.mean(), list(total))
        state = detached(state)
        with torch.no_grad():
            for p, g in zip(total, gradients, strict=True):
                total[p] += g
            for level, ps in of_level.items():
                if (window + 1) % period[level]:
                    continue
                t = (window + 1) // period[level]
                for p in ps:
                    g = total[p] / period[level]
                    first[p] = 0.9 * first[p] + 0.1 * g
                    second[p] = 0.95 * second[p] + 0.05 * g**2
                    p -= rate * (first[p] / (1 - 0.9**t)) / ((second[p] / (1 - 0.95**t)).sqrt() + 1e-8)
                    total[p] = torch.zeros_like(p)
    return torch.cat(found)


@pytest.mark.parametrize("levels", [(0, 1), (1,)])
@pytest.mark.parametrize("memory", ["matrix", "mlp"])
def test_three_windows_are_those_of_a_loop_by_hand(levels, memory):
    ids, rate = tokens(3 * EVERY + 1), 0.02
    nats, model, learner = read(ids, Settings(levels, rate, EVERY), made(memory))
    theirs = made(memory)
    start = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    expected = by_hand(theirs, ids, levels, rate)
    torch.testing.assert_close(nats, expected, rtol=1e-11, atol=1e-11)
    moved = 0
    for (name, p), q in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-9, atol=1e-11, msg=name)
        moved += not torch.equal(p, start[name])
    assert moved == 2 * 4 * len(levels)  # norm and three maps of every level
    assert learner.updates == {f"level{level}": (3, 1)[level] for level in levels}


KINDS = [{}, {"memory": "mlp"}, {"memory": "attention"}, {"in_context": 4}, {"in_context": 4, "variant": "independent"}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rate_0_goes_through_all_of_it_and_changes_no_bit(kind):
    ids = tokens(4 * EVERY + 3)
    nats, model, learner = read(ids, Settings((0, 1), 0.0, EVERY), made(**kind))
    plain, state = [], None
    scorer = ModelScorer(made(**kind), dtype=torch.float64)
    for begin in range(0, len(ids) - 1, EVERY):
        piece = ids[begin : begin + EVERY + 1, None]
        scores = scorer(piece[:-1], piece[1:], state, True)
        plain.append(scores.nats_TB[:, 0])
        state = scores.state
    assert torch.equal(nats, torch.cat(plain))
    assert learner.updates == {"level0": 4, "level1": 2}
    assert all(map(torch.equal, model.parameters(), made(**kind).parameters()))
    assert not torch.equal(read(ids, Settings((0, 1), 0.05, EVERY), made(**kind))[0], nats)


def test_no_score_depends_on_its_token_or_a_later_one():
    ids, settings = tokens(4 * EVERY + 1), Settings((0, 1), 0.05, EVERY)
    nats, _, _ = read(ids, settings)
    for changed in range(2, len(ids), 3):  # token number `changed` is target number `changed` - 1
        other = ids.clone()
        other[changed:] = (other[changed:] + 1) % VOCAB
        found, _, _ = read(other, settings)
        assert torch.equal(found[: changed - 1], nats[: changed - 1]), changed
        assert not torch.equal(found[changed - 1 :], nats[changed - 1 :])


def test_what_is_learned_in_one_window_changes_the_next():
    """So that causality above is not that of weights that never move."""
    ids = tokens(2 * EVERY + 1)
    still, learning = (read(ids, Settings((0,), rate, EVERY))[0] for rate in (0.0, 0.05))
    assert torch.equal(still[:EVERY], learning[:EVERY])
    assert not (still[EVERY:] == learning[EVERY:]).any()


@pytest.mark.parametrize("variant", ["sequential", "independent"])
def test_frozen_weights_stay_to_the_bit_and_all_come_back(variant):
    model, start = made(variant=variant), made(variant=variant)
    storage = {name: p.data for name, p in model.named_parameters()}
    _, _, learner = read(tokens(4 * EVERY + 1), Settings((1,), 0.05, EVERY), model)
    learned = {n for n, p in model.named_parameters() if p.requires_grad}
    for (name, p), old in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(p, old) == (name not in learned), name
        assert torch.equal(storage[name], old)  # which may be a checkpoint's file
    assert {".cms.levels.1." in name for name in learned} == {True}
    assert learner.parameters == sum(p.numel() for n, p in start.named_parameters() if n in learned)
    learner.restore()
    assert all(map(torch.equal, model.parameters(), start.parameters()))


def test_what_was_learned_goes_on_elsewhere_to_the_bit():
    """Put aside in the middle of a window and of a period."""
    ids, settings, cut = tokens(6 * EVERY + 4), Settings((0, 1), 0.05, EVERY), 3 * EVERY + 5
    parts = (ids[: cut + 1], ids[cut:])
    _, model, learner = read(parts[0], settings)
    assert (learner.gathered, learner.updates) == (5, {"level0": 3, "level1": 1})
    kept = copy.deepcopy(learner.learned())
    nats, _ = score_and_learn(ModelScorer(model, dtype=torch.float64), learner, parts[1])
    other = made()
    again = Learner(other, settings)
    again.load(kept)
    found, _ = score_and_learn(ModelScorer(other, dtype=torch.float64), again, parts[1])
    assert torch.equal(found, nats)
    assert again.learned().record == learner.learned().record
    theirs = learner.learned().tensors
    assert {n for n, t in again.learned().tensors.items() if torch.equal(t, theirs[n])} == set(theirs)
    kinds = {name.rsplit("/", 1)[0] for name in theirs}
    assert kinds == {"weight", "state/memory", "state/square", "state/accumulator", "gradient"}


@pytest.mark.parametrize("other", [Settings((0,), 0.05, 8), Settings((0, 1), 0.01, 8), Settings((0, 1), 0.05, 4)])
def test_other_settings_are_refused_by_name(other):
    _, _, learner = read(tokens(9), Settings((0, 1), 0.05, EVERY))
    with pytest.raises(AdaptError, match=r"written with --adapt level0,level1 --adapt-rate 0\.05 --adapt-every 8") as e:
        Learner(made(), other).load(learner.learned())
    assert str(other) in str(e.value)


def test_what_is_missing_or_of_another_shape_is_no_learner():
    _, _, learner = read(tokens(EVERY + 4), Settings((1,), 0.05, EVERY))
    kept = learner.learned()
    name = next(name for name in kept.tensors if name.startswith("gradient/"))
    for tensors in ({n: t for n, t in kept.tensors.items() if n != name}, kept.tensors | {name: torch.zeros(2)}):
        with pytest.raises((KeyError, ValueError), match="gradient/"):
            Learner(made(), learner.settings).load(Learned(tensors, kept.record))


def test_a_record_of_more_tokens_than_a_window_waits_for_is_no_learner():
    _, _, learner = read(tokens(EVERY + 4), Settings((1,), 0.05, EVERY))
    kept = learner.learned()
    for gathered in (-1, EVERY):
        with pytest.raises(ValueError, match=f"{gathered} tokens gathered of a window of 8"):
            Learner(made(), learner.settings).load(Learned(kept.tensors, kept.record | {"gathered": gathered}))


def test_the_order_in_which_levels_are_named_is_none():
    args = argparse.Namespace(adapt="level1,level0,level1", adapt_rate=None, adapt_every=None)
    assert settings_of(args, made().config, None) == Settings((0, 1), RATE, EVERY_DEFAULT)
    args.adapt = "levels"
    assert settings_of(args, made().config, None).levels == (0, 1)


def test_weights_of_few_bits_and_losses_without_bounds_are_refused():
    with pytest.raises(AdaptError, match="bfloat16 weights; give --dtype float32"):
        Learner(made().bfloat16(), Settings((0,), 0.1, EVERY))
    with pytest.raises(AdaptError, match=r"the loss is (nan|inf) after updates: 1 of level0; give a lower rate"):
        read(tokens(2 * EVERY + 1), Settings((0,), 1e300, EVERY))
    learner = Learner(made(), Settings((0,), 0.1, EVERY))
    with pytest.raises(ValueError, match="9 tokens in a window that has room for 8"):
        learner.learn(torch.zeros((), requires_grad=True), 9)


def test_pieces_of_a_window_make_one_gradient():
    """Every token of a window counts the same, wherever an end of a prompt cuts it."""
    ids, found = tokens(EVERY + 1)[:, None], []
    for cuts in ((0, EVERY), (0, 3, EVERY)):
        scorer = ModelScorer(made(), dtype=torch.float64)
        learner = Learner(scorer.model, Settings((0, 1), 0.05, EVERY))
        for begin, end in itertools.pairwise(cuts):
            nats = scorer.scores(ids[:-1], ids[1:], None, False).nats_TB
            learner.learn(nats[begin:end].sum(), end - begin)
        found.append(learner.learned())
    one, two = found
    assert one.record == two.record
    assert any("state/memory/" in name and tensor.any() for name, tensor in one.tensors.items())
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-9, atol=1e-11, msg=name)
