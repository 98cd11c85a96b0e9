"""Class-incremental learning: files of labelled texts, the order of classes, prompts, the matrix, and the program."""

import csv
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from evaluated import stored_model, tiny, tokenizer_in
from models import named

from hope.evaluate import __main__ as evaluate
from hope.evaluate.classes import __main__ as program
from hope.evaluate.classes.data import Example, Labelled, read
from hope.evaluate.classes.learner import Learner, Plan, model_of
from hope.evaluate.classes.matrix import summary, table
from hope.evaluate.classes.stream import Prompts, batches, order_of
from hope.evaluate.errors import EvaluationError
from hope.evaluate.probes.base import IGNORE
from hope.model import Model

CPU = torch.device("cpu")
WORDS = {"pet_food": "cat", "floor": "mat", "void": "space", "indent": "tab"}
"""Classes, each with a word that its texts have and no other's."""


def examples_of(count, seed=0):
    """`count` texts of each class: its word among two others."""
    rng = np.random.default_rng(seed)
    fill = lambda: " ".join(rng.choice(["the", "on", "of", "and"], 2).tolist())
    return [Example(f"{fill()} {word} {fill()}", label) for label, word in WORDS.items() for _ in range(count)]


def clinc(path, train, test, **more):
    path.write_text(json.dumps({"train": train, "test": test, **more}))
    return path


def banking(path, examples):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "category"), *examples])
    return path


def test_both_formats_are_read_to_the_same(tmp_path):
    train, test = examples_of(3), examples_of(2, 1)
    oos = {"val": [["a", "b"]], "oos_train": [["x", "oos"]], "oos_test": [["y", "oos"]]}
    one = read(clinc(tmp_path / "data_full.json", train, test, **oos))
    two = read(banking(tmp_path / "train.csv", train), banking(tmp_path / "test.csv", test))
    assert one == two == Labelled(train, test)
    assert one.labels() == ["floor", "indent", "pet_food", "void"]
    few = one.first(2, 1)
    assert few.train == [train[number] for number in (0, 1, 3, 4, 6, 7, 9, 10)]
    assert few.test == test[::2]


def test_csv_fields_may_have_commas_quotes_and_lines(tmp_path):
    """As Banking77's do; U+2028 is no end of a line."""
    odd = [Example('a, "b"\r\nc\nd', "floor"), Example("d\u2028e", "floor")]
    path = banking(tmp_path / "odd.csv", odd)
    assert read(path, path).train == odd


PAIRS = [["a", "x"], ["b", "y"]]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"train": [["a", "x"]],\n "test" [', ":2: not JSON, column 9"),
        ("[]", 'expected an object with "train" and "test", found list'),
        (json.dumps({"train": PAIRS}), 'need "test", a list of [text, class]; there is none'),
        (json.dumps({"train": [], "test": PAIRS}), 'need "train", a list of [text, class]; it is empty'),
        (json.dumps({"train": {}, "test": PAIRS}), "it is no list"),
        (json.dumps({"train": PAIRS, "test": [*PAIRS, ["c"]]}), ": test[2]: need a text and a class, found ['c']"),
        (json.dumps({"train": [*PAIRS, ["c", 3]], "test": PAIRS}), ": train[2]: need a text and a class"),
        (json.dumps({"train": [*PAIRS, [" ", "x"]], "test": PAIRS}), ": train[2]: the text is empty"),
        (json.dumps({"train": [*PAIRS, ["c", "_"]], "test": PAIRS}), ": train[2]: the class is empty"),
        (json.dumps({"train": PAIRS, "test": PAIRS[:1]}), "1 classes have no test examples, such as y"),
        (json.dumps({"train": PAIRS[:1], "test": PAIRS}), "1 classes have no examples to learn from, such as y"),
        (
            json.dumps({"train": [["a", "x_y"], ["b", "x y"]], "test": [["a", "x_y"], ["b", "x y"]]}),
            "classes x y and x_y are one text, 'x y', in a prompt",
        ),
    ],
)
def test_bad_json_is_refused_with_its_place(tmp_path, content, said):
    path = tmp_path / "data_full.json"
    path.write_text(content)
    with pytest.raises(EvaluationError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"text,label\na,x\n", ":1: the header is 'text,label'; need 'text,category'"),
        (b"", ":1: the header is ''"),
        (b"text,category\n", ": no examples after the header"),
        (b'text,category\n"a\nb",x\nc\n', ":4: need a text and a class, found ['c']"),
        (b"text,category\na,x,y\n", ":2: need a text and a class"),
        (b"text,category\n,x\n", ":2: the text is empty"),
        (b'text,category\na,x\n"b,x\n', ":3: unexpected end of data"),
        (b"text,category\n\xff,x\n", ": byte 14 is not UTF-8"),
    ],
)
def test_bad_csv_is_refused_with_its_line(tmp_path, content, said):
    path, good = tmp_path / "train.csv", banking(tmp_path / "test.csv", [("a", "x")])
    path.write_bytes(content)
    for train, test in ((path, good), (good, path)):
        with pytest.raises(EvaluationError) as caught:
            read(train, test)
        assert str(caught.value).startswith(f"{path}{said}")


