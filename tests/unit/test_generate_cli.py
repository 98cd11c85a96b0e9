"""`python -m hope.generate`, in this process, on a model of random weights that was never trained."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from models import named
from stored import store

from data_prep.tokenizing.tokenizer import Tokenizer, train_tokenizer
from hope.generate.__main__ import main
from hope.generate.text import Writer
from hope.memory.config import MemoryConfig
from hope.model import Model
from parallel.checkpoint.export import export

TEXT = "The state of a memory is a matrix. It is read, and then it is written again: naïve, 漢字.\n"
PROMPT = "The state of"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run and an export of it, whose data has a tokenizer."""
    folder = tmp_path_factory.mktemp("generate")
    tokenizer = train_tokenizer([TEXT] * 20, 320, folder / "tokenizer.model")
    (folder / "train.manifest.json").write_text(json.dumps({"sha256_tokenizer": tokenizer.sha256}))
    memory = MemoryConfig(projection_chunk=4, main_chunk=4)
    model = Model(named(vocab_size=330, width=16, layers=2, heads=2, memory=memory)).initialise(1)
    with torch.no_grad():
        model.embedding.weight.mul_(5)  # neither uniform nor certain
    data = {"data": {"train": str(folder / "train")}, "train": {"seq_len": 16}}
    path = store(folder / "run", model, 8, data)
    export(path, folder / "out")
    return SimpleNamespace(folder=folder, run=folder / "run", out=folder / "out", tokenizer=tokenizer)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny products, and no launcher."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)


def call(capsys, *args) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as error:  # argparse
        code = error.code
    return code, *capsys.readouterr()


def text_of(capsys, *args) -> str:
    code, out, err = call(capsys, *args)
    assert code == 0, err
    assert out.endswith("\n")
    return out[:-1]


def test_runs_checkpoints_and_exports_give_the_same_text(made, capsys):
    flags = ("--prompt", PROMPT, "--tokens", "30")
    code, out, err = call(capsys, made.run, *flags)
    assert code == 0
    assert len(out) > 20
    assert f"model: {made.run}/checkpoints/step_00000008, step 8, float32 on cpu" in err
    assert "prefill " in err
    assert "steps 29 tokens in " in err
    assert err.count(" tokens/s") == 2
    assert "the training windows had 16" in err
    for path in (made.run / "checkpoints/step_00000008", made.out):
        assert text_of(capsys, path, *flags) + "\n" == out


def test_a_seed_decides_and_greedy_needs_none(made, capsys):
    flags = (made.out, "--prompt", PROMPT, "--tokens", "20")
    texts = [text_of(capsys, *flags, "--seed", seed) for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    greedy = [text_of(capsys, *flags, "--seed", seed, *more) for seed, more in (
        ("1", ["--temperature", "0"]), ("2", ["--temperature", "0"]), ("3", ["--top-k", "1"]),
        ("4", ["--top-p", "1e-9"])
    )]  # fmt: skip
    assert len(set(greedy)) == 1
    assert greedy[0] not in texts


def test_standard_input_is_the_prompt(made, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    found = text_of(capsys, made.out, "--tokens", "12")
    assert found == text_of(capsys, made.out, "--tokens", "12", "--prompt", PROMPT)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    code, out, err = call(capsys, made.out)
    assert (code, out) == (2, "")
    assert "standard input is empty" in err
    for errors in ("strict", "surrogateescape"):  # which of them is a matter of the locale
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), "utf-8", errors))
        code, out, err = call(capsys, made.out)
        assert (code, out) == (2, "")
        assert "standard input is not UTF-8 text" in err


def test_prefill_in_any_chunks_gives_the_same(made, capsys):
    flags = (made.out, "--prompt", TEXT, "--tokens", "12", "--dtype", "float64")
    assert len({text_of(capsys, *flags, "--prefill-chunk", size) for size in ("1", "5", "512")}) == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_a_batch_is_what_each_prompt_is_alone(made, capsys, as_json):
    prompts = [PROMPT, "naïve", "It is read, and then it is written again", "漢"]
    lines = [json.dumps({"id": 1, "prompt": p}) for p in prompts] if as_json else prompts
    (made.folder / "prompts").write_text("\n".join(lines) + "\n")
    flags = ("--tokens", "14", "--dtype", "float64", "--stop", "is")
    code, out, _ = call(capsys, made.out, "--batch", made.folder / "prompts", *flags)
    assert code == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert [entry["prompt"] for entry in found] == prompts
    assert [entry["text"] for entry in found] == [text_of(capsys, made.out, "--prompt", p, *flags) for p in prompts]


def test_text_stops_before_a_stop_string(made, capsys):
    flags = (made.out, "--prompt", PROMPT, "--tokens", "40")
    whole = text_of(capsys, *flags)
    stop = whole[17:20]
    assert text_of(capsys, *flags, "--stop", stop, "--stop", "never there") == whole[: whole.index(stop)]


def test_text_ends_at_the_end_of_a_document_unless_that_is_ignored(made, capsys, monkeypatch):
    """The model is not trained to end: one of the tokens that it chooses is made the end."""
    ids, push = [], Writer.push
    monkeypatch.setattr(Writer, "push", lambda self, token: (ids.append(token), push(self, token))[1])
    flags = (made.out, "--prompt", PROMPT, "--tokens", "12", "--temperature", "2")
    whole = text_of(capsys, *flags)
    end = next(number for place, number in enumerate(ids) if place > 3 and number not in ids[:place])
    before = made.tokenizer.decode(ids[: ids.index(end)])
    loaded = Tokenizer.load(made.out / "tokenizer.model")
    loaded.eos_id = end
    monkeypatch.setattr(Tokenizer, "load", lambda path: loaded)
    assert text_of(capsys, *flags, "--ignore-eos") == whole
    assert text_of(capsys, *flags) == before != whole


