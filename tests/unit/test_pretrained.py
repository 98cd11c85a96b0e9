"""Runs, checkpoints and exports are opened alike, and what is none of them is told what was looked for."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from models import named
from stored import store

from hope.model import Model
from hope.parameters import declaration_of
from hope.pretrained import load, open_pretrained
from hope.stored import folders
from hope.stored.errors import CheckpointError, DamagedCheckpoint, NothingStored, UnfitWeights
from hope.stored.safetensors import as_safetensors, read_safetensors, read_with_metadata
from hope.stored.tokenizer import find_tokenizer
from parallel.checkpoint.export import export

TRAINED = {"train": {"seq_len": 48}, "data": {"train": "nowhere/train", "documents": "reset"}}


def model(seed: int = 0) -> Model:
    return Model(named(vocab_size=32, width=16, layers=2, heads=2)).initialise(seed)


def equal(one: Model, other: Model) -> bool:
    others = dict(other.named_parameters())
    return all(torch.equal(parameter, others[name]) for name, parameter in one.named_parameters())


@pytest.fixture
def run(tmp_path):
    """A run with two checkpoints of different weights."""
    for step in (3, 12):
        store(tmp_path / "runs/one", model(step), step, TRAINED)
    return tmp_path / "runs/one"


def test_a_run_is_its_newest_checkpoint_and_a_checkpoint_itself(run):
    newest = (run / "checkpoints/latest").read_text().strip()
    for path in (run, run / "checkpoints", run / "checkpoints" / newest, str(run)):
        found = open_pretrained(path)
        assert (found.step, found.seq_len, found.data["documents"]) == (12, 48, "reset")
        assert found.origin == str(run / "checkpoints/step_00000012")
        assert equal(found.model, model(12))
    assert equal(load(run / "checkpoints/step_00000003"), model(3))


def test_an_export_is_the_checkpoint_that_it_came_from(run, tmp_path):
    out = tmp_path / "out"
    export(run / "checkpoints/step_00000012", out)
    found = open_pretrained(out)
    assert equal(found.model, model(12))
    assert (found.step, found.seq_len, found.origin) == (12, 48, str(out))
    assert (dict(found.data), found.tokenizer_path) == ({"documents": "reset"}, None)


def test_parameters_keep_what_they_declare(run):
    """A tensor-parallel layout can be made of them."""
    for name, parameter in load(run).named_parameters():
        assert declaration_of(parameter, name).update in ("matrix", "matrix_per_head", "elementwise")
        assert parameter.requires_grad


def test_a_damaged_checkpoint_is_passed_over_with_a_word(run):
    path = run / "checkpoints/step_00000012/rank_00001.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    found = open_pretrained(run)
    assert found.step == 3
    assert "step_00000003; passed over step_00000012: rank_00001.bin has another content than was wr" in found.origin
    assert not equal(open_pretrained(run, verify=False).model, model(12))  # as it was asked for
    with pytest.raises(DamagedCheckpoint, match=r"(?s)no sound checkpoint:.*step_00000012: rank_00001.bin"):
        open_pretrained(run / "checkpoints/step_00000012")
    (run / "checkpoints/step_00000003/manifest.json").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"(?s)step_00000012: rank.*step_00000003: manifest.json is missing"):
        open_pretrained(run)


def test_what_is_none_of_the_three_is_told_how_to_get_each(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "fresh/checkpoints").mkdir(parents=True)
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.json").write_text("{}")
    for name, said in {
        "": r"(?s)checkpoints/step_N.*pretrain_hope.py CONFIG.*manifest.json.*model.safetensors, conf.*export RUN",
        "nowhere": "no such folder",
        "file": "is a file; give the folder of a run",
        "fresh": "without a finished checkpoint; `touch .*/SAVE`",
        "half": "has config.json and no model.safetensors: .*export RUN",
    }.items():
        with pytest.raises(NothingStored, match=said) as caught:
            open_pretrained(tmp_path / name)
        assert isinstance(caught.value, CheckpointError)
        assert isinstance(caught.value, FileNotFoundError)


def test_doubtful_checkpoints_count_only_by_name(run):
    for path in folders.finished(run / "checkpoints"):
        path.rename(path.with_name(path.name + folders.DOUBTFUL))
    with pytest.raises(NothingStored, match=r"step_00000012\.doubtful was saved in doubt"):
        open_pretrained(run)
    assert open_pretrained(run / "checkpoints/step_00000012.doubtful").step == 12


def test_weights_that_do_not_fit_are_refused(run, tmp_path):
    out = tmp_path / "out"
    export(run / "checkpoints/step_00000012", out)
    described = json.loads((out / "config.json").read_text())
    for change, said in (
        ({"width": 32}, r"weights and config\.json do not fit: blocks\.0\."),
        ({"heads": 3}, r"model.heads: width 16 is not a multiple of heads 3"),
        ({"pattern": ["none"]}, "no mixer is called none"),
        ({"depth": 3}, "recorded model section cannot be read"),
    ):
        (out / "config.json").write_text(json.dumps({**described, "model": {**described["model"], **change}}))
        with pytest.raises(UnfitWeights, match=said):
            load(out)
    (out / "config.json").write_text("[]")
    with pytest.raises(UnfitWeights, match="does not describe exported weights"):
        load(out)
    old = {key: described[key] for key in ("model", "step", "dtype")}  # as it was written before
    (out / "config.json").write_text(json.dumps(old))
    assert open_pretrained(out).seq_len is None


def test_the_tokenizer_is_the_one_of_the_data(run, tmp_path):
    (tmp_path / "data").mkdir()
    manifest = {"sha256_tokenizer": hashlib.sha256(b"pieces").hexdigest(), "tokenizer": str(tmp_path / "else.model")}
    (tmp_path / "data/train.manifest.json").write_text(json.dumps(manifest))
    data = {"data": {"train": str(tmp_path / "data/train")}}
    store(run, model(1), 20, data)
    assert open_pretrained(run).tokenizer_path is None
    (tmp_path / "else.model").write_bytes(b"pieces")
    assert open_pretrained(run).tokenizer_path == tmp_path / "else.model"
    (tmp_path / "data/tokenizer.model").write_bytes(b"others")
    assert find_tokenizer({"sources": [data["data"]]}) == tmp_path / "else.model"
    export(run / "checkpoints/step_00000020", tmp_path / "out")
    assert open_pretrained(tmp_path / "out").tokenizer_path == tmp_path / "out/tokenizer.model"
    (tmp_path / "out/tokenizer.model").write_bytes(b"others")
    with pytest.raises(UnfitWeights, match="is not the tokenizer that was exported"):
        open_pretrained(tmp_path / "out")


def test_safetensors_come_back_as_they_were_and_others_read_them(tmp_path):
    from safetensors.torch import load_file

    tensors = {
        "b": torch.tensor([[True], [False], [True]]),
        "a": torch.arange(3.0, dtype=torch.float64),
        "half": torch.tensor([1.5, -2.0]).bfloat16(),
        "none": torch.zeros(2, 0, 3),
        "one": torch.tensor(7),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(as_safetensors(tensors, {"who": "ä"}))
    for found in (read_safetensors(path), load_file(path)):
        assert found.keys() == tensors.keys()
        assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in tensors.items())
    assert read_with_metadata(path)[1] == {"who": "ä"}


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 20, (2).to_bytes(8, "little") + b"[]", (9).to_bytes(8, "little") + b'{"a": {}}']
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UnfitWeights, match="x: "):
        read_safetensors(tmp_path / "x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("a", None), ("dtype", ["F32"]), ("dtype", "F3"), ("shape", None), ("shape", 1), ("shape", [1.0]),
        ("shape", [-1, -1]), ("data_offsets", ["0", "4"]), ("data_offsets", [0.0, 4.0]), ("data_offsets", [0, 8]),
    ],
)  # fmt: skip
def test_a_header_of_other_things_is_refused(tmp_path, key, value):
    entry = None if key == "a" else {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], key: value}
    for header, name in (({"a": entry}, "a"), ({"__metadata__": 3}, "__metadata__")):
        text = json.dumps(header).encode()
        (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        with pytest.raises(UnfitWeights, match=f"x: .*{name}"):
            read_safetensors(tmp_path / "x")


def test_reading_needs_torch_alone(run):
    script = (
        "import sys, hope.pretrained; hope.pretrained.load(sys.argv[1]);"
        "print(sorted({'megatron', 'deepspeed', 'parallel', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(run)], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)