def test_files_that_do_not_go_together_are_refused(tmp_path):
    table_file, json_file = banking(tmp_path / "a.csv", [("a", "x")]), clinc(tmp_path / "a.json", PAIRS, PAIRS)
    for given, said in (
        ((table_file,), "--test FILE.csv names those to ask"),
        ((json_file, table_file), "has a test set of its own"),
        ((tmp_path / "a.txt",), "expected a .json file as of CLINC150, or a .csv file as of Banking77"),
    ):
        with pytest.raises(EvaluationError, match=said):
            read(*given)
    with pytest.raises(EvaluationError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        read(tmp_path / "none.json")


def test_the_order_is_a_pure_function_of_the_seed():
    labels = [f"c{number:02}" for number in range(11)]
    one = order_of(labels, 4, 1)
    np.random.default_rng().permutation(5)
    assert order_of(labels[::-1], 4, 1) == one
    assert [len(task) for task in one] == [3, 3, 3, 2]
    assert sorted(itertools.chain(*one)) == labels
    assert one != order_of(labels, 4, 2)
    few = order_of(labels, 2, 1, classes=5)
    assert list(itertools.chain(*few)) == list(itertools.chain(*one))[:5]
    for given, said in (((12, 1), "--tasks 12: there are 11 classes"), ((1, 1, 12), "--classes 12: the data has 11")):
        with pytest.raises(EvaluationError, match=said):
            order_of(labels, *given)


def test_a_prompt_is_text_line_feed_class_and_end(tmp_path):
    """What counts, said by its own tokens: the class and the end, in rows and in batches."""
    tokenizer = tokenizer_in(tmp_path)
    prompts = Prompts(tokenizer.encode, tokenizer.eos_id, 64)
    row = prompts.row("the cat", "pet_food")
    assert row.ids.tolist() == [tokenizer.eos_id, *tokenizer.encode("the cat\npet food"), tokenizer.eos_id]
    answer = row.ids[1 + row.first :].tolist()
    assert tokenizer.decode(answer[:-1]).strip() == "pet food"
    assert answer[-1] == tokenizer.eos_id
    short = Prompts(tokenizer.encode, tokenizer.eos_id, len(answer) + 2).row("the cat", "pet_food")
    assert len(short.ids) == len(answer) + 3
    assert short.ids[1 + short.first :].tolist() == answer
    examples = [Example("the cat", "pet_food"), Example("on the mat and the mat", "floor"), Example("tab", "indent")]
    found = list(batches(examples, prompts, 2, 2, [1, 1]))
    assert [tokens.shape[1] for tokens, _ in found] == [2, 1, 2, 1]
    wanted = sorted(tuple(prompts.row(*example).ids[1 + prompts.row(*example).first :]) for example in examples)
    for epoch in (found[:2], found[2:]):
        targets = [column for _, targets_TB in epoch for column in targets_TB.T]
        assert sorted(tuple(column[column != IGNORE].tolist()) for column in targets) == wanted
    again = list(batches(examples, prompts, 2, 2, [1, 1]))
    same = lambda one, two: all(torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True))
    assert same(found, again)
    many = [Example(f"the {word}", "floor") for word in "abcdefghijkl"]
    one, two, other = (list(batches(many, prompts, 12, 2, [seed, 1])) for seed in (1, 1, 2))
    assert same(one, two)
    assert not same(one, other)
    assert not same(one[:1], one[1:])  # every pass has an order of its own


