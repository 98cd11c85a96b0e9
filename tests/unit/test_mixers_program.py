"""`python -m hope.mixers`: every registered mixer in one table."""

import dataclasses

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hope.config import ModelConfig
from hope.memory.linear_config import RULES
from hope.mixers import MIXERS, Trunk
from hope.mixers import __main__ as program
from hope.mixers.base import tensors_of
from hope.model import Model


def rows(capsys, *words: str) -> dict[str, list[str]]:
    """{mixer: the other cells}."""
    assert program.main(["--width", "32", "--heads", "2", "--seq", "24", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = lines[0].index("parameters") - 2  # numbers are aligned to the right, below their title's end
    found = {line[:names].strip(): line[names:].split(maxsplit=4) for line in lines[1:]}
    assert lines[0].split()[0] == "mixer"
    return found


def test_every_mixer_and_every_rule_is_listed(capsys, monkeypatch):
    monkeypatch.setattr(program, "MIXERS", {name: MIXERS[name] for name in ("hope", "attention", "linear")})
    found = rows(capsys)
    assert list(found) == ["hope", "attention", *(f"linear {rule}" for rule in RULES)]
    for name, section in (("attention", {}), ("linear", {"linear": {"rule": "kda"}})):
        model = Model(ModelConfig([name], 64, 32, 1, 2, mixers=section))
        mixer = model.blocks["0"].mixer
        count, nbytes, flops, _, paper = found["linear kda" if section else name]
        assert int(count.replace(",", "")) == sum(p.numel() for p in mixer.parameters())
        assert int(flops.replace(",", "")) == mixer.flops(24).forward
        expected = 4 * (2 * 16 * 16 + 3 * 3 * 32) if section else 2 * (2 * 24 * 32)
        assert int(nbytes.replace(",", "")) == expected
        assert ("Kimi" if section else "Vaswani") in paper


def test_a_size_that_a_mixer_cannot_have_is_said_in_its_line(capsys):
    assert program.main(["--width", "14", "--heads", "2", "--seq", "8"]) == 0
    lines = {line[:24].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "not at this size: head width 7 is odd" in lines["linear retnet"]
    assert "not at this size" not in lines["linear kda"]


@pytest.mark.parametrize("words", [["--width", "15", "--heads", "2"], ["--import", "nowhere_at_all"]])
def test_what_cannot_work_ends_with_2(capsys, words):
    assert program.main(words) == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("length", ["0", "9" * 20])
def test_a_length_that_no_sequence_has_is_refused(capsys, length):
    with pytest.raises(SystemExit) as ended:
        program.main(["--seq", length])
    assert ended.value.code == 2
    assert "--seq" in capsys.readouterr().err


def test_a_module_that_breaks_is_named(capsys, tmp_path, monkeypatch):
    (tmp_path / "breaks_at_once.py").write_text("raise RuntimeError('boo')")
    monkeypatch.syspath_prepend(tmp_path)
    assert program.main(["--import", "breaks_at_once"]) == 2
    assert "cannot import breaks_at_once: RuntimeError: boo; modules that are" in capsys.readouterr().err


SECTIONS = {shown: (name, section) for name, shown, section in program.sections()}


CHUNKS = {
    "hope": {"kernel": "plain", "projection_chunk": 4, "main_chunk": 4},
    "linear linear_attention": {"kernel": "plain", "chunk": 4},
    "linear deltanet": {"kernel": "plain", "chunk": 4},
    "titans lmm": {"chunk": 4},
    "titans_mac": {"chunk": 2, "segment": 4},
}


@pytest.mark.parametrize("shown", CHUNKS)
def test_one_chunk_tells_the_shapes_that_all_chunks_have(shown):
    """With a graph all chunks are walked, on the meta device too."""
    name, section = SECTIONS[shown]
    found, calls = [], []
    with torch.device("meta"):
        layer = MIXERS[name].build(Trunk(32, 2, 1), dataclasses.replace(section, **CHUNKS[shown]))
        for graph in (True, False):
            with torch.set_grad_enabled(graph), Called() as called:
                y, state = layer(torch.zeros(42, 1, 32))
            found.append([(t.shape, t.dtype) for t in (y, *tensors_of(state))])
            calls.append(called.count)
    assert found[0] == found[1]
    assert calls[0] > 1.2 * calls[1]


class Called(TorchFunctionMode):
    """Counts calls of torch's functions."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_sizes_that_cannot_be_counted_are_said_in_a_line(capsys, monkeypatch):
    monkeypatch.setattr(program, "MIXERS", {name: MIXERS[name] for name in ("linear", "attention")})
    assert program.main(["--width", str(2**24), "--seq", str(2**24)]) == 0
    lines = {line[:24].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "not at this size: Storage size calculation overflowed" in lines["linear deltanet"]
    assert "1,125,899,906,842,624" in lines["attention"]
