"""Every path that a user gives: home folders, prefixes with a suffix, folders, and what the system refuses."""

import errno
import os

import pytest

from data_prep.__main__ import main
from data_prep.config import DataConfig
from data_prep.errors import DataError, PathError
from data_prep.files import atomic_write
from data_prep.paths import output_prefix, token_prefix, user_path
from data_prep.training.index_key import IndexKey
from data_prep.training.index_store import open_store


@pytest.fixture
def home(copied, monkeypatch, tmp_path):
    """The copied set's folder as home, seen from another folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "tokenize --input ~/train.jsonl --tokenizer ~/tokenizer.model --out ~/new/x --workers 1",
        "tokenizer train --input ~/train.jsonl --vocab 360 --out ~/new/t.model",
        "tokenizer info ~/tokenizer.model",
        "tokenizer info --model ~/tokenizer.model",
        "verify ~/train --tokenizer ~/tokenizer.model",
        "stats ~/train --png ~/new/lengths.png",
        "inspect ~/train --document 0 --tokenizer ~/tokenizer.model",
        "manifest ~/train --tokenizer ~/tokenizer.model",
        "split --input ~/train.jsonl --out ~/new",
        "corpus --sources topics --out ~/new",
    ],
)
def test_a_tilde_is_the_home_folder(home, command):
    assert main(command.split()) == 0
    assert list((home / "here").iterdir()) == []


def test_a_tilde_works_in_a_runs_configuration(home, tiny):
    data = DataConfig(train="~/train", heldout="~/heldout.bin")
    assert list(data.problems(tiny.tokenizer.vocab_size, 64)) == []
    assert IndexKey(64, 0).folder(open_store("~/train"), "~/cache").parent == home / "cache"


def test_an_unknown_user_is_named_and_no_folder_made(home, capsys):
    assert main(["tokenizer", "info", "~no-such-user/t.model"]) == 2
    assert "no user 'no-such-user' is known here; ./~no-such-user/t.model" in capsys.readouterr().err
    (home / "here" / "~mine").write_text("")
    assert user_path("~mine") == "~mine"


@pytest.mark.parametrize("suffix", ["", "/", ".bin", ".idx", ".manifest.json"])
def test_a_prefix_may_be_given_as_one_of_its_files(copied, capsys, suffix):
    for command in (["verify"], ["stats"], ["inspect", "--document", "0"]):
        assert main([command[0], copied.train_prefix + suffix, *command[1:]]) == 0
        assert copied.train_prefix + suffix not in capsys.readouterr().out or not suffix
    assert open_store(copied.train_prefix + suffix).name == copied.train_prefix


def test_a_prefix_that_really_ends_so_is_kept(copied):
    for suffix in ("bin", "idx", "manifest.json"):
        (copied.folder / f"train.{suffix}").rename(copied.folder / f"train.bin.{suffix}")
    assert token_prefix(f"{copied.folder}/train.bin") == f"{copied.folder}/train.bin"
    assert main(["verify", f"{copied.folder}/train.bin"]) == 0


def test_the_output_may_be_named_as_a_file_but_not_as_a_folder(copied):
    command = ["tokenize", "--input", f"{copied.folder}/heldout.jsonl", "--workers", "1"]
    command += ["--tokenizer", f"{copied.folder}/tokenizer.model"]
    assert main([*command, "--out", f"{copied.folder}/foo.bin"]) == 0
    assert (copied.folder / "foo.bin").stat().st_size == (copied.folder / "heldout.bin").stat().st_size
    assert not list(copied.folder.glob("foo.bin.*"))
    before = sorted(copied.folder.rglob("*"))
    assert main([*command, "--out", f"{copied.folder}/"]) == 2
    assert sorted(copied.folder.rglob("*")) == before
    assert main([*command, "--out", ""]) == 2
    with pytest.raises(DataError, match=rf"{copied.folder}/train works"):
        output_prefix(f"{copied.folder}/")


def refused(arguments, capsys):
    """What a command says when the system refuses a path."""
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("data error: ")
    return message


def test_unreadable_input_is_named_with_the_reason(copied, capsys):
    """A link to itself is refused to every user, root included."""
    for name in ("loop", "loop.jsonl", "train.idx", "heldout.bin", "heldout.manifest.json"):
        (copied.folder / name).unlink(missing_ok=True)
        os.symlink(copied.folder / name, copied.folder / name)
    loop, model = f"{copied.folder}/loop", f"{copied.folder}/tokenizer.model"
    out = ["--out", f"{copied.folder}/new"]
    for arguments, path in (
        (["tokenize", "--input", f"{loop}.jsonl", "--tokenizer", model, *out], f"{loop}.jsonl"),
        (["tokenizer", "train", "--input", f"{loop}.jsonl", *out], f"{loop}.jsonl"),
        (["split", "--input", f"{loop}.jsonl", *out], f"{loop}.jsonl"),
        (["tokenizer", "info", loop], loop),
        (["verify", f"{copied.folder}/train"], f"{copied.folder}/train.idx"),
        (["stats", f"{copied.folder}/heldout"], f"{copied.folder}/heldout.bin"),
    ):
        message = refused(arguments, capsys)
        assert f"{path}: cannot be read (Too many levels of symbolic links)" in message
    assert not (copied.folder / "new").exists()


def test_a_folder_where_nothing_can_be_written_is_named(copied, capsys):
    (copied.folder / "file").write_text("")
    inside, text = f"{copied.folder}/file/x", f"{copied.folder}/heldout.jsonl"
    model = ["--tokenizer", f"{copied.folder}/tokenizer.model"]
    for arguments in (
        ["tokenize", "--input", text, *model, "--out", inside],
        ["tokenizer", "train", "--input", text, "--vocab", "320", "--out", inside],
        ["split", "--input", text, "--out", inside],
        ["corpus", "--sources", "topics", "--out", inside],
        ["stats", f"{copied.folder}/train", "--png", f"{inside}/a.png"],
        ["quickstart", "--out", inside],
    ):
        message = refused(arguments, capsys)
        assert f"{copied.folder}/file" in message
        assert os.strerror(errno.ENOTDIR) in message or os.strerror(errno.EEXIST) in message


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    with pytest.raises(PathError, match=rf"{tmp_path}/x: cannot be written \(No space left on device\)"):  # noqa: SIM117
        with atomic_write(tmp_path / "x"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []
