"""Tasks are scored at evaluations while a run trains, on all ranks, as the evaluator scores its checkpoint."""

import contextlib
import io
import json

import pytest
from evaluated import TEXT, tokenizer_in
from multirank import run_ranks
from tiny import config_text, write_documents

import pretrain_hope
from configs.errors import ConfigError
from configs.schema import load
from data_prep.manifest import TokenSetManifest
from hope.evaluate import __main__ as program

ITEMS = [{"query": "the", "choices": [" cat" * n, " mat", " of"], "gold": n % 3} for n in range(1, 8)]


@pytest.fixture
def config(tmp_path):
    """The tiny configuration, on text, with a task."""
    tokenizer = tokenizer_in(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    for name, text in (("train", TEXT), ("heldout", TEXT.upper())):
        documents = [[*tokenizer.encode(text), tokenizer.eos_id]] * 3
        written = write_documents(tmp_path / name, tokenizer.vocab_size, documents)
        TokenSetManifest(
            documents=3, tokens=sum(map(len, documents)), text_bytes=3 * len(text.encode()), bytes_per_token=1.0,
            vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, sha256_bin=written.sha256_bin,
            sha256_idx=written.sha256_idx, sha256_tokenizer=tokenizer.sha256, sha256_source="",
        ).save(tmp_path / name)  # fmt: skip
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    path = tmp_path / "tiny.yaml"
    path.write_text(config_text(tmp_path).replace("vocab_size: 64", "vocab_size: 304"))
    return path


def run(*words):
    return pretrain_hope.main(list(words))


def test_a_run_scores_its_tasks_as_the_evaluator_does(config, tmp_path):
    words = (f"train.tasks={{three: {tmp_path / 't.jsonl'}}}", "train.task_items=6", "train.steps=4")
    assert run_ranks(run, 2, str(config), *words, "train.eval_every=3") == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    scored = [line["step"] for line in lines if "task.three.accuracy" in line]
    assert scored == [line["step"] for line in lines if line.get("heldout_loss") is not None] == [0, 3, 4]
    out = tmp_path / "out.json"
    words = [str(tmp_path / "runs/tiny"), "--task", f"three={tmp_path / 't.jsonl'}", "--limit", "6", "--json", str(out)]
    with contextlib.redirect_stdout(io.StringIO()):
        assert program.main(words) == 0
    result = json.loads(out.read_text())["sources"]["three"]["result"]
    for measure in ("accuracy", "accuracy_per_byte", "chance"):
        assert lines[-1][f"task.three.{measure}"] == pytest.approx(result[measure]["value"])
    assert result["items"] == 6


def test_what_cannot_be_scored_is_refused_before_the_run(config, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    for file, said in (("bad.jsonl", "bad.jsonl:1: keys none"), ("none.jsonl", "none.jsonl: no such file")):
        assert run(str(config), f"train.tasks={{x: {tmp_path / file}}}", "--dry-run") == 2
        assert f"data error: {tmp_path / said}" in capsys.readouterr().err
    with pytest.raises(ConfigError) as caught:
        load(str(config), ["train.tasks={x: y}", "parallel.tensor=2"], world_size=2)
    ((path, what, _),) = caught.value.problems
    assert path == "train.tasks"
    assert "needs the whole model on every device, and parallel.tensor is 2" in what
    (tmp_path / "tokenizer.model").unlink()
    assert run(str(config), f"train.tasks={{x: {tmp_path / 't.jsonl'}}}", "--dry-run") == 2
    assert "needs the tokenizer of the data" in capsys.readouterr().err