def test_measures_of_three_tasks_by_hand():
    counts = [
        {"right": [8], "items": [10]},
        {"right": [5, 18], "items": [10, 20]},
        {"right": [6, 10, 3], "items": [10, 20, 5]},
    ]
    found = summary(counts, 3)
    assert found["matrix"] == [[0.8], [0.5, 0.9], [0.6, 0.5, 0.6]]
    assert found["seen"] == pytest.approx([0.8, 23 / 30, 19 / 35])
    assert found["average"] == pytest.approx([0.8, 0.7, 1.7 / 3])
    assert found["forgetting"][0] is None
    assert found["forgetting"][1:] == pytest.approx([0.3, (0.2 + 0.4) / 2])
    assert found["backward_transfer"][1:] == pytest.approx([-0.3, -(0.2 + 0.4) / 2])
    better = summary([{"right": [5], "items": [10]}, {"right": [7, 1], "items": [10, 1]}], 2)
    assert (better["forgetting"][1], better["backward_transfer"][1]) == pytest.approx((0.0, 0.2))
    out = table([(1, found), (2, found)], [3, 5, 6])
    assert out.splitlines()[0].split() == ["seed", "after", "classes", "seen", "average", "forgetting",
                                           "backward_transfer", "task", "1", "task", "2", "task", "3"]  # fmt: skip
    assert out.splitlines()[3].split()[:4] == ["1", "3", "6", "0.5429"]
    assert "forgetting after the last task: 0.3000, standard error over 2 seeds 0.0000" in out


def plan(**changes):
    given = {"rate": 1e-2, "batch": 4, "epochs": 10, "learn": (), "periods": None, "batch_tokens": 512}
    return Plan(**{**given, **changes})


def prompts_in(tmp_path):
    tokenizer = tokenizer_in(tmp_path)
    return Prompts(tokenizer.encode, tokenizer.eos_id, 64)


def learner_of(tmp_path, how, kind="hope_attention"):
    config = named(kind, vocab_size=tokenizer_in(tmp_path).vocab_size, width=16, layers=1, heads=2)
    weights = Model(config).initialise(1).state_dict()
    made = Learner(model_of(config, how, 100), weights, how, prompts_in(tmp_path), CPU)
    return made, weights


def test_a_tiny_model_learns_two_tasks_and_forgets_the_first(tmp_path):
    """Of one task nearly all is right; learning the other without it takes it away, both together bring it back."""
    how = plan(periods=(1, 1), epochs=15)
    made, weights = learner_of(tmp_path, how)
    before = {name: value.clone() for name, value in weights.items()}
    data, labels = Labelled(examples_of(12), examples_of(5, 1)), list(WORDS)
    of = lambda side, wanted: [example for example in side if example.label in wanted]
    right = lambda wanted, candidates: made.right(of(data.test, wanted), candidates, lambda done, total: None)
    losses = []
    say = lambda step, loss: losses.append(loss)
    made.learn(of(data.train, labels[:2]), [1, 1], say)
    assert len(losses) == how.steps(24) == 90
    assert losses[-1] < 0.1 < losses[0]
    assert right(labels[:2], labels[:2]) >= 9
    made.learn(of(data.train, labels[2:]), [1, 2], say)
    assert right(labels[2:], labels) >= 9
    assert right(labels[:2], labels) <= 2
    assert right(labels[:2], labels[:2]) > right(labels[:2], labels)  # fewer to choose from
    made.learn(data.train, [1, 3], say)
    assert right(labels, labels) >= 18
    assert all(torch.equal(weights[name], value) for name, value in before.items())  # a copy has learned


def test_right_is_what_the_model_finds_most_probable(tmp_path):
    made, _ = learner_of(tmp_path, plan(periods=(1, 1)))
    tokenizer = tokenizer_in(tmp_path)
    labels, examples, wanted = list(WORDS), examples_of(3), 0
    for example in examples:
        nats = []
        for label in labels:
            ids = [tokenizer.eos_id, *tokenizer.encode(f"{example.text}\n{label.replace('_', ' ')}"), tokenizer.eos_id]
            first = len(tokenizer.encode(f"{example.text}\n"))
            row = torch.tensor(ids)[:, None]
            scores = made.model(row[:-1])[0].log_softmax(-1).gather(2, row[1:, None])
            nats.append(-scores[first:].sum().item())
        wanted += labels[int(np.argmin(nats))] == example.label
    assert made.right(examples, labels, lambda done, total: None) == wanted
    assert 0 < wanted < len(examples)


def test_only_what_is_named_learns_and_on_its_clock(tmp_path):
    made, weights = learner_of(tmp_path, plan(learn=("*.cms.levels.1.*",), periods=(1, 3), epochs=1))
    moved, say = (
        [],
        lambda step, loss: moved.append(
            {name for name, value in made.model.state_dict().items() if not torch.equal(value, weights[name])}
        ),
    )
    made.learn(examples_of(5), [1, 1], say)
    assert len(moved) == 5
    assert moved[:2] == [set(), set()]  # due after three steps
    assert moved[2]
    assert all(".cms.levels.1." in name for name in moved[4])


