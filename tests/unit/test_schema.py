"""Reading, checking and writing a run's configuration."""

import dataclasses
import subprocess
import sys

import pytest

from configs.errors import ConfigError
from configs.reference import key_table
from configs.schema import Config, load, to_yaml, validate
from configs.synonyms import ELSEWHERE, SYNONYMS
from configs.tree import leaves
from data_prep.config import DataConfig
from hope.memory.config import MemoryConfig
from hope.mixers import MIXERS

MINIMAL = """
run:
  name: tiny
train:
  steps: 60_000
  seq_len: 256
  global_batch: 32
  micro_batch: 4
optim:
  lr: 3e-4
"""


@pytest.fixture(autouse=True)
def _data_is_there(monkeypatch):
    """Token files are the data section's own matter, tested with it."""
    monkeypatch.setattr(DataConfig, "problems", lambda self, vocab_size, seq_len: iter(()))


@pytest.fixture
def write(tmp_path):
    def write_file(text):
        path = tmp_path / "a.yaml"
        path.write_text(text)
        return str(path)

    return write_file


def problems_of(path, overrides=(), **options):
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides), **options)
    problems = {where: (what, fix) for where, what, fix in caught.value.problems}
    assert len(problems) == len(caught.value.problems), "one problem per key"
    return problems


def test_the_message_has_the_promised_format():
    fits = "fits: tp 2 pp 2 (dp 8) · tp 4 pp 2 (dp 4) · tp 2 pp 4 (dp 4)"
    batch = "global 1000 sequences is not a multiple of micro 4 × dp 8 = 32"
    problems = [
        ("parallel", "tp 3 × pp 2 × cp 1 = 6 does not divide 32 GPUs (4 nodes × 8)", fits),
        ("train.batch", batch, "nearest: 992, 1024"),
        ("optim.lr", "-1.0 is not positive", "1e-3"),
    ]
    assert str(ConfigError("configs/hope_1b3_4x8.yaml", problems)) == (
        "config error  configs/hope_1b3_4x8.yaml   3 problems\n"
        "  parallel      tp 3 × pp 2 × cp 1 = 6 does not divide 32 GPUs (4 nodes × 8)\n"
        "                fits: tp 2 pp 2 (dp 8) · tp 4 pp 2 (dp 4) · tp 2 pp 4 (dp 4)\n"
        "  train.batch   global 1000 sequences is not a multiple of micro 4 × dp 8 = 32;  nearest: 992, 1024\n"
        "  optim.lr      -1.0 is not positive;  try: 1e-3"
    )


def test_numbers_are_numbers_and_the_rest_has_its_defaults(write):
    config = load(write(MINIMAL), [])
    assert config.train.steps == 60_000
    assert config.optim.lr == 3e-4
    assert isinstance(config.optim.lr, float)
    assert (config.run.dir, config.train.grad_clip, config.checkpoint.resume) == ("runs", 1.0, "auto")
    assert config.model.mixers == {"hope": MemoryConfig()}


def test_overrides_win_in_order_and_are_typed(write):
    overrides = ["train.steps=100", "train.steps=1_000", "optim.lr=1e-2", "model.cms.periods=[1, 2]", "run.name=007"]
    overrides += [
        "model.mixers.hope={memory: mlp, expansion: 2}",
        "model.mixers.hope.eta_max=null",
        "log.tensorboard=false",
        "run.dir='a b'",
    ]
    config = load(write(MINIMAL), overrides)
    assert (config.train.steps, config.optim.lr, config.model.cms.periods) == (1000, 0.01, [1, 2])
    assert (config.run.name, config.run.dir) == ("007", "a b")
    assert config.model.mixers == {"hope": MemoryConfig(memory="mlp", expansion=2)}
    assert config.log.tensorboard is False


