"""`python -m parallel.checkpoint`: looking into checkpoints, and weights for elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from multirank import run_ranks
from safetensors.torch import load_file
from test_training_run import run, weights
from tiny import config_file

from configs.schema import load
from data_prep.training.batches import batch_of_windows
from data_prep.training.reading import TrainingSet
from hope import pretrained
from hope.model import Model
from parallel.checkpoint.__main__ import main
from parallel.compute.replica import build_replica


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a run saved at tensor 2 x pipeline 2, and its config."""
    folder = tmp_path_factory.mktemp("trained")
    path = config_file(folder)
    flags = ["parallel.tensor=2", "parallel.pipeline=2", "train.stop_after=4"]
    assert set(run_ranks(run, 4, path, *flags, timeout=100)) == {0}
    return folder, path


def checkpoint(trained: tuple[Path, str]) -> Path:
    return trained[0] / "runs/tiny/checkpoints/step_00000004"


def test_inspect(trained, capsys):
    assert main(["inspect", "--tensors", str(trained[0] / "runs/tiny")]) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "tensor 2 x pipeline 2 x virtual_pipeline 1 x data 1" in lines["saved in"]
    elements = sum(p.numel() for p in Model(load(trained[1], [], check=False).model).parameters())
    assert f" {elements:,} elements, float32" in lines["master"]
    assert "clock 4, updates 1" in lines["group cms1"]
    assert "none: fast-weight states are created with every sequence" in lines["memory state"]
    assert "[32, 16] at [32, 0]: rank_0000" in out


def test_verify(trained, capsys, tmp_path):
    path = checkpoint(trained)
    assert main(["verify", str(path.parent)]) == 0
    assert "all as written" in capsys.readouterr().out
    shard = path / "rank_00003.bin"
    before = shard.read_bytes()
    try:
        shard.write_bytes(before[:50] + bytes([before[50] ^ 4]) + before[51:])
        assert main(["verify", str(path)]) == 2
        assert "rank_00003.bin has another content than was written" in capsys.readouterr().err
        assert main(["export", str(path), "--out", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
    finally:
        shard.write_bytes(before)
    assert main(["verify", str(trained[0])]) == 2
    assert "is no checkpoint and holds none" in capsys.readouterr().err


def test_reshard_plan(trained, capsys):
    assert main(["reshard-plan", "--tensor", "2", "--pipeline", "2", "--data", "2", str(checkpoint(trained))]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:6]]
    assert [row[:2] for row in rows] == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]
    assert main(["reshard-plan", "--tensor", "4", str(checkpoint(trained))]) == 2
    error = capsys.readouterr().err
    assert "heads 2 is not a multiple of tensor 4" in error


def test_exported_weights_give_the_logits_of_the_checkpoint_with_torch_alone(trained, capsys, tmp_path):
    folder, path = trained
    assert main(["export", str(checkpoint(trained)), "--out", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    model = pretrained.load(tmp_path)
    config = load(path, [])
    data = TrainingSet(config.data.train, config.train.seq_len, config.data.seed)
    tokens = batch_of_windows([data.sample(i) for i in range(4)], "carry", data.eos_id).tokens_TB
    logits = run_ranks(logits_in_training, 1, path, tokens, timeout=120)[0]
    assert torch.equal(model(tokens)[0], logits)
    masters = weights(folder, 4)
    for found in (
        pretrained.read_safetensors(tmp_path / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    ):
        assert found.keys() == masters.keys() == dict(Model(config.model).named_parameters()).keys()
        assert all(torch.equal(found[name], masters[name]) for name in masters)
    assert not any(torch.equal(p, masters[name]) for name, p in Model(config.model).initialise(1).named_parameters())


def logits_in_training(path: str, tokens: torch.Tensor) -> torch.Tensor:
    """What the model computes on one device after a resume from the same checkpoint."""
    from parallel.checkpoint.checkpointer import Checkpointer
    from parallel.start.groups import start

    config = load(path, [])
    with start(config.parallel) as ranks:
        replica = build_replica(
            config.model, config.optim, config.parallel, ranks, seq_len=16, precision="fp32", seed=9
        )
        keeper = Checkpointer(Path(config.run.dir) / "tiny/checkpoints", ranks)
        found, _ = keeper.find()
        assert found is not None
        keeper.load(found, replica.models, replica.optimizer)
        return replica.models[0](tokens)[0].detach()


def test_export_in_bf16_and_what_the_config_says(trained, tmp_path):
    assert main(["export", "--dtype", "bfloat16", str(checkpoint(trained)), "--out", str(tmp_path)]) == 0
    model = pretrained.load(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    described = json.loads((tmp_path / "config.json").read_text())
    assert (described["step"], described["model"]["width"]) == (4, 16)
    described["model"]["width"] = 32
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"weights and config\.json do not fit: blocks\.0\."):
        pretrained.load(tmp_path)


def test_the_command_line_needs_no_process_group(trained):
    command = [sys.executable, "-m", "parallel.checkpoint", "inspect", str(checkpoint(trained))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step " in done.stdout


def test_a_reader_that_has_enough_is_no_error(trained):
    command = [sys.executable, "-m", "parallel.checkpoint", "inspect", "--tensors", str(checkpoint(trained))]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    assert reader.stderr is not None
    reader.stdout.close()
    assert (reader.stderr.read(), reader.wait(60)) == ("", 141)  # as a shell counts SIGPIPE


def test_an_export_can_be_read_by_others_and_has_the_tokenizer_of_the_data(trained, capsys, tmp_path):
    before, model = os.umask(0o022), trained[0] / "tokenizer.model"
    try:
        assert main(["export", str(checkpoint(trained)), "--out", str(tmp_path)]) == 0
        assert "no tokenizer" in capsys.readouterr().out
        model.write_bytes(b"another")
        assert main(["export", str(checkpoint(trained)), "--out", str(tmp_path)]) == 0
        assert not (tmp_path / "tokenizer.model").exists()
        model.write_bytes(b"counting")  # whose hash the token sets record
        assert main(["export", str(checkpoint(trained)), "--out", str(tmp_path)]) == 0
        assert f"{tmp_path}/tokenizer.model: {model}" in capsys.readouterr().out
    finally:
        os.umask(before)
        model.unlink(missing_ok=True)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors", "tokenizer.model"), 0o644)


def test_a_run_that_was_cut_over_ranks_is_loaded_whole(trained, tmp_path):
    """From the run's folder, as from what was exported of it."""
    assert main(["export", str(checkpoint(trained)), "--out", str(tmp_path)]) == 0
    found, exported = pretrained.open_pretrained(trained[0] / "runs/tiny"), pretrained.open_pretrained(tmp_path)
    assert (found.origin, found.step, found.seq_len) == (str(checkpoint(trained)), 4, 16)
    assert (exported.step, exported.seq_len) == (4, 16)
    of_export = dict(exported.model.named_parameters())
    for name, parameter in found.model.named_parameters():
        assert torch.equal(parameter, of_export[name]), name