def test_a_step_is_adams_with_the_gradient_clipped_and_the_last_batch_smaller(tmp_path):
    """Written out (Kingma and Ba, 2015, Algorithm 1), without decay."""
    how = plan(learn=("embedding.*",), periods=(1, 1), batch=3, epochs=1)
    made, weights = learner_of(tmp_path, how)
    examples, steps = examples_of(2), []
    made.learn(examples, [1, 1], lambda step, loss: steps.append(step))
    assert steps == [1, 2, 3]
    assert how.steps(len(examples)) == 3
    other = learner_of(tmp_path, how)[0].model
    weight, first, second = other.embedding.weight, 0.0, 0.0
    for step, batch in enumerate(batches(examples, prompts_in(tmp_path), 3, 1, [1, 1]), 1):
        tokens_TB, targets_TB = batch
        asked = targets_TB != IGNORE
        nats = -other(tokens_TB)[0].log_softmax(-1).gather(2, targets_TB.clamp(min=0)[..., None])[..., 0]
        gradient = torch.autograd.grad(nats[asked].mean(), weight)[0]
        assert gradient.norm() > 1.1  # so that clipping matters
        gradient = gradient / gradient.norm()
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        with torch.no_grad():
            weight -= how.rate * first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
    torch.testing.assert_close(made.model.embedding.weight, weight, rtol=0, atol=2e-5)
    assert not torch.equal(weights["embedding.weight"], weight)


def test_answers_of_a_model_that_diverged_are_refused(tmp_path):
    """Its last step was too large, and no loss has seen it: every class would be as probable as any other."""
    made, _ = learner_of(tmp_path, plan(rate=1e39, periods=(1, 1), epochs=1, batch=64))
    losses = []
    made.learn(examples_of(2), [1, 1], lambda step, loss: losses.append(loss))
    assert len(losses) == 1
    with pytest.raises(EvaluationError, match=r"answers are nan after step 1; a lower --rate than 1e\+39"):
        made.right(examples_of(1), list(WORDS), lambda done, total: None)


def test_clocks_and_patterns_that_do_not_fit_are_refused():
    config = named("hope_attention", vocab_size=32, width=16, layers=1, heads=2)
    assert model_of(config, plan(), 4).periods == [1, 4]
    assert model_of(config, plan(epochs=0), 0).periods == [1, 4]
    assert model_of(config, plan(learn=("*.cms.levels.0.*",)), 3).periods == [1, 4]  # level 1 is frozen
    for how, steps, said in (
        (plan(periods=(1,)), 9, "--periods has 1 numbers, the model 2 levels"),
        (plan(periods=(4, 1)), 9, r"^--periods: \[4, 1\] is not fastest first"),
        (plan(learn=("*.cms.level.*",)), 9, "--learn.*cms.level.* matches no parameter"),
        (plan(), 3, "level 1 has a period of 4 steps, and all tasks together have 3"),
    ):
        with pytest.raises(EvaluationError, match=said):
            model_of(config, how, steps)
    config.cms.unit = "tokens"
    with pytest.raises(EvaluationError, match=r"count tokens.*--periods 1 1 gives them in steps"):
        model_of(config, plan(), 9)


@pytest.fixture
def place(tmp_path):
    """A stored model and data."""
    stored_model(tmp_path)
    clinc(tmp_path / "data.json", examples_of(4), examples_of(2, 1))
    return tmp_path


def run(place, *words):
    given = (place / "run0carry", "--data", place / "data.json", "--tasks", 2, "--epochs", 1, "--batch", 4)
    return program.main([*map(str, (*given, *words)), "--device", "cpu"])


