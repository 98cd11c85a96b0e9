"""The sections of mixers in the schema, the mixers being those that are registered after `model.imports`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.schema import load
from data_prep.config import DataConfig
from hope.mixers import MIXERS
from hope.mixers.attention import AttentionConfig

ROOT = Path(__file__).parents[2]
RUN = "run: {name: a}\ntrain: {steps: 100, seq_len: 64, global_batch: 8, micro_batch: 2}\n"
OWN = '''
from dataclasses import dataclass
from hope.mixers import attention, mixer
from hope.sections import MixerSection

@dataclass
class Taps(MixerSection):
    """Taps."""
    taps: int = 3
    """How many."""
    name: str = "a"
    """A text."""

@mixer("taps", section=Taps)
class TapMixer(attention.Attention):
    def __init__(self, trunk, section):
        super().__init__(trunk, attention.AttentionConfig())
'''


@pytest.fixture(autouse=True)
def _data_is_there(monkeypatch):
    monkeypatch.setattr(DataConfig, "problems", lambda self, vocab_size, seq_len: iter(()))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module `own_taps` in the current directory, which is not on the import path; forgotten afterwards."""
    (tmp_path / "own_taps.py").write_text(OWN)
    (tmp_path / "broken_taps.py").write_text("import nowhere_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = dict(MIXERS)
    yield
    MIXERS.clear()
    MIXERS.update(before)
    sys.modules.pop("own_taps", None)


def read(tmp_path, text: str, *words: str):
    file = tmp_path / "a.yaml"
    file.write_text(RUN + text)
    return load(str(file), words)


def problems(tmp_path, text: str, *words: str) -> dict[str, tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *words)
    return {path: (what, fix) for path, what, fix in caught.value.problems}


@pytest.mark.usefixtures("own")
def test_a_mixer_of_the_current_directory_has_a_section_like_any_other(tmp_path):
    text = "model:\n  imports: [own_taps]\n  pattern: [taps, attention]\n  mixers: {taps: {taps: 5}}\n"
    config = read(tmp_path, text, "model.mixers.taps.name=007")
    assert vars(config.model.mixers["taps"]) == {"taps": 5, "name": "007"}
    assert config.model.mixers["attention"] == AttentionConfig()
    found = problems(tmp_path, text, "model.mixers.taps.tapz=1", "model.mixers.tapz={}")
    assert found == {
        "model.mixers.taps.tapz": (
            "unknown key (command line: model.mixers.taps.tapz=1)",
            "did you mean: model.mixers.taps.taps",
        ),
        "model.mixers.tapz": ("unknown key (command line: model.mixers.tapz={})", "did you mean: model.mixers.taps"),
    }
    assert problems(tmp_path, text.replace("5", "many"))["model.mixers.taps.taps"] == (
        "'many' is not a whole number (line 6)",
        "100",
    )


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("own_tapz", "cannot import own_tapz: ModuleNotFoundError: No module named 'own_tapz'"),
        ("broken_taps", "cannot import broken_taps: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ],
)
def test_an_import_that_fails_is_a_problem_of_the_configuration(tmp_path, module, what):
    found = problems(tmp_path, "", f"model.imports=[{module}]", "log.every=0")
    assert found["model.imports"] == (what, "a module that is installed or in this folder, without .py")
    assert set(found) == {"model.imports", "log.every"}


def test_imports_that_lead_nowhere_are_told_like_any_other_key(tmp_path):
    assert "nowhere" in problems(tmp_path, "", "model.imports=['${nowhere}']")["model.imports"][0]


def test_unknown_mixers_are_named_with_the_known_ones(tmp_path):
    known = ", ".join(MIXERS)
    found = problems(tmp_path, "", "model.pattern=[atention, rnn]", "model.mixers.rnn.width=3")
    assert found == {
        "model.mixers.rnn": (
            "unknown key",
            f"model.mixers has: {known}",
        )
    }
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "", "model.pattern=[atention, rnn]")
    assert [problem[1:] for problem in caught.value.problems] == [
        ("no mixer is called atention", f"did you mean: attention; known: {known}; or model.imports"),
        ("no mixer is called rnn", f"known: {known}; or model.imports"),
    ]


def test_only_the_sections_of_the_pattern_are_there(tmp_path):
    assert set(read(tmp_path, "", "model.pattern=[attention]").model.mixers) == {"attention"}
    assert set(read(tmp_path, "", "model.pattern=[attention, hope]").model.mixers) == {"attention", "hope"}


def test_values_may_refer_to_sections_of_mixers(tmp_path):
    words = ["train.eval_every=${model.mixers.hope.main_chunk}", "model.mixers.hope.conv_width=${model.layers}"]
    words += ["train.grad_clip=${model.mixers.attention.rope_base}"]
    config = read(tmp_path, "", *words)
    assert (config.train.eval_every, config.model.mixers["hope"].conv_width) == (64, 8)
    assert (config.train.grad_clip, set(config.model.mixers)) == (10000.0, {"hope"})


def test_the_program_in_a_job_finds_modules_of_the_folder_it_runs_in(tmp_path):
    """A job runs a copy of the program from elsewhere, and with a safe path."""
    (tmp_path / "own_taps.py").write_text(OWN)
    file = tmp_path / "a.yaml"
    file.write_text(RUN + "model: {imports: [own_taps], pattern: [taps]}\n")
    program = f"from configs.schema import load; print(load({str(file)!r}, [], check=False).model.mixers)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "{'taps': Taps(taps=3, name='a')}\n", done.stderr


@pytest.mark.parametrize(
    ("words", "key", "what", "fix"),
    [
        (["alpha_spread=-1"], "alpha_spread", "-1.0 is negative", "0.0, or 2.0"),
        (["erase_max=2"], "erase_max", "2.0 is not in (0, 2): eigenvalues must stay inside (-1, 1)", "1.0, or 1.9"),
        (["erase_max=0"], "erase_max", "0.0 is not in (0, 2): eigenvalues must stay inside (-1, 1)", "1.0, or 1.9"),
        (
            ["erase_max=1.9", "erase=none"],
            "erase_max",
            "1.9 bounds a rate of erasing, and with erase none nothing is erased",
            "null, or erase layerwise",
        ),
        (
            ["self_made=not_k", "static=none"],
            "self_made",
            "not_k leaves nothing that makes k or v: there is no static path",
            "all, or model.mixers.hope.static=projected",
        ),
    ],
    ids=" ".join,
)
def test_settings_of_hope_that_cannot_work(tmp_path, words, key, what, fix):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "", *(f"model.mixers.hope.{word}" for word in words))
    assert [tuple(problem) for problem in caught.value.problems] == [(f"model.mixers.hope.{key}", what, fix)]
    assert read(tmp_path, "", *(f"model.mixers.hope.{word}" for word in ("alpha_spread=2", "erase_max=1.9")))
