"""A new run from the weights of a trained model: the same held-out loss, in any layout; what differs needs a word."""

import dataclasses
import json

import pytest
import torch
from models import named
from multirank import run_ranks
from stored import store
from tiny import config_file

import pretrain_hope
from hope.config import CmsConfig, ModelConfig
from hope.initial import differences, open_start
from hope.memory.config import MemoryConfig
from hope.mixers.attention import AttentionConfig
from hope.model import Model
from hope.stored import manifest
from hope.stored.folders import finished
from parallel.checkpoint.export import export

TRUNK = {"vocab_size": 32, "width": 16, "layers": 2, "heads": 2}
IDS = torch.arange(24).view(12, 2) % 32


def run(path: str, *overrides: str) -> int:
    torch.set_num_threads(1)
    return pretrain_hope.main([path, *overrides])


def lines(folder, name, file):
    return [json.loads(line) for line in (folder / "runs" / name / f"{file}.jsonl").read_text().splitlines()]


def test_a_run_begins_with_the_held_out_loss_of_its_origin_in_another_layout_too(tmp_path):
    path = config_file(tmp_path)
    assert run_ranks(run, 1, path, "train.steps=3", timeout=120) == [0]
    source = tmp_path / "runs/tiny"
    trained = lines(tmp_path, "tiny", "metrics")[-1]["heldout_loss"]
    export(finished(source / "checkpoints")[0], tmp_path / "weights")
    new = [
        "optim.name=adamw",
        "optim.lr=1e-3",
        "data.seed=7",
        "run.seed=5",
        "model.cms.periods=[1, 5]",
        "train.steps=4",
    ]
    tensor = ["parallel.tensor=2", "parallel.sequence=true"]
    assert run_ranks(
        run, 1, path, "run.name=one", f"model.init={tmp_path / 'weights'}", *new, "train.stop_after=1"
    ) == [0]
    two = [path, "run.name=two", *tensor, *new]
    assert run_ranks(run, 2, *two, f"model.init={source}", "train.stop_after=1", timeout=120) == [0, 0]
    for name in ("one", "two"):
        first, *_, last = lines(tmp_path, name, "metrics")
        assert (first["step"], first["tokens"]) == (0, 0)
        assert first["heldout_loss"] == pytest.approx(trained, abs=1e-6)
        assert last["heldout_loss"] != pytest.approx(trained, abs=1e-4)
    said = [event for event in lines(tmp_path, "two", "events") if event["event"] == "INIT"]
    newest = str(finished(source / "checkpoints")[0])
    assert [(event["path"], event["trained_steps"]) for event in said] == [(newest, 3)]
    # resumed from its own checkpoint: model.init is not read, the origin stays known
    assert run_ranks(run, 2, *two, "model.init=nowhere", timeout=120) == [0, 0]
    extra = manifest.read(finished(tmp_path / "runs/two/checkpoints")[0]).extra
    assert extra["origin"] == {"path": newest, "trained_steps": 3}
    assert [event["event"] for event in lines(tmp_path, "two", "events")].count("INIT") == 1


def test_a_run_with_more_levels_begins_with_the_held_out_loss_of_its_origin(tmp_path):
    """The origin's levels behind and before a new one, its scalars moved by training, on one rank and on two."""
    path = config_file(tmp_path)
    cms = ["model.cms.variant=independent", "model.cms.hidden=16"]
    assert run_ranks(run, 1, path, *cms, "train.steps=6", timeout=120) == [0]
    trained = lines(tmp_path, "tiny", "metrics")[-1]["heldout_loss"]
    new = [*cms, "model.cms.periods=[1, 3, 6]", f"model.init={tmp_path / 'runs/tiny'}", "train.stop_after=1"]
    places = lambda name, levels: [f"run.name={name}", f"model.init_levels={levels}"]
    assert run_ranks(run, 1, path, *new, *places("one", [1, 2]), timeout=120) == [0]
    tensor = ["parallel.tensor=2", "parallel.sequence=true"]
    assert run_ranks(run, 2, path, *new, *places("two", [0, 2]), *tensor, timeout=120) == [0, 0]
    for name in ("one", "two"):
        assert lines(tmp_path, name, "metrics")[0]["heldout_loss"] == pytest.approx(trained, abs=1e-6)
    assert run(path, *new, *places("three", [2, 1]), "--dry-run") == 2