def test_a_session_goes_on_as_if_it_had_not_been_interrupted(made, capsys, tmp_path):
    whole = text_of(capsys, made.out, "--prompt", PROMPT, "--tokens", "24")
    parts = [text_of(capsys, made.out, "--prompt", PROMPT, "--tokens", "9", "--state-out", tmp_path / "s")]
    again = ("--prompt", "", "--state-in", tmp_path / "s", "--state-out", tmp_path / "s")
    parts += [text_of(capsys, made.out, *again, "--tokens", tokens) for tokens in ("1", "14")]
    assert "".join(parts) == whole
    code, _, err = call(capsys, made.out, *again, "--dtype", "float64")
    assert code == 2
    assert "written with --dtype float32, this model is float64" in err
    other = Model(named(vocab_size=330, width=16, layers=2, heads=2)).initialise(2)
    path = store(tmp_path / "run", other, 8)
    code, out, err = call(capsys, path, *again, "--tokenizer", made.folder / "tokenizer.model")
    assert (code, out) == (2, "")
    assert "s belongs to another model" in err


REFUSED = {
    "top-p 0": (["--prompt", "a", "--top-p", "0"], "--top-p 0.0 is not a share"),
    "top-p 2": (["--prompt", "a", "--top-p", "1.5"], "--top-p 1.5 is not a share"),
    "top-p nan": (["--prompt", "a", "--top-p", "nan"], "--top-p nan is not a share"),
    "temperature": (["--prompt", "a", "--temperature", "-1"], "--temperature -1.0 is no temperature"),
    "empty": (["--prompt", ""], '--prompt "" is empty'),
    "stop": (["--prompt", "a", "--stop", ""], '--stop "" would stop at once'),
    "device": (["--prompt", "a", "--device", "nope"], "--device nope is not there"),
    "no batch": (["--batch", "nowhere"], "--batch nowhere cannot be read: No such file"),
    "both": (["--batch", "nowhere", "--prompt", "a"], "not allowed with argument"),
    "state": (["--prompt", "a", "--state-in", "nowhere"], "nowhere cannot be read: No such file"),
    "state of several": (["--batch", "x", "--state-out", "y"], "--state-out is the memory of one sequence"),
    "state-out": (["--prompt", "a", "--state-out", "no/folder/s"], "there is no folder no/folder"),
    "half a character": (["--prompt", "\udcff"], "--prompt is not UTF-8 text"),
    "tokenizer": (["--prompt", "a", "--tokenizer", "nowhere"], "nowhere: no such file"),
    "two": (["--prompt", "a", "--stop", "", "--top-p", "0"], "this cannot work:\n  --top-p 0.0 is not"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_work_is_refused(made, capsys, case):
    args, said = REFUSED[case]
    code, out, err = call(capsys, made.out, *args)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "prompts is empty"),
        (b"one\n\ntwo\n", "prompts line 2 is empty"),
        (b'{"prompt": "a"}\ntext\n', "prompts line 2 is not a JSON object"),
        (b'{"text": "a"}\n', 'prompts line 1 is not a JSON object with a text "prompt"'),
        (b'{"prompt": ""}\n', "prompts line 1 has an empty prompt"),
        (b"caf\xe9\n", "is not UTF-8 text: byte 3 is 233"),
        (b'{"prompt": "a\\ud800"}\n', r"prompts line 1 is not UTF-8 text: character 1 is '\ud800'"),
    ],
)
def test_bad_prompts_are_named(made, capsys, tmp_path, content, said):
    (tmp_path / "prompts").write_bytes(content)
    code, out, err = call(capsys, made.out, "--batch", tmp_path / "prompts")
    assert (code, out) == (2, "")
    assert said in err


def test_a_model_that_is_too_large_is_told_what_takes_less(made, capsys, monkeypatch):
    def allocate(model):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("hope.generate.__main__.on_one_device", allocate)
    code, out, err = call(capsys, made.out, "--prompt", "a")
    assert (code, out) == (2, "")
    assert err.startswith("generate: CUDA out of memory; --dtype bfloat16, fewer prompts")


def test_models_that_cannot_speak_are_told_why(made, capsys, tmp_path):
    code, _, err = call(capsys, tmp_path, "--prompt", "a")
    assert code == 2
    assert "is no run, no checkpoint and no export" in err
    for rows, said in ((330, "--tokenizer FILE names"), (300, "has 320 tokens, the model 300")):
        path = store(tmp_path / f"run{rows}", Model(named(vocab_size=rows, width=16, layers=1, heads=2)), 1)
        more = [] if rows == 330 else ["--tokenizer", made.folder / "tokenizer.model"]
        code, _, err = call(capsys, path, "--prompt", "a", *more)
        assert code == 2
        assert said in err
    diverged = Model(named(vocab_size=330, width=16, layers=1, heads=2)).initialise(0)
    with torch.no_grad():
        diverged.norm.weight[0] = float("nan")
    path = store(tmp_path / "bad", diverged, 1)
    code, _, err = call(capsys, path, "--prompt", "a", "--tokenizer", made.folder / "tokenizer.model")
    assert code == 2
    assert "scores are not finite" in err
