"""`python -m hope.evaluate`: results, resuming to the same file, and refusals without a traceback."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluated import TEXT, stored_model, tiny, tokenizer_in
from tiny import write_documents

from data_prep.manifest import TokenSetManifest
from hope.evaluate import __main__ as program
from hope.evaluate import record
from hope.evaluate.scorer import ModelScorer
from parallel.start import launcher

TASK = [{"query": "the", "choices": [" cat", " mat", " spaces"], "gold": number % 3} for number in range(9)]


@pytest.fixture
def place(tmp_path):
    """A stored model, a text and a task."""
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(item) + "\n" for item in TASK))
    stored_model(tmp_path)
    return tmp_path


def run(place, *words, model="run0carry"):
    return program.main([str(place / model), "--device", "cpu", *map(str, words)])


def test_texts_and_tasks_give_a_table_and_a_file(place, capsys):
    words = ("--text", place / "a.txt", "--task", f"three={place / 't.jsonl'}", "--json", place / "out.json")
    assert run(place, *words, "--dtype", "float64") == 0
    out, err = capsys.readouterr()
    found = json.loads((place / "out.json").read_text())
    text, task = (found["sources"][name]["result"] for name in ("a", "three"))
    assert (found["step"], found["identity"]["dtype"], found["trained_on_windows_of"]) == (7, "float64", 32)
    assert (text["bytes"], task["items"]) == (len(TEXT.encode()), 9)
    assert f"{text['bits_per_byte']['value']:.4f}" in out
    assert f"{task['accuracy']['value']:.4f}" in out
    assert "three: 27 of 27" in err
    # the first window, by hand
    tokenizer = tokenizer_in(place / "data")
    row = torch.tensor([tokenizer.eos_id, *tokenizer.encode(TEXT)[:32]])
    model = tiny("transformer", 0, tokenizer.vocab_size).float().double()
    nats = -model(row[:-1, None])[0][:, 0].log_softmax(-1).gather(1, row[1:, None]).sum().item()
    assert run(place, "--text", place / "a.txt", "--limit", 1, "--json", place / "one.json", "--dtype", "float64") == 0
    first = json.loads((place / "one.json").read_text())["sources"]["a"]["result"]
    assert (first["nats"], first["tokens"]) == (pytest.approx(nats, abs=1e-9), 32)


def test_an_interrupted_command_goes_on_to_the_same_file(place, monkeypatch, capsys):
    words = ("--text", place / "a.txt", "--task", place / "t.jsonl", "--batch-tokens", 64)
    assert run(place, *words, "--json", place / "whole.json") == 0
    calls, ends = [], [3, 9]
    plain = ModelScorer.__call__

    def counted(self, *args):
        calls.append(1)
        if ends and len(calls) > ends[0]:
            raise KeyboardInterrupt
        return plain(self, *args)

    monkeypatch.setattr(ModelScorer, "__call__", counted)
    monkeypatch.setattr(record, "EVERY_S", 0.0)
    total = 0
    while True:
        code = run(place, *words, "--json", place / "part.json")
        total += len(calls) - bool(code)
        calls.clear()
        if not code:
            break
        assert code == 130
        assert "the same command goes on from here" in capsys.readouterr().err
        ends.pop(0)
    whole, part = (json.loads((place / name).read_text()) for name in ("whole.json", "part.json"))
    assert part == whole
    assert run(place, *words, "--json", place / "part.json") == 0
    assert calls == []  # everything is known
    assert run(place, *words, "--json", place / "once.json") == 0
    assert total == len(calls)  # no batch was scored twice


def test_results_of_another_model_file_or_window_are_refused(place, capsys):
    stored_model(place, seed=1)
    out = ("--json", place / "out.json")
    assert run(place, "--task", place / "t.jsonl", *out) == 0
    before = (place / "out.json").read_text()
    for model, words, said in (
        ("run1carry", ("--task", place / "t.jsonl"), "out.json was made with model "),
        ("run0carry", ("--task", place / "t.jsonl", "--dtype", "float64"), "was made with dtype float32, now float64"),
        ("run0carry", ("--task", place / "t.jsonl", "--window", 9), "t was made with window 32, now 9"),
        ("run0carry", ("--task", place / "t.jsonl", "--delimiter", "t=!"), "t was made with delimiter None, now !"),
        ("run0carry", ("--task", f"t={place / 'u.jsonl'}"), "t was made with sha256 "),
    ):
        (place / "u.jsonl").write_text(json.dumps(TASK[0]) + "\n")
        assert run(place, *words, *out, model=model) == 2
        assert said in capsys.readouterr().err
    assert (place / "out.json").read_text() == before
    (place / "out.json").write_text("[]")
    assert run(place, "--task", place / "t.jsonl", *out) == 2
    assert "is not a result of this program" in capsys.readouterr().err
    assert (place / "out.json").read_text() == "[]"


def test_results_that_cannot_be_read_or_written_are_refused_by_name(place, monkeypatch, capsys):
    words = (place, "--text", place / "a.txt")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "replace_text", full)
    assert run(*words, "--json", place / "out.json") == 2
    assert f"evaluate: {place}/out.json: cannot be written (No space left on device)" in capsys.readouterr().err


def token_set(place, tokenizer, ids):
    written = write_documents(place / "set", tokenizer.vocab_size, ids)
    TokenSetManifest(
        documents=len(ids), tokens=sum(map(len, ids)), text_bytes=2 * len(TEXT.encode()), bytes_per_token=1.0,
        vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, sha256_bin=written.sha256_bin,
        sha256_idx=written.sha256_idx, sha256_tokenizer=tokenizer.sha256, sha256_source="",
    ).save(place / "set")  # fmt: skip


@pytest.mark.parametrize("documents", ["carry", "reset", "doc"])
def test_token_sets_are_read_as_the_model_was_trained(place, documents):
    """Two documents, against sums by hand: one stream, a stream that starts anew, rows of one document."""
    stored_model(place, documents=documents)
    tokenizer = tokenizer_in(place / "data")
    eos, ids = tokenizer.eos_id, tokenizer.encode(TEXT)
    token_set(place, tokenizer, [[*ids, eos], [*ids, eos]])
    (place / "data/train.manifest.json").unlink()  # without a tokenizer: the set itself says what ends documents
    words = ("--tokens", place / "set", "--carry", "--dtype", "float64", "--json", place / "out.json")
    assert run(place, *words, model=f"run0{documents}") == 0
    found = json.loads((place / "out.json").read_text())["sources"]["set"]["result"]
    model = tiny("transformer", 0, tokenizer.vocab_size).float().double()
    stream = torch.tensor([eos, *ids, eos, *ids, eos])

    def nats(row, starts=None):
        scores = model(row[:-1, None], None, starts)[0][:, 0].detach().log_softmax(-1)
        return -scores.gather(1, row[1:, None]).sum().item()

    half = len(ids) + 2
    starts = torch.zeros(len(stream) - 1, 1, dtype=torch.bool)
    starts[[0, 1, half]] = True
    wanted = {"carry": nats(stream), "reset": nats(stream, starts), "doc": 2 * nats(stream[:half])}
    assert found["nats"] == pytest.approx(wanted[documents], abs=1e-8)
    assert len(set(np.round(list(wanted.values()), 3))) == 3
    assert found["bytes"] == 2 * len(TEXT.encode())
    assert found["bits_per_byte"]["value"] == pytest.approx(found["nats"] / found["bytes"] / math.log(2))


def test_sets_of_other_tokens_are_refused(place, capsys):
    tokenizer = tokenizer_in(place / "data")
    for vocab_size, sha256, said in (
        (tokenizer.vocab_size, "0" * 64, "made with tokenizer 000000000000..., the model's is"),
        (400, tokenizer.sha256, "its vocabulary is 400, the model has 300 rows"),
    ):
        other = SimpleNamespace(vocab_size=vocab_size, eos_id=tokenizer.eos_id, sha256=sha256)
        token_set(place, other, [[*tokenizer.encode(TEXT), tokenizer.eos_id]])
        assert run(place, "--tokens", place / "set") == 2
        assert said in capsys.readouterr().err


def test_what_cannot_work_is_said_with_what_would(place, capsys):
    (place / "bad.jsonl").write_text(json.dumps(TASK[0]) + "\n{}\n")
    text = ("--text", place / "a.txt")
    for words, said in (
        ((), "nothing to evaluate; give --text FILE"),
        (
            (*text, "--stride", 3, "--adapt", "levels", "--dtype", "bfloat16"),
            "this cannot work:\n  --adapt reads every text once, with the state carried; leave out --stride\n  --",
        ),
        ((*text, "--carry", "--stride", 3), "--carry has no windows"),
        ((*text, "--window", 8, "--stride", 9), "--stride 9 is more than the window of 8 tokens"),
        ((*text, *text), "two sources are called a; give them names: NAME=a"),
        ((*text, "--delimiter", "a= "), "--delimiter a=...: no task is called a"),
        ((*text, "--delimiter", " "), "--delimiter ' ' names no task"),
        ((*text, "--device", "cuda:99"), "--device cuda:99 is not there"),
        (("--text", place / "none.txt"), "none.txt: no such file"),
        (("--task", place / "none.jsonl"), "none.jsonl: no such file"),
        (("--task", place / "bad.jsonl"), "bad.jsonl:2: keys none are of 0 kinds"),
        (("--tokens", place / "none"), "none"),
    ):
        assert run(place, *words) == 2, words
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
    assert run(place, *text, model="nothing") == 2
    (place / "data/train.manifest.json").unlink()
    assert run(place, *text) == 2
    assert "its tokenizer was not found beside its data; --tokenizer FILE" in capsys.readouterr().err
    assert run(place, *text, "--limit", 1, "--tokenizer", place / "data/tokenizer.model") == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the programs are imported by other tests too
@pytest.mark.parametrize(("word", "said"), [("probe", "published set-up"), ("harness", "NAME,NAME")])
def test_further_programs_stand_behind_a_word(word, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate"])
    with pytest.raises(SystemExit) as ended:
        program.main([word, "--help"])
    assert ended.value.code == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("word", list(program.PROGRAMS))
def test_further_programs_are_for_one_process(word, monkeypatch, capsys):
    """Two would do the same work twice, and write one file."""
    monkeypatch.setattr(launcher, "from_environment", lambda environment: SimpleNamespace(world_size=2, rank=0))
    monkeypatch.setattr(program.told, "before_meeting", lambda text, launch: print(text))
    monkeypatch.setattr(program.runpy, "run_module", lambda *_, **__: pytest.fail("was started"))
    assert program.main([word, "--help"]) == 2
    assert capsys.readouterr().out == f"evaluate: {word} works in one process, and 2 were started; start one\n"
