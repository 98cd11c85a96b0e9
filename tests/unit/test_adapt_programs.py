"""`--adapt` of `python -m hope.evaluate` and `python -m hope.generate`: results, state files and refusals."""

import json
from types import SimpleNamespace

import pytest
import torch
from evaluated import TEXT, stored_model, tokenizer_in
from models import named
from stored import store
from tiny import write_documents

from data_prep.manifest import TokenSetManifest
from hope.adapt.learner import Learner
from hope.adapt.settings import Settings
from hope.config import CmsConfig
from hope.evaluate import __main__ as evaluate
from hope.evaluate.scorer import fingerprint
from hope.generate import __main__ as generate
from hope.generate.learning import read_and_learn
from hope.generate.loop import Memory, Sequences, on_one_device
from hope.generate.sampling import Sampling
from hope.memory.config import MemoryConfig
from hope.mixers.base import tensors_of
from hope.model import Model
from hope.pretrained import open_pretrained
from hope.stored.safetensors import read_with_metadata
from parallel.start import launcher

EVERY = 16
ADAPT = ("--adapt", "levels", "--adapt-rate", "0.01", "--adapt-every", EVERY)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer, texts, a token set of documents, and runs: hope with two levels, of windows of 32."""
    folder = tmp_path_factory.mktemp("adapt")
    stored_model(folder)
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text(TEXT[::-1])
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": TEXT[n : n + 40]}) + "\n" for n in (0, 7, 90)))
    tokenizer = tokenizer_in(folder / "data")
    cms = lambda unit, periods: CmsConfig(periods=periods, unit=unit)
    memory = MemoryConfig(projection_chunk=4, main_chunk=8)
    for documents, unit, periods in (
        ("carry", "steps", [1, 3]),
        ("reset", "steps", [1, 3]),
        ("tokens", "tokens", [64, 128]),
    ):
        sizes = {"vocab_size": tokenizer.vocab_size, "width": 16, "layers": 2, "heads": 2}
        model = Model(named("hope", memory=memory, cms=cms(unit, periods), **sizes)).initialise(3)
        with torch.no_grad():
            model.embedding.weight.mul_(5)
        data = {"train": str(folder / "data/train"), "documents": "reset" if documents == "reset" else "carry"}
        store(folder / documents, model, 7, {"train": {"seq_len": 32}, "data": data})
    ids = [[*tokenizer.encode(TEXT[n : n + 60]), tokenizer.eos_id] for n in (0, 30, 100)]
    written = write_documents(folder / "set", tokenizer.vocab_size, ids)
    counts = {"documents": 3, "tokens": sum(written.lengths), "text_bytes": 200, "bytes_per_token": 1.0}
    digests = {"sha256_bin": written.sha256_bin, "sha256_idx": written.sha256_idx, "sha256_source": ""}
    made_with = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "sha256_tokenizer": tokenizer.sha256}
    TokenSetManifest(**counts, **digests, **made_with).save(folder / "set")
    return SimpleNamespace(folder=folder, tokenizer=tokenizer)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scored(place, *words, model="carry"):
    """Results by source."""
    out = place.folder / "out.json"
    out.unlink(missing_ok=True)
    assert evaluate.main([str(place.folder / model), "--device", "cpu", "--json", str(out), *map(str, words)]) == 0
    return {name: entry["result"] for name, entry in json.loads(out.read_text())["sources"].items()}


@pytest.mark.parametrize(("model", "source"), [("carry", ("--text", "a.txt")), ("reset", ("--tokens", "set"))])
def test_rate_0_scores_as_one_pass_that_learns_nothing(place, model, source):
    source = (source[0], place.folder / source[1])
    (still,) = scored(place, *source, "--carry", "--batch-tokens", EVERY, model=model).values()
    words = (*source, "--adapt", "levels", "--adapt-every", EVERY, "--adapt-rate")
    (rate0,) = scored(place, *words, 0, model=model).values()
    said, updates = rate0.pop("adapted"), rate0.pop("updates")
    assert rate0 == still
    windows = still["tokens"] // EVERY
    assert said["updates"] == {"level0": windows, "level1": windows // 3}
    assert updates == windows + windows // 3
    (learned,) = scored(place, *words, 0.01, model=model).values()
    assert learned["nats"] != still["nats"]
    assert learned["by_position"][3] == still["by_position"][3]  # tokens 7 to 14 are of the first window


def test_results_say_what_learned_and_every_text_meets_the_stored_model(place, capsys):
    before = fingerprint(open_pretrained(place.folder / "carry").model)
    words = ("--text", place.folder / "a.txt", place.folder / "b.txt", place.folder / "c.jsonl")
    found = scored(place, *words, *ADAPT)
    weights = sum(
        p.numel() for n, p in open_pretrained(place.folder / "carry").model.named_parameters() if ".cms." in n
    )
    for result in found.values():
        windows = result["tokens"] // EVERY
        assert result["adapted"] == {
            "levels": ["level0", "level1"], "rate": 0.01, "every": EVERY, "weights": weights,
            "updates": {"level0": windows, "level1": windows // 3},
        }  # fmt: skip
    assert found["c"]["rows"] == 3  # of fewer tokens than three windows: they go on over the ends of documents
    assert "updates" in capsys.readouterr().out
    for name in ("b.txt", "a.txt"):
        assert scored(place, "--text", place.folder / name, *ADAPT)[name[0]] == found[name[0]]
    assert fingerprint(open_pretrained(place.folder / "carry").model) == before  # and its files are as they were


def test_a_window_of_training_is_the_default_and_one_level_has_a_name(place):
    found = scored(place, "--text", place.folder / "a.txt", "--adapt", "level1")["a"]["adapted"]
    assert (found["levels"], found["every"], found["rate"]) == (["level1"], 32, 1e-4)


def test_results_of_other_settings_are_refused(place, capsys):
    scored(place, "--text", place.folder / "a.txt", *ADAPT)
    words = [
        str(place.folder / "carry"),
        "--text",
        str(place.folder / "a.txt"),
        "--json",
        str(place.folder / "out.json"),
    ]
    assert evaluate.main(words) == 2
    assert "a was made with adapt --adapt level0,level1 --adapt-rate 0.01" in capsys.readouterr().err


def written(place, capsys, *words):
    assert generate.main([str(place.folder / "carry"), "--device", "cpu", "--ignore-eos", *map(str, words)]) == 0
    return capsys.readouterr()


def test_sessions_go_on_as_if_they_had_not_been_interrupted(place, capsys, tmp_path):
    """Windows and periods are cut by the ends of sessions; what the model wrote is read, and not learned from."""
    first, second, s = TEXT[:70], TEXT[70:130], tmp_path / "s"
    go_on = ("--state-in", s, "--state-out", s, *ADAPT)
    texts = [written(place, capsys, "--prompt", first, "--tokens", 9, "--state-out", s, *ADAPT).out]
    tensors, metadata = read_with_metadata(s)
    assert json.loads(metadata["adapt"])["gathered"] > 0
    texts += [written(place, capsys, "--prompt", "", "--tokens", 5, *go_on).out]
    assert read_with_metadata(s)[1]["adapt"] == metadata["adapt"]
    texts += [written(place, capsys, "--prompt", second, "--tokens", 10, *go_on).out]

    model = open_pretrained(place.folder / "carry").model
    learner = Learner(model, Settings((0, 1), 0.01, EVERY))
    memory, chosen, ids = Memory(), [], [place.tokenizer.encode(text) for text in (first, second)]
    for prompt, count in zip(ids, (14, 10), strict=True):
        memory = read_and_learn(model, learner, memory, prompt)
        sequences = Sequences(
            on_one_device(model), [[]], Sampling(), torch.device("cpu"), memory=memory,
            vocabulary=place.tokenizer.vocab_size,
        )  # fmt: skip
        chosen.append([sequences.next()[0] for _ in range(count)])
        memory = sequences.memory()
    learned = (len(ids[0]) - 1 + len(ids[1])) // EVERY
    assert learner.updates == {"level0": learned, "level1": learned // 3}
    assert learned // 3 > 0
    tensors, metadata = read_with_metadata(s)
    theirs = learner.learned()
    assert json.loads(metadata["adapt"]) == theirs.record
    mine = {name.removeprefix("adapt/"): t for name, t in tensors.items() if name.startswith("adapt/")}
    assert {name for name, t in mine.items() if torch.equal(t, theirs.tensors[name])} == set(theirs.tensors)
    content = json.loads(metadata["session"])
    assert (content["unread"], content["place"]) == (memory.unread, memory.place)
    assert content["unread"] == chosen[1][-1:]
    shown = "".join(text.removesuffix("\n") for text in texts[:2])
    assert shown == place.tokenizer.decode([*ids[0], *chosen[0]]).removeprefix(place.tokenizer.decode(ids[0]))
    states = {name: t for name, t in tensors.items() if not name.startswith("adapt/")}
    from_memory = [t for state in memory.state.values() for part in state for t in tensors_of(part)]
    assert len(states) == len({id(t) for t in from_memory}) > 0
    assert all(any(torch.equal(t, other) for other in from_memory if t.shape == other.shape) for t in states.values())


def test_rate_0_writes_the_same_text_and_learning_another(place, capsys):
    words = ("--prompt", TEXT[:100], "--tokens", 30)
    plain = written(place, capsys, *words).out
    rate = lambda value: written(
        place, capsys, *words, "--adapt", "levels", "--adapt-every", EVERY, "--adapt-rate", value
    )
    assert rate(0).out == plain
    learned = rate(0.05)
    assert learned.out != plain
    assert "adapt: updates so far" in learned.err


def test_state_files_of_other_settings_or_models_are_refused(place, capsys, tmp_path):
    plain, learned, tampered = tmp_path / "plain", tmp_path / "learned", tmp_path / "tampered"
    written(place, capsys, "--prompt", "the cat", "--tokens", 3, "--state-out", plain)
    written(place, capsys, "--prompt", "the cat", "--tokens", 3, "--state-out", learned, *ADAPT)
    said = "--adapt level0,level1 --adapt-rate 0.01 --adapt-every 16"
    tampered.write_bytes(learned.read_bytes().replace(b'gathered\\": ', b'gathered\\":9'))
    refused = [
        ("carry", plain, ADAPT, f"{plain} was written without --adapt; leave it out"),
        ("carry", learned, (), f"{learned} holds levels that have learned; give {said}"),
        (
            "carry",
            learned,
            ("--adapt", "level1"),
            f"{learned} was written with {said}, now --adapt level1 --adapt-rate",
        ),
        ("carry", learned, (*ADAPT[:3], "0.02", *ADAPT[4:]), f"{learned} was written with {said}, now"),
        ("carry", tampered, ADAPT, "was changed, or written by another version"),
        ("tokens", learned, ADAPT, f"{learned} belongs to another model"),
    ]
    for model, state, words, expected in refused:
        words = ("--prompt", "", "--state-in", state, *words)
        assert generate.main([str(place.folder / model), "--device", "cpu", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert (out, expected in err) == ("", True), err


ORDERLESS = {
    "task": (("--task", "t.jsonl"), "the items of --task t.jsonl have none; leave out one"),
    "stride": (("--stride", "4"), "leave out --stride"),
    "bfloat16": (("--dtype", "bfloat16"), "rounding of --dtype bfloat16; float32 works"),
    "rate": (("--adapt-rate", "-1"), "--adapt-rate -1.0 is no rate; give 0 or more, such as 0.0001"),
    "nan": (("--adapt-rate", "nan"), "--adapt-rate nan is no rate"),
    "level": (("--adapt", "level2"), "--adapt level2: 'level2' is none of level0, level1; levels means all"),
}


@pytest.mark.parametrize("case", ORDERLESS)
def test_evaluation_refuses_what_has_no_order(place, capsys, case):
    words, expected = ORDERLESS[case]
    words = [str(place.folder / "carry"), "--text", str(place.folder / "a.txt"), "--adapt", "levels", *words]
    assert evaluate.main(words) == 2
    assert expected in capsys.readouterr().err


SEVERAL = {
    "batch": (("--batch", "x"), "--adapt learns from one sequence in order, --batch has several; give --prompt"),
    "prefill": (
        ("--prompt", "a", "--prefill-chunk", "4"),
        "windows of --adapt-every tokens; leave out --prefill-chunk 4",
    ),
    "bfloat16": (("--prompt", "a", "--dtype", "bfloat16"), "rounding of --dtype bfloat16; float32 works"),
    "level": (("--prompt", "a", "--adapt", "fast"), "--adapt fast: 'fast' is none of level0, level1"),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_generation_refuses_what_is_not_one_sequence(place, capsys, case):
    words, expected = SEVERAL[case]
    assert generate.main([str(place.folder / "carry"), "--adapt", "levels", *words]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("program", [evaluate, generate])
def test_both_refuse_several_processes_clocks_that_do_not_fit_and_settings_of_nothing(
    place, capsys, program, monkeypatch
):
    source = (
        ("--text", str(place.folder / "a.txt")) if program is evaluate else ("--prompt", "the cat", "--tokens", "2")
    )
    model = str(place.folder / "tokens")
    assert program.main([model, *source, "--adapt", "levels", "--adapt-every", "48"]) == 2
    said = "--adapt-every 48 does not divide the period of 64 tokens in the model's cms.periods [64, 128]"
    assert f"{said}; give a divisor of all of them, such as 64" in capsys.readouterr().err
    assert program.main([model, *source, "--adapt", "levels"]) == 0
    capsys.readouterr()
    assert program.main([model, *source, "--adapt-rate", "0.1"]) == 2
    assert "--adapt-rate says how levels learn, and none do; give --adapt levels" in capsys.readouterr().err
    monkeypatch.setattr(launcher, "from_environment", lambda environment: SimpleNamespace(world_size=2, rank=0))
    monkeypatch.setattr(program.told, "before_meeting", lambda text, launch: print(text))
    assert program.main([model, *source, "--adapt", "levels"]) == 2
    shown = capsys.readouterr().out
    assert {evaluate: "2 processes share", generate: "and 2 were started"}[program] in shown
    assert "start one" in shown


def test_clocks_in_tokens_count_windows(place):
    found = scored(place, "--text", place.folder / "a.txt", "--adapt", "levels", model="tokens")["a"]
    assert found["adapted"]["updates"] == {f"level{n}": found["tokens"] // 32 // (2, 4)[n] for n in (0, 1)}