def test_what_cannot_start_from_it_ends_with_2_on_all_ranks_and_in_a_dry_run(tmp_path, capfd):
    path = config_file(tmp_path)
    store(tmp_path / "runs/old", Model(named(**{**TRUNK, "vocab_size": 64, "layers": 3})).initialise(1), 5)
    for more, said in (
        ([f"model.init={tmp_path / 'nothing'}"], ["model.init   ", "no such folder"]),
        ([f"model.init={tmp_path / 'runs/old'}"], ["model.layers ", "2, and model.init has 3", "model.layers=3"]),
    ):
        assert run(path, "run.name=new", "--dry-run", *more) == 2
        found = capfd.readouterr().err
        assert all(part in found for part in said), found
    assert set(run_ranks(run, 2, path, "run.name=new", *more, timeout=120)) == {2}
    found = capfd.readouterr().err
    assert all(part in found for part in said), found
    assert found.count("config error") == 1
    assert not (tmp_path / "runs/new/metrics.jsonl").exists()
    assert run(path, "model.init=x", "model.init_allow=[everything]", "--dry-run") == 2
    assert "some of [vocab, tokenizer, settings, mixers]" in capfd.readouterr().err
    assert run(path, "model.init_allow=[vocab]", "--dry-run") == 2
    assert "is not used: model.init is null" in capfd.readouterr().err


def attention(**changes):
    return ModelConfig(**{**TRUNK, "pattern": ["attention"], **changes})