def test_every_mistake_is_reported_at_once(write):
    text = """
run: {name: 2026}
model:
  widht: 64
  mixers: {hope: {memory: matrx}, hopp: {}}
  cms: {periods: [1, two]}
train:
  steps: 2.5
  seq_len: 256
  seq_len: 512
  global_batch: 32
  lr: 1e-3
log:
"""
    problems = problems_of(write(text), ["optim.lr=fast", "train.micro_batc=4", "oops", "checkpoint.keep=1.0"])
    assert problems == {
        "train.seq_len": ("given twice, on lines 9 and 10", "keep one of them"),
        "(command line)": ("`oops` is not of the form section.key=value", "a key and a value, such as train.steps=100"),
        "run.name": ("YAML reads this text as the int 2026 (line 2)", "put it in quotes"),
        "model.widht": ("unknown key (line 4)", "did you mean: model.width"),
        "model.mixers.hopp": ("unknown key (line 5)", "did you mean: model.mixers.hope"),
        "model.mixers.hope.memory": ("'matrx' is not one of matrix, mlp (line 5)", "did you mean: matrix"),
        "model.cms.periods[1]": ("'two' is not a whole number", "100"),
        "train.steps": ("2.5 is not a whole number or null (line 8)", "nearest: 2, 3"),
        "train.lr": ("unknown key (line 12)", "did you mean: optim.lr"),
        "log": ("is empty, not a section (line 13)", "a mapping with keys of: every, tensorboard, histograms, wandb"),
        "optim.lr": ("'fast' is not a number (command line: optim.lr=fast)", "0.1 or 3e-4"),
        "train.micro_batc": (
            "unknown key (command line: train.micro_batc=4)",
            "did you mean: train.micro_batch",
        ),
        "checkpoint.keep": ("1.0 is not a whole number (command line: checkpoint.keep=1.0)", "1"),
    }


def test_required_values_are_listed_once_each(write):
    problems = problems_of(write("train: {seq_len: 8, stesp: 3, micro_batch: '???'}"))
    assert set(problems) == {"run.name", "train.stesp", "train.global_batch", "train.micro_batch"}
    assert problems["run.name"] == ("required, but not given", "run.name=VALUE, or in the file")


def test_an_unknown_section_names_the_near_one(write):
    assert problems_of(write(MINIMAL + "optm: {lr: 1}"))["optm"][1] == "did you mean: optim"
    assert problems_of(write(MINIMAL + "zzz: 1"))["zzz"][1].startswith("the top level has: run, model, data")


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("--train.steps=5", "train.steps=5"),
        ("+train.steps=5", "train.steps=5"),
        ("train.steps", "a key and a value, such as train.steps=100"),
        ("train..steps=5", "a key and a value, such as train.steps=100"),
        ("=5", "a key and a value, such as train.steps=100"),
    ],
)
def test_a_malformed_override_says_what_to_type(write, override, fix):
    assert problems_of(write(MINIMAL), [override])["(command line)"][1] == fix


def test_an_override_that_is_not_yaml(write):
    what, _ = problems_of(write(MINIMAL), ["model.cms.periods=[1,"])["model.cms.periods"]
    assert "cannot read `model.cms.periods=[1,` of the command line" in what


@pytest.mark.parametrize(("value", "kind"), [("010", "an octal number"), ("1:30", "a base-60 number")])
def test_numbers_that_yaml_reads_oddly_are_refused(write, value, kind):
    text = MINIMAL.replace("60_000", value)
    assert problems_of(write(text))["train.steps"][0] == f"YAML reads {value} as {kind}"
    assert load(write(MINIMAL.replace("tiny", f"'{value}'")), []).run.name == value


def test_a_text_that_yaml_takes_for_a_truth_value(write):
    what, _ = problems_of(write(MINIMAL.replace("tiny", "no")))["run.name"]
    assert what == "YAML reads this text as the bool False (line 3)"


def test_unreadable_files(write, tmp_path):
    write(MINIMAL)
    what, fix = problems_of(str(tmp_path / "b.yaml"))["(file)"]
    assert "No such file or directory" in what
    assert fix == f"did you mean: {tmp_path / 'a.yaml'}"
    assert "(line 3, column" in problems_of(write("run:\n  name: [a\nb: 1\n"))["(file)"][0]
    assert problems_of(write("- run\n"))["(file)"][0] == "the top level is not a mapping"
    assert "run.name" in problems_of(write(""))


def test_interpolations_are_resolved_and_checked(write):
    config = load(write(MINIMAL), ["run.dir=/x/${run.name}", "train.eval_every=${train.seq_len}"])
    assert (config.run.dir, config.train.eval_every) == ("/x/tiny", 256)
    problems = problems_of(write(MINIMAL), ["run.dir=${run.nme}", "train.eval_every=${run.name}"])
    assert "run.nme" in problems["run.dir"][0]
    assert problems["train.eval_every"][1] == "a whole number"