def test_the_command_gives_a_table_and_goes_on_from_its_file(place, monkeypatch, capsys):
    words, drawn, learn = ("--seeds", 1, 2), [], Learner.learn
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", lambda self, *given: (drawn.append(given[1]), learn(self, *given)))
        assert run(place, *words, "--json", place / "whole.json") == 0
    assert drawn == [[1, 1], [1, 2], [2, 1], [2, 2]]  # every seed and task has an order of examples of its own
    out = capsys.readouterr().out
    assert [line.split()[:3] for line in out.splitlines()[1:5]] == [[*"112"], [*"124"], [*"212"], [*"224"]]
    whole = json.loads((place / "whole.json").read_text())
    assert set(whole["sources"]) == {f"seed{seed}{part}" for seed in (1, 2) for part in ("", ".task1", ".task2")}
    for seed in (1, 2):
        tasks = order_of(list(WORDS), 2, seed)
        entries = [whole["sources"][f"seed{seed}.task{number}"] for number in (1, 2)]
        assert [entry["identity"]["classes"] for entry in entries] == tasks
        assert [entry["result"]["items"] for entry in entries] == [[4], [4, 4]]
        found = whole["sources"][f"seed{seed}"]["result"]
        assert found == summary([entry["result"] for entry in entries], 2)
        assert f"{found['seen'][1]:.4f}" in out
    assert "standard error over 2 seeds" in out
    plain, asked, ends = Learner.right, [], [1, 3]

    def interrupted(self, *given):
        if ends and len(asked) == ends[0]:
            ends.pop(0)
            raise KeyboardInterrupt
        asked.append(given[1])
        return plain(self, *given)

    monkeypatch.setattr(Learner, "right", interrupted)
    codes = [run(place, *words, "--json", place / "part.json") for _ in range(3)]
    assert codes == [130, 130, 0]
    assert "the same command goes on from here" in capsys.readouterr().err
    assert json.loads((place / "part.json").read_text()) == whole
    assert len(asked) == 6  # three of each seed: what was asked after a finished task is not asked again
    asked.clear()
    monkeypatch.setattr(Learner, "learn", lambda self, *given: pytest.fail("learned what is on record"))
    assert run(place, *words, "--json", place / "part.json") == 0
    assert asked == []
    assert capsys.readouterr().out == out


def test_without_epochs_the_model_answers_as_it_is(place):
    assert run(place, "--epochs", 0, "--json", place / "out.json") == 0
    found = json.loads((place / "out.json").read_text())["sources"]["seed1.task2"]["result"]
    tokenizer = tokenizer_in(place / "data")
    model = tiny("transformer", 0, tokenizer.vocab_size).float()
    how = plan(epochs=0)
    prompts = Prompts(tokenizer.encode, tokenizer.eos_id, 32)
    made = Learner(model.config, model.state_dict(), how, prompts, CPU)
    tasks = order_of(list(WORDS), 2, 1)
    labels = [*tasks[0], *tasks[1]]
    of = lambda task: [example for example in examples_of(2, 1) if example.label in task]
    assert found["right"] == [made.right(of(task), labels, lambda done, total: None) for task in tasks]


def test_the_command_refuses_without_a_traceback(place, capsys):
    out = ("--json", place / "out.json")
    assert run(place, *out) == 0
    for words, said in (
        (("--tasks", 5), "--tasks 5: there are 4 classes; --tasks 4 is the most"),
        (("--rate", 0), "--rate 0.0 is not a positive number"),
        (("--seeds", 1, 1), "--seeds has 1 twice"),
        (("--learn", "*"), "leave --learn out"),
        (("--learn", "nothing"), "nothing matches no parameter"),
        (("--data", place / "none.json"), "none.json: cannot be read"),
        ((*out, "--rate", 0.5), "out.json was made with rate 0.0001, now 0.5"),
        ((*out, "--tested", 1), "out.json was made with tested None, now 1"),
        (("--rate", 1e39), "the loss is nan after step 1; a lower --rate than 1e+39"),
    ):
        capsys.readouterr()
        assert run(place, *words) == 2
        assert said in capsys.readouterr().err
    (place / "data/tokenizer.model").unlink()
    assert run(place) == 2
    assert "--tokenizer FILE names it" in capsys.readouterr().err


def test_a_clock_has_to_be_due_in_the_shortest_stream(place, capsys):
    """One class of one example, or one of nine, as the seed draws."""
    examples = [Example(f"the {word}", label) for label, word in list(WORDS.items())[:2]]
    clinc(place / "uneven.json", [examples[0], *[examples[1]] * 9], examples)
    steps = {seed: 9 if order_of(["floor", "pet_food"], 1, seed, 1) == [["floor"]] else 1 for seed in range(9)}
    assert set(steps.values()) == {1, 9}
    words = ("--data", place / "uneven.json", "--tasks", 1, "--classes", 1, "--batch", 1, "--periods", 9, "--seeds")
    assert run(place, *words, *[seed for seed, count in steps.items() if count == 9]) == 0
    assert run(place, *words, *steps) == 2
    assert "a period of 9 steps, and all tasks together have 1" in capsys.readouterr().err


def test_classes_is_a_word_in_the_place_of_a_model(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate"])
    monkeypatch.delitem(sys.modules, program.__name__)
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["classes", "--help"])
    assert caught.value.code == 0
    assert "python -m hope.evaluate classes MODEL --data FILE" in capsys.readouterr().out