CASES = {
    "fewer rows": (attention(vocab_size=16), "model.vocab_size", "ids from 16 on would have no row"),
    "more rows": (attention(vocab_size=40), "model.vocab_size", "init_allow=[vocab]"),
    "width": (attention(width=32), "model.width", "model.width=16"),
    "head": (attention(tie_embeddings=False), "model.tie_embeddings", "model.tie_embeddings=true"),
    "fewer layers": (attention(layers=1), "model.layers", "model.layers=2"),
    "mixer": (attention(pattern=["hope", "attention"]), "model.pattern", "init_allow=[mixers] to draw them"),
    "heads": (attention(heads=4), "model.pattern", "attention of 4 heads, and model.init has attention of 2 heads"),
    "base": (
        attention(mixers={"attention": AttentionConfig(rope_base=500.0)}),
        "model.mixers.attention.rope_base",
        "rope_base=10000.0; or model.init_allow=[settings]",
    ),
    "hidden": (attention(cms=CmsConfig(hidden=48)), "model.cms", "model.cms.hidden=16 and 2 periods or more"),
    "fewer levels": (attention(cms=CmsConfig(periods=[1], hidden=16)), "model.cms", "2 periods or more"),
    "variant": (attention(cms=CmsConfig(variant="independent")), "model.cms", "variant=sequential"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_would_compute_something_else_is_refused_with_what_would_work(case):
    target, where, said = CASES[case]
    [problem] = differences(attention(), target)
    assert problem.path == where
    assert said in f"{problem.what}; {problem.fix}"


def started(tmp_path, source: ModelConfig, target: ModelConfig, trained: Model | None = None) -> tuple[Model, Model]:
    store(tmp_path / "source", trained or Model(source).initialise(1), 5)
    target.init = str(tmp_path / "source")
    start, problems = open_start(target, {})
    assert start is not None
    assert problems == []
    model = Model(target).initialise(2)
    start.fill(model)
    json.dumps(start.record())
    return start.found.model, model


ONE, TWO = CmsConfig(periods=[1], hidden=48), CmsConfig(periods=[1, 4], hidden=48)
BESIDE = dataclasses.replace(TWO, variant="independent")
FAST = [{"chunk": 4, "heads": 2}]
PLACED = {
    "divided": (ONE, CmsConfig("independent", [1, 4], hidden=24), None),
    "first of three": (ONE, CmsConfig(periods=[1, 2, 8], hidden=48), None),
    "second of three": (ONE, CmsConfig(periods=[1, 2, 8], hidden=48), [1]),
    "last of two beside": (ONE, BESIDE, [1]),
    "first of two beside": (ONE, BESIDE, None),
    "two apart": (TWO, CmsConfig(periods=[1, 2, 8, 16], hidden=48), [1, 3]),
    "two of three beside": (BESIDE, CmsConfig("independent", [1, 2, 8], hidden=48), [0, 2]),
    "behind one in context": (TWO, CmsConfig(periods=[1, 2, 8], hidden=48, in_context=FAST), [0, 2]),
    "beside one in context": (BESIDE, CmsConfig("independent", [1, 2, 8], hidden=48, in_context=FAST), [0, 2]),
    "one kept in context": (
        CmsConfig("independent", [1, 4], hidden=48, in_context=FAST),
        CmsConfig("independent", [1, 2, 8], hidden=48, in_context=FAST),
        [1, 2],
    ),
}


@pytest.mark.parametrize("case", PLACED)
def test_levels_start_from_pretrained_mlps_without_changing_the_function(tmp_path, case):
    """The scalars of levels side by side are not 1, so that one in the wrong place changes the sum."""
    old, new, places = PLACED[case]
    trained = Model(attention(cms=old)).initialise(1)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.endswith("cms.aggregate"):
                parameter.copy_(torch.arange(1, 1 + len(parameter)) / 2)
    source, model = started(tmp_path, attention(cms=old), attention(cms=new, init_levels=places), trained)
    torch.testing.assert_close(model.double()(IDS)[0], source.double()(IDS)[0], rtol=0, atol=1e-12)
    model(IDS)[0].logsumexp(-1).sum().backward()  # and every level learns
    chain = model.blocks["0"].cms
    assert all(level.mlp.down.weight.grad.norm() > 0 for level in chain.levels)
    assert all(level.mlp.output.weight.grad.norm() > 0 for level in chain.fast())
    for number, level in enumerate(chain.levels):  # the origin's are where they were asked for
        known = case == "divided" or number in (range(len(old.periods)) if places is None else places)
        assert bool(level.mlp.down.weight.any()) == known


NOWHERE = {
    "too few": (TWO, CmsConfig(periods=[1, 2, 8], hidden=48), [1], "does not place the 2 levels"),
    "another order": (TWO, CmsConfig(periods=[1, 2, 8], hidden=48), [2, 1], "such as [1, 2]; or null"),
    "twice": (TWO, CmsConfig(periods=[1, 2, 8], hidden=48), [1, 1], "2 of the numbers 0 to 2"),
    "outside": (ONE, TWO, [2], "1 of the numbers 0 to 1, such as [1]"),
    "below": (ONE, TWO, [-1], "1 of the numbers 0 to 1"),
    "none": (ONE, TWO, [], "[] does not place the 1 levels"),
    "divided": (ONE, CmsConfig("independent", [1, 4], hidden=24), [0], "is divided over all 2 levels; leave it out"),
}


@pytest.mark.parametrize("case", NOWHERE)
def test_places_that_levels_do_not_have_are_refused(case):
    old, new, places, said = NOWHERE[case]
    [problem] = differences(attention(cms=old), attention(cms=new, init_levels=places))
    assert problem.path == "model.init_levels"
    assert said in f"{problem.what}; {problem.fix}"


def test_a_chain_with_levels_in_context_does_not_become_a_sum():
    """One MLP alone is a chain of either kind, and one behind a level in context is not."""
    old = CmsConfig(periods=[1], hidden=48, in_context=FAST)
    for hidden in (48, 24):
        [problem] = differences(
            attention(cms=old), attention(cms=CmsConfig("independent", [1, 4], hidden=hidden, in_context=FAST))
        )
        assert (problem.path, "independent with K" in problem.fix) == ("model.cms", False)


def test_one_level_with_a_scalar_is_not_divided():
    """Its parts would each need the scalar, and new levels get 1."""
    old, new = CmsConfig("independent", [1], hidden=48), CmsConfig("independent", [1, 4], hidden=24)
    [problem] = differences(attention(cms=old), attention(cms=new))
    assert problem.path == "model.cms"


def test_a_width_that_cannot_be_divided_is_not_offered_to_be():
    wide = lambda hidden: attention(cms=CmsConfig(periods=[1], hidden=hidden))
    for hidden, divided in ((48, "hidden=48/K, K of [2, 3, 4, 6, 8]"), (47, "")):
        [problem] = differences(wide(hidden), wide(64))
        assert divided in problem.fix
        assert ("with K periods" in problem.fix) == bool(divided)


def test_new_rows_mixers_and_settings_need_their_word_and_leave_the_rest(tmp_path):
    rows = attention(vocab_size=40, init_allow=["vocab"])
    source, model = started(tmp_path / "a", attention(), rows)
    torch.testing.assert_close(model(IDS)[0][..., :32], source(IDS)[0])
    torch.testing.assert_close(model.embedding.weight[32:], Model(rows).initialise(2).embedding.weight[32:])
    hybrid = attention(pattern=["hope", "attention"], init_allow=["mixers"])
    source, model = started(tmp_path / "b", attention(), hybrid)
    old, new, drawn = (dict(m.named_parameters()) for m in (source, model, Model(hybrid).initialise(2)))
    assert new.keys() - old.keys() == {name for name in new if name.startswith("blocks.0.mixer.") and name not in old}
    for name, value in new.items():
        assert torch.equal(value, (drawn if name.startswith("blocks.0.mixer.") else old)[name]), name
    chunk = named(memory=MemoryConfig(main_chunk=8, projection_chunk=4), **TRUNK)
    chunk.init_allow = ["settings"]
    source, model = started(tmp_path / "c", named(**TRUNK), chunk)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), model.parameters(), strict=True))


def test_data_of_another_tokenizer_is_refused(tmp_path):
    for name in ("old", "new"):
        (tmp_path / f"{name}.manifest.json").write_text(json.dumps({"sha256_tokenizer": name * 8}))
    data = {name: {"train": str(tmp_path / name)} for name in ("old", "new")}
    store(tmp_path / "source", Model(attention()).initialise(1), 5, {"data": data["old"]})
    config = attention(init=str(tmp_path / "source"))
    assert open_start(config, data["old"])[1] == []
    [problem] = open_start(config, data["new"])[1]
    assert problem.path == "model.init"
    assert "oldoldoldold..., that of the data newnewnewnew..." in problem.what
    assert open_start(dataclasses.replace(config, init_allow=["tokenizer"]), data["new"])[1] == []