def test_sections_are_checked_together(write):
    overrides = ["train.stop_after=70_000", "log.every=0", "model.heads=5", "checkpoint.keep=0", "run.name=a/b"]
    problems = problems_of(write(MINIMAL), overrides)
    assert set(problems) == {"run.name", "model.heads", "train.stop_after", "checkpoint.keep", "log.every"}
    assert problems["train.stop_after"] == (
        "70000 is after the last step, train.steps 60000",
        "1 to 60000, or 0 for none",
    )


def test_a_section_that_could_not_be_read_is_not_checked_further(write):
    problems = problems_of(write(MINIMAL), ["train.steps=many", "train.max_skips=0", "log.every=0"])
    assert set(problems) == {"train.steps", "log.every"}


def test_warmup_must_leave_room_for_the_decay(write):
    problems = problems_of(write(MINIMAL), ["train.steps=100", "optim.warmup=100"])
    assert problems["optim.warmup"][1] == "at most 99; usual: 5"
    assert load(write(MINIMAL), ["train.steps=100", "optim.warmup=99"]).optim.warmup == 99
    assert load(write(MINIMAL), ["optim.warmup=0.05"]).optim.warmup == 0.05
    problems = problems_of(write(MINIMAL), ["optim.decay=wsd", "train.steps=100", "optim.decay_length=41"])
    assert problems["optim.decay_length"][1] == "at most 40; usual: 0.2 of the run"
    problems = problems_of(write(MINIMAL), ["optim.warmup=some"])
    assert problems["optim.warmup"][0].startswith("'some' is not a number")


def test_the_length_of_a_run_is_steps_or_tokens(write):
    [batch, *more] = ["train.global_batch=8", "train.seq_len=256", "train.steps=null"]
    config = load(write(MINIMAL), [batch, *more, "train.tokens=2_048_000"])
    assert (config.train.steps, config.train.total_steps) == (None, 1000)
    problems = problems_of(write(MINIMAL), [batch, *more])
    assert problems["train.steps"][0] == "required, but neither train.steps nor train.tokens is given"
    problems = problems_of(write(MINIMAL), [batch, *more, "train.tokens=2_047_000"])
    assert problems["train.tokens"] == (
        "2,047,000 tokens are no whole number of steps of 2,048 (global_batch x seq_len)",
        "nearest: 2045952 or 2048000",
    )
    problems = problems_of(write(MINIMAL), ["train.steps=1000", "train.tokens=2_048_000"])
    assert problems["train.tokens"][1] == "train.steps=null, or leave train.tokens out"
    assert problems_of(write(MINIMAL), [batch, *more, "train.tokens=7"])["train.tokens"][1] == "nearest: 2048"


def test_exceptions_by_name_are_checked_against_the_model(write):
    fine = ["optim.name=muon", 'optim.groups=[{match: "*.mixer.query.*", rate: 2}]']
    assert load(write(MINIMAL), fine).optim.groups[0].rate == 2.0
    wrong = ['optim.groups=[{match: "*.qury.*", rate: 2}, {rate: 3}, {match: a, rat: 2}, {match: b, rule: row}]']
    problems = problems_of(write(MINIMAL), wrong)
    assert problems["optim.groups[1].match"][0] == "required, but not given"
    assert problems["optim.groups[2].rat"][1] == "did you mean: optim.groups[2].rate"
    assert problems["optim.groups[3].rule"][0].startswith("'row' is not one of matrix, elementwise")
    problems = problems_of(write(MINIMAL), ['optim.groups=[{match: "*.qury.*", rate: 2}]'])
    assert "mixer.query.weight" in problems["optim.groups[0].match"][1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 0),
        ("train.seq_len", 0),
        ("train.global_batch", 0),
        ("train.micro_batch", -1),
        ("train.max_skips", 0),
        ("train.eval_every", -1),
        ("train.eval_windows", -1),
        ("train.grad_clip", -0.1),
        ("train.grad_clip", ".nan"),
        ("train.grad_clip", ".inf"),
        ("checkpoint.every", -1),
        ("log.histograms", -1),
        ("run.seed", -1),
        ("run.name", ".."),
        ("run.dir", "''"),
    ],
)
def test_numbers_out_of_range(write, key, value):
    assert set(problems_of(write(MINIMAL), [f"{key}={value}"], world_size=1)) == {key}


def test_histograms_need_tensorboard(write):
    assert "log.histograms" in problems_of(write(MINIMAL), ["log.histograms=10", "log.tensorboard=false"])


