"""A tokenize run killed with SIGKILL at any moment, and started again, writes the bytes of an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.errors import DataError
from data_prep.tokenizing.records import Rules
from data_prep.tokenizing.tokenize import Settings, tokenize_files
from data_prep.tokenizing.units import plan
from data_prep.tokenizing.work import WorkFolder

ROOT = Path(__file__).parents[2]
SUFFIXES = ("bin", "idx", "manifest.json", "bad.jsonl")


def make_input(tiny, path, megabytes):
    lines = (tiny.folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    total = number = 0
    with open(path, "wb") as stream:
        while total < megabytes * 1e6:
            line = lines[number % len(lines)] if number % 7 else b'{"text": "broken ' + str(number).encode() + b"\n"
            total += stream.write(line)
            number += 1


def start(folder, prefix, workers):
    command = [sys.executable, "-m", "data_prep", "tokenize", "--input", f"{folder}/in.jsonl", "--on-bad", "skip"]
    command += ["--tokenizer", f"{folder}/t.model", "--out", str(prefix), "--unit-mb", "0.1", "--workers", str(workers)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors


def files(prefix):
    return {suffix: Path(f"{prefix}.{suffix}").read_bytes() for suffix in SUFFIXES}


@pytest.fixture
def prepared(tiny, tmp_path):
    (tmp_path / "t.model").write_bytes(tiny.tokenizer.model_bytes)
    return tmp_path


def parts(prefix):
    return len(list(Path(f"{prefix}.work").glob("*.json")))


def killed_and_resumed(folder, expected, rounds, delay):
    """`delay(process, prefix)` waits for the moment to kill; returns how many parts were finished at each kill."""
    finished = []
    for number in range(rounds):
        prefix = folder / f"round{number}"
        process = start(folder, prefix, workers=1 + number % 2)
        delay(process, prefix)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=120)
        finished.append(parts(prefix))
        finish(start(folder, prefix, workers=2 - number % 2))
        assert files(prefix) == expected, number
        left = sorted(path.name for path in folder.glob(f"*{prefix.name}*"))
        assert left == sorted(f"round{number}.{suffix}" for suffix in SUFFIXES)
    return finished


def test_killed_while_working_resumed_equal(tiny, prepared):
    make_input(tiny, prepared / "in.jsonl", 2)
    finish(start(prepared, prepared / "whole", 2))
    chance = random.Random(0)

    def after_some_parts(process, prefix):
        wanted = chance.randrange(1, 12)
        while process.poll() is None and parts(prefix) < wanted:
            time.sleep(0.005)

    expected = files(prepared / "whole")
    assert json.loads(expected["manifest.json"])["bad"]["bad_json"] > 10
    assert sum(count > 0 for count in killed_and_resumed(prepared, expected, 3, after_some_parts)) >= 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_20_random_moments(tiny, prepared):
    make_input(tiny, prepared / "in.jsonl", 6)
    units = len(plan([f"{prepared}/in.jsonl"], "auto", 100_000))
    finish(start(prepared, prepared / "whole", 2))
    chance = random.Random(time.time_ns())

    def at_random(process, prefix):
        """Evenly over start, work and merging, however fast the machine is at this moment."""
        wanted = chance.randrange(-5, units + 5)
        while process.poll() is None and parts(prefix) < min(wanted, units):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 1.0 if wanted < 0 else 0.05))

    finished = killed_and_resumed(prepared, files(prepared / "whole"), 20, at_random)
    print(f"finished parts of {units} at the 20 kills: {sorted(finished)}")
    assert sum(count > 0 for count in finished) >= 10


def test_finished_parts_are_taken_up_and_not_made_again(tiny, prepared, monkeypatch):
    make_input(tiny, prepared / "in.jsonl", 0.3)
    source, out = str(prepared / "in.jsonl"), prepared / "out"
    settings = Settings(Rules(on_bad="skip"), unit_bytes=50_000)
    monkeypatch.setattr("data_prep.tokenizing.tokenize._publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tokenize_files([source], tiny.tokenizer, out, settings)
    monkeypatch.undo()
    (prepared / "out.work" / "strange.bin").write_bytes(b"left by other settings")
    (prepared / ".out.bin.1.tmp").write_bytes(b"half")
    monkeypatch.setattr("data_prep.tokenizing.shard.Worker.run", lambda *_: pytest.fail("a part was made again"))
    tokenize_files([source], tiny.tokenizer, out, settings)
    assert sorted(path.name for path in prepared.glob("*out*")) == sorted(f"out.{suffix}" for suffix in SUFFIXES)


def test_killed_between_manifest_and_clearing_away(tiny, prepared, monkeypatch):
    make_input(tiny, prepared / "in.jsonl", 0.1)
    arguments = ["tokenize", "--input", f"{prepared}/in.jsonl", "--tokenizer", f"{prepared}/t.model"]
    arguments += ["--out", f"{prepared}/out", "--on-bad", "skip", "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", lambda self: None)
        assert main(arguments) == 0
    assert (prepared / "out.work").exists()
    before = files(prepared / "out")
    assert main(arguments) == 0
    assert files(prepared / "out") == before
    assert not (prepared / "out.work").exists()


def test_a_damaged_part_is_noticed_and_made_again(tiny, prepared, monkeypatch):
    make_input(tiny, prepared / "in.jsonl", 0.2)
    source = str(prepared / "in.jsonl")
    settings = Settings(Rules(on_bad="skip"), unit_bytes=50_000)
    expected = tokenize_files([source], tiny.tokenizer, prepared / "whole", settings)
    monkeypatch.setattr("data_prep.tokenizing.tokenize._publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tokenize_files([source], tiny.tokenizer, prepared / "out", settings)
    monkeypatch.undo()
    part = sorted((prepared / "out.work").glob("*.bin"))[1]
    part.write_bytes(part.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(DataError, match="not the bytes that were written"):
        tokenize_files([source], tiny.tokenizer, prepared / "out", settings)
    assert tokenize_files([source], tiny.tokenizer, prepared / "out", settings) == expected


def test_two_runs_on_one_prefix_exclude_each_other(tiny, prepared):
    make_input(tiny, prepared / "in.jsonl", 0.1)
    with WorkFolder(f"{prepared}/out.work"), pytest.raises(DataError, match=r"out\.work: another run works here"):
        tokenize_files([str(prepared / "in.jsonl")], tiny.tokenizer, prepared / "out", Settings())


def test_an_input_that_changes_meanwhile_is_refused(tiny, prepared, monkeypatch):
    source = prepared / "in.jsonl"
    source.write_bytes((tiny.folder / "heldout.jsonl").read_bytes())
    from data_prep.tokenizing import tokenize

    collect = tokenize._collect

    def change_too(*args):
        records = collect(*args)
        source.write_bytes(source.read_bytes() + b'{"text": "more"}\n')
        return records

    monkeypatch.setattr(tokenize, "_collect", change_too)
    with pytest.raises(DataError, match="changed while it was read"):
        tokenize_files([str(source)], tiny.tokenizer, prepared / "out", Settings())
    assert not (prepared / "out.bin").exists()
