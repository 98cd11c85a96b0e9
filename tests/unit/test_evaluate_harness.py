"""lm-evaluation-harness is answered with our own scores, to the last digit."""

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluated import TEXT, stored_model, tiny, tokenizer_in

from hope.evaluate import __main__ as ours
from hope.evaluate.harness import __main__ as program
from hope.evaluate.harness.answers import Answers
from hope.evaluate.record import Record
from hope.evaluate.rows import Alone
from hope.evaluate.run import Engine, evaluate_task
from hope.evaluate.scorer import ModelScorer
from hope.evaluate.tasks import read_task
from hope.generate.greedy import greedy
from hope.generate.loop import on_one_device

ITEMS = [
    {"query": f"the cat {n} sat", "choices": [" on the mat.", " and more" * (n % 4 + 1), " 猫"], "gold": n % 3}
    for n in range(12)
]


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.fixture
def asked(tmp_path):
    tokenizer = tokenizer_in(tmp_path)
    engine = Engine(ModelScorer(tiny("hope", 0, 300), dtype=torch.float64), Alone(), 96)
    return tokenizer, engine


def test_pairs_have_the_scores_of_our_own_tasks(asked):
    tokenizer, engine = asked
    task = read_task([json.dumps(item).encode() for item in ITEMS], "f")
    source = Record(None, {}, {}).open("", {}, None)
    evaluate_task(engine, task, source, tokenizer.encode, eos_id=tokenizer.eos_id, window=16)
    answers = Answers(engine, tokenizer.encode, tokenizer.eos_id, 16)
    found = answers.loglikelihood(requests(*(pair for item in task.items for pair in item.pairs)))
    assert found == [(-source.values[n][0], bool(source.values[n][1])) for n in range(36)]
    assert len(set(found)) > 30  # a window of 16 makes some of them the same


def test_texts_are_whole_and_each_its_own(asked):
    """Against one forward pass per text, or per window of it."""
    tokenizer, engine = asked
    texts = [TEXT[:80], "", "x", TEXT[7:200]]

    def nats(ids, size):
        total, row = 0.0, torch.tensor([tokenizer.eos_id, *ids])
        for begin in range(0, len(ids), size):
            window = row[begin : begin + size + 1]
            scores = engine.scorer.model(window[:-1, None])[0][:, 0].detach().log_softmax(-1)
            total -= scores.gather(1, window[1:, None]).sum().item()
        return total

    for window, size in ((None, 10**6), (16, 16)):
        answers = Answers(engine, tokenizer.encode, tokenizer.eos_id, window)
        found = answers.loglikelihood_rolling(requests(*((text,) for text in texts)))
        wanted = [-nats(tokenizer.encode(text), size) for text in texts]
        assert np.abs(np.array(found) - wanted).max() < 1e-9


def test_generated_text_is_the_most_probable_one(asked):
    """Against one forward pass of the whole text for every token."""
    tokenizer, engine = asked
    model = engine.scorer.model
    forward = on_one_device(model)
    generate = greedy(
        forward, tokenizer.encode, tokenizer.decode, tokenizer.eos_id, vocabulary=300, device=torch.device("cpu")
    )
    answers = Answers(engine, tokenizer.encode, tokenizer.eos_id, 16, generate)

    def plain(prompt, count):
        ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
        before = len(ids)
        with torch.no_grad():
            for _ in range(count):
                ids.append(int(model(torch.tensor(ids)[:, None])[0][-1, 0].argmax()))
        chosen = ids[before:]
        return tokenizer.decode(chosen[: chosen.index(tokenizer.eos_id)] if tokenizer.eos_id in chosen else chosen)

    wanted = [plain("the cat", 12), plain("", 5)]
    assert len(wanted[0]) > 3
    options = [("the cat", {"max_gen_toks": 12}), ("", {"max_gen_toks": 5})]
    assert answers.generate_until(requests(*options)) == wanted
    stop = wanted[0][2:4]
    [cut] = answers.generate_until(requests(("the cat", {"until": [stop], "max_gen_toks": 12})))
    assert cut == wanted[0][: wanted[0].index(stop)]


def test_generation_is_handed_on_or_refused(asked):
    tokenizer, engine = asked
    wanted = requests(("a", {"until": "\n"}), ("b", {"until": ["x", "y"], "max_gen_toks": 5}))
    with pytest.raises(NotImplementedError, match="tasks that generate text need a generator"):
        Answers(engine, tokenizer.encode, 1, 16).generate_until(wanted)
    answers = Answers(engine, tokenizer.encode, 1, 16, lambda *given: repr(given))
    assert answers.generate_until(wanted) == ["('a', ['\\n'], 256)", "('b', ['x', 'y'], 5)"]


def test_without_the_package_the_command_says_what_brings_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert program.main([str(tmp_path), "--tasks", "x"]) == 2
    assert "pip install -e '.[harness]'" in capsys.readouterr().err


TASK = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_bytes}]
"""


ROLLING = """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


def test_the_harness_itself_counts_as_we_do(tmp_path, monkeypatch, capsys):
    """Its accuracies, and the log-probabilities that it kept of every choice, are ours. So are bytes and words."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run, file = stored_model(tmp_path), tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/t.yaml").write_text(TASK.replace("NAME", "cats").replace("FILE", str(file)))
    texts = tmp_path / "d.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT, " a  b\n", TEXT[5:90])))
    (tmp_path / "tasks/r.yaml").write_text(ROLLING.replace("FILE", str(texts)))
    shared = ["--device", "cpu", "--batch-tokens", "96", "--json"]
    theirs = ["--tasks", "cats,texts", "--include", str(tmp_path / "tasks"), "--samples"]
    assert program.main([str(run), *theirs, *shared, str(tmp_path / "theirs.json")]) == 0, capsys.readouterr().err
    assert (
        ours.main([str(run), "--task", f"cats={file}", "--text", str(texts), *shared, str(tmp_path / "ours.json")]) == 0
    )
    report = json.loads((tmp_path / "theirs.json").read_text())
    sources = json.loads((tmp_path / "ours.json").read_text())["sources"]
    entry, text = sources["cats"], sources["d"]["result"]
    rolled = report["results"]["texts"]
    assert rolled["bits_per_byte,none"] == pytest.approx(text["bits_per_byte"]["value"], rel=1e-13)
    assert rolled["word_perplexity,none"] == pytest.approx(text["perplexity_per_word"]["value"], rel=1e-11)
    result = report["results"]["cats"]
    assert result["acc,none"] == entry["result"]["accuracy"]["value"]
    assert result["acc_stderr,none"] == pytest.approx(entry["result"]["accuracy"]["error"], rel=1e-12)
    assert result["acc_bytes,none"] == entry["result"]["accuracy_per_byte"]["value"]
    samples = sorted(report["samples"]["cats"], key=lambda sample: sample["doc_id"])
    kept = [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]
    assert kept == [-entry["rows"][str(n)][0] for n in range(36)]