def test_the_layout_is_checked_when_the_devices_are_known(write):
    path = write(MINIMAL)
    config = load(path, ["train.global_batch=10"])
    problems = problems_of(path, ["train.global_batch=10", "log.every=0"], world_size=4)
    assert set(problems) == {"train.global_batch", "log.every"}
    with pytest.raises(ConfigError) as caught:
        validate(config, 4, source=path)
    assert [where for where, _, _ in caught.value.problems] == ["train.global_batch"]
    assert str(caught.value).startswith(f"config error  {path}   1 problem\n  train.global_batch   global 10")
    validate(load(path, []), 4)


def test_structure_alone_can_be_read(write):
    assert load(write(MINIMAL), ["log.every=0"], check=False).log.every == 0
    assert set(problems_of(write(MINIMAL), ["log.evry=0"], check=False)) == {"log.evry"}


def test_what_is_written_reads_back_equal(write):
    overrides = [
        "run.name=007",
        "run.dir=no",
        "optim.lr=1e-8",
        "model.mixers.hope.eta_max=0.1",
        "model.cms.periods=[1, 8]",
    ]
    for given in ([], overrides):
        config = load(write(MINIMAL), given)
        assert load(write(to_yaml(config)), []) == config
    assert "hidden: null" in to_yaml(config)


def keys(section, prefix=""):
    values = section if isinstance(section, dict) else vars(section)
    for name, value in values.items():
        if dataclasses.is_dataclass(value) or name == "mixers":
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


@pytest.fixture
def own_mixers(monkeypatch):
    """Only those that come with the package: other tests of this process register some."""
    for name in [name for name, kind in MIXERS.items() if not kind.section.__module__.startswith("hope.")]:
        monkeypatch.delitem(MIXERS, name)


@pytest.mark.usefixtures("own_mixers")
def test_the_reference_has_every_key_with_a_meaning(write):
    rows = [line.split(" | ") for line in key_table(Config).splitlines()[2:]]
    whole = load(write(MINIMAL), [f"model.pattern=[{', '.join(MIXERS)}]"])
    assert sorted(row[0] for row in rows) == sorted(f"| `{key}`" for key in keys(whole))
    assert [row[0] for row in rows if not row[-1].removesuffix("|").strip()] == []
    by_key = {row[0].strip("| `"): row for row in rows}
    assert by_key["train.steps"][1:3] == ["int or null", "null"]
    assert by_key["train.seq_len"][1:3] == ["int", "required"]
    assert by_key["model.mixers.hope.eta_max"][1:3] == ["float or null", "null"]
    assert by_key["train.precision"][1:3] == ["fp32, bf16", "fp32"]
    assert by_key["run.name"][3] == "Folder of the run below `dir`. |"
    assert by_key["optim.final_lr"][3].endswith(" Only with optim.decay cosine or linear or wsd. |")
    assert by_key["train.spike_window"][3].endswith(" Only with train.spike_sigma set. |")
    assert by_key["model.mixers.attention.window"][3].endswith(" Only with attention in model.pattern. |")
    both = " Only with attention in model.pattern. Only with model.mixers.attention.positions rope. |"
    assert by_key["model.mixers.attention.rope_base"][3].endswith(both)


@pytest.mark.usefixtures("own_mixers")
def test_the_reference_is_printed_by_the_module():
    printed = subprocess.run(
        [sys.executable, "-m", "configs.schema"], capture_output=True, text=True, timeout=120, check=True
    )
    assert printed.stdout == key_table(Config)


def test_what_others_call_our_keys_is_answered_with_ours():
    keys = {key.path for key in leaves(Config)}
    assert set(SYNONYMS.values()) <= keys
    assert not (SYNONYMS.keys() & ELSEWHERE.keys())


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("optim.learning_rate=1e-3", "did you mean: optim.lr"),
        ("train.max_steps=5", "did you mean: train.steps"),
        ("model.hidden_size=64", "did you mean: model.width"),
        ("train.gradient_checkpointing=true", "did you mean: train.recompute"),
        ("hidden_size=64", "did you mean: model.width"),
        ("model.dropout=0.1", "dropout is not in this version"),
        ("log.wandb_project=mine", "log.wandb=true, and the variable WANDB_PROJECT"),
        ("train.init_from=runs/old", "did you mean: model.init"),
        ("data.tokenizer=a", "the token set's manifest records its tokenizer"),
    ],
)
def test_a_familiar_name_of_another_framework(write, given, answer):
    with pytest.raises(ConfigError) as error:
        load(write(MINIMAL), [given])
    [problem] = error.value.problems
    assert problem.path == given.partition("=")[0]
    assert problem.fix.startswith(answer)
