"""Bad input ends with exit code 2 and a message that says what, where and what would work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from multirank import run_ranks
from tiny import config_file, token_set

import pretrain_hope
from configs.errors import ConfigError
from configs.schema import load
from data_prep.training.index_store import open_store
from data_prep.training.reading import HeldoutSet
from hope.stored import manifest
from parallel.start import told


def run(path: str, *overrides: str) -> int:
    return pretrain_hope.main([path, *overrides])


def refuse(capsys, path: str, *overrides: str) -> str:
    assert run(path, *overrides) == 2
    return capsys.readouterr().err


CASES = [
    (["model.layerz=3"], r"model\.layerz .*unknown key.*did you mean: model\.layers"),
    (["train.steps=two"], r"train\.steps .*'two' is not a whole number"),
    (["model.mixers.hope.memory=tensor"], r"model\.mixers\.hope\.memory .*one of matrix, mlp"),
    (["train.global_batch=9", "train.micro_batch=2"], r"global 9 .*micro 2 × dp 1 = 2.*nearest: 8, 10"),
    (["data.train=/nowhere/train"], r"data\.train .*/nowhere/train\.idx: no such file"),
    (["model.vocab_size=32"], r"model\.vocab_size .*32 is smaller .*64.*model\.vocab_size=64"),
    (["model.heads=3"], r"model\.heads .*width 16 is not a multiple of heads 3.*heads 2, 4, 1"),
    (["model.mixers.hope.main_chunk=6"], r"main_chunk 6 and projection_chunk 4: one must divide the other"),
    (["train.seq_len=100000"], r"data\.train .*fewer than one window of train\.seq_len 100000"),
    (["parallel.tensor=2"], r"parallel .*tensor 2 × pipeline 1 × context 1 = 2 does not divide 1 device"),
    (["optim.name=adamw", "optim.dmgd.objective=dot"], r"optim\.dmgd\.objective .*is not used: optim\.name is adamw"),
    (["model.pattern=[attention]"], r"model\.mixers\.hope\.memory .*no layer of model\.pattern is hope \(line 8\)"),
    (["optim.mlp_width=4"], r"optim\.mlp_width .*was renamed \(command line: .*use: optim\.dmgd\.mlp\.width=4"),
    (["model.cms.periods=[4,1]"], r"model\.cms\.periods .*fastest first.*\[1, 4\]"),
]


@pytest.mark.parametrize(("overrides", "message"), CASES, ids=[c[0][0] for c in CASES])
def test_refused_with_a_message(tmp_path, capsys, overrides, message):
    error = refuse(capsys, config_file(tmp_path), *overrides)
    assert re.search(message, re.sub(r"\s+", " ", error)), error
    assert not list(tmp_path.glob("runs/*/metrics.jsonl")), "something was written"


def test_all_problems_come_at_once(tmp_path, capsys):
    error = refuse(capsys, config_file(tmp_path), "model.heads=3", "train.global_batch=9", "optim.lr=-1")
    assert "3 problems" in error
    assert all(path in error for path in ("model.heads", "train.global_batch", "optim.lr"))


def test_truncated_data(tmp_path, capsys):
    path = config_file(tmp_path)
    file = tmp_path / "train.bin"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:100])
    assert f"train.bin: 100 bytes, but {tmp_path}/train.idx speaks of {size // 2} tokens" in refuse(capsys, path)


def test_a_layout_can_be_planned_without_the_data(tmp_path, capsys):
    """On a laptop, for devices that are elsewhere. Without --devices the data must be here, and what else is wrong is
    refused in both."""
    path = config_file(tmp_path)
    for file in tmp_path.glob("train.*"):
        file.unlink()
    assert run(path, "--dry-run", "--devices", "2") == 0
    printed = capsys.readouterr().out
    assert "2 devices = tensor 1" in printed
    assert "not checked data.train: " in printed
    assert "data.train" in refuse(capsys, path, "--dry-run")
    error = refuse(capsys, path, "model.heads=3", "--dry-run", "--devices", "2")
    assert "model.heads" in error
    assert "data.train" not in error


def test_a_layout_can_be_planned_for_devices_that_are_not_here(tmp_path, capsys):
    path = config_file(tmp_path)
    assert run(path, "parallel.tensor=2", "parallel.pipeline=2", "--dry-run", "--devices", "8") == 0
    assert "8 devices = tensor 2 x pipeline 2 x context 1 x data 2" in capsys.readouterr().out
    for arguments in (["--devices", "8"], ["--dry-run", "--devices", "0"]):
        with pytest.raises(SystemExit) as refused:
            run(path, *arguments)
        assert refused.value.code == 2


def test_dry_run_writes_nothing_and_names_the_layout(tmp_path, capsys):
    path = config_file(tmp_path)
    assert run(path, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "cms1" in out
    assert "every 3" in out
    assert "8 x 16 = 128 tokens per step" in out
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run on two ranks that was stopped after step 2."""
    folder = tmp_path_factory.mktemp("stopped")
    assert run_ranks(run, 2, config_file(folder), "train.stop_after=2", timeout=120) == [0, 0]
    return folder / "runs"


@pytest.fixture
def resumed(stopped, tmp_path):
    """The configuration of a run of one's own that was stopped after step 2."""
    path = Path(config_file(tmp_path))
    shutil.copytree(stopped, tmp_path / "runs")
    path.write_text(path.read_text().replace(f"{tmp_path}/heldout", f"{stopped.parent}/heldout"))
    return str(path)


def refused_on_resume(path: str, capfd, ranks: int, *overrides: str) -> str:
    """What a start says that ends with code 2 on every rank, and its dry run too unless `overrides` are only known
    to be wrong once tensors are read."""
    assert set(run_ranks(run, ranks, path, *overrides, timeout=120)) == {2}
    return re.sub(r"\s+", " ", capfd.readouterr().err)


def foreseen(path: str, capfd, *overrides: str) -> str:
    """What a dry run on one device says that ends with code 2."""
    assert run(path, *overrides, "--dry-run") == 2
    return re.sub(r"\s+", " ", capfd.readouterr().err)


def test_checkpoint_of_another_model(resumed, capfd):
    for error in (refused_on_resume(resumed, capfd, 2, "model.width=32"), foreseen(resumed, capfd, "model.width=32")):
        assert "model.width checkpoint 16, now 32" in error
    flags = ["model.width=32", "checkpoint.on_change={model.width: override}"]
    error = refused_on_resume(resumed, capfd, 2, *flags)
    assert "step_00000002 belongs to another model" in error
    assert re.search(r"blocks\.0\.\S+: checkpoint \(16, 16\), model \(32, 32\)", error)


def test_resume_that_would_change_the_order_of_data(resumed, capfd):
    """No word in on_change makes it the same run."""
    flags = ["train.seq_len=8", "data.seed=5", "checkpoint.on_change={all: override}"]
    for error in (refused_on_resume(resumed, capfd, 1, *flags), foreseen(resumed, capfd, *flags)):
        assert "train.seq_len checkpoint 16, now 8" in error
        assert "data.seed checkpoint 1234, now 5" in error
        assert error.count("the order of the data would change") == 2


def test_resume_on_other_data(resumed, tmp_path, capfd):
    token_set(tmp_path / "train", 60, 7)
    assert "data.train: checkpoint" in refused_on_resume(resumed, capfd, 1)
    assert "data.train checkpoint" in foreseen(resumed, capfd)


def test_the_next_batch_must_be_the_recorded_one(resumed, tmp_path, capfd):
    folder = tmp_path / "runs/tiny/checkpoints/step_00000002"
    content = manifest.read(folder)
    content.extra["next_batch"] = "beef" + content.extra["next_batch"][4:]
    content.write(folder)
    assert "the next batch is not the one that was recorded" in refused_on_resume(resumed, capfd, 1)


def test_never_resume_does_not_mix_two_runs(resumed, capfd):
    flag = "checkpoint.resume=never"
    for error in (refused_on_resume(resumed, capfd, 2, flag), foreseen(resumed, capfd, flag)):
        assert "holds checkpoints" in error
        assert "another run.name" in error


def test_an_end_before_the_checkpoint_is_refused_and_nothing_is_rewritten(resumed, tmp_path, capfd):
    written = (tmp_path / "runs/tiny/config.yaml").read_text()
    for flags in (["train.steps=1", "checkpoint.on_change={train.steps: override}"], ["train.stop_after=1"]):
        key, value = flags[0].split("=")
        flags += ["optim.warmup=0", "checkpoint.on_change={train.steps: override, optim.warmup: override}"]
        error = refused_on_resume(resumed, capfd, 2, *flags)
        assert error.count(f"{key} {value}: before step 2, from which the run would go on") == 1
        assert "use 2 or more; another run.name, with model.init for these weights; or go on from an older" in error
        assert f"{key} {value} is before step 2" in foreseen(resumed, capfd, *flags)
        assert (tmp_path / "runs/tiny/config.yaml").read_text() == written


def test_only_doubtful_checkpoints_are_refused_by_the_dry_run_too(resumed, tmp_path, capfd):
    folder = tmp_path / "runs/tiny/checkpoints"
    (folder / "step_00000002").rename(folder / "step_00000002.doubtful")
    assert "only doubtful" in refused_on_resume(resumed, capfd, 1)
    assert "only doubtful checkpoints, the newest step_00000002.doubtful" in foreseen(resumed, capfd)


def test_a_folder_that_cannot_be_written_is_refused_by_the_dry_run_too(tmp_path, capfd):
    path = config_file(tmp_path)
    (tmp_path / "file").write_text("")
    assert "file is not a folder that you can write to" in foreseen(path, capfd, f"run.dir={tmp_path}/file/runs")


def test_the_dry_run_says_what_the_run_will_do(resumed, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    windows = (store := open_store(str(tmp_path / "train"), -1, 0)).tokens // 16
    heldout = len(HeldoutSet(str(tmp_path / "heldout"), 16))
    flags = ["train.eval_windows=5", "optim.lr=0.02", "checkpoint.on_change={optim.lr: override}"]
    assert run(resumed, *flags, "--dry-run") == 0
    said = re.sub(r" +", " ", capsys.readouterr().out)
    assert store.tokens > windows * 16
    assert "optimizer dmgd with memory linear lr 0.02 weight decay 0.1 gradient norm at most 1.0" in said
    assert "schedule 2 steps of warm-up to 0.02, then cosine to 0.002 at step 8" in said
    assert f"training 8 steps of 128 = 1,024 tokens, {64 / windows:.2f} epochs of {windows} windows" in said
    assert f"evaluation 5 of {heldout} held-out windows per evaluation: before the first step, every 4 steps" in said
    assert f"run {tmp_path}/runs/tiny: resumes from step 2 of 8" in said
    assert "optim.lr: checkpoint 0.01, config 0.02, effective 0.02 (override)" in said
    assert run(resumed, "run.name=other", "train.stop_after=4", "--dry-run") == 0
    said = re.sub(r" +", " ", capsys.readouterr().out)
    assert f"run {tmp_path}/runs/other: new" in said
    assert "; stops after step 4" in said
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


def problems(file: str, devices: int) -> list:
    try:
        load(file, [], world_size=devices)
    except ConfigError as error:
        return error.problems
    return []


def test_every_config_in_the_project_loads():
    """Complete and consistent on the devices in its name, but for the data, which a fresh clone does not have."""
    files = sorted((Path(pretrain_hope.__file__).parent / "configs").glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        devices = re.search(r"_(\d+)x", file.name)
        found = problems(str(file), int(devices[1]) if devices else 2)
        assert {where for where, _, _ in found} <= {"data.train", "data.heldout"}, found
        config = load(str(file), [], check=False)
        assert pretrain_hope.facts(config, 2).startswith("model")


def test_torchrun_shows_a_refusal_once(tmp_path):
    """Ended by the launcher, or knowing that rank 0 says it: no other rank repeats it, and none shows its stack."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [str(Path(pretrain_hope.__file__)), config_file(tmp_path), "model.layerz=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shown = subprocess.run([*command, *program], capture_output=True, text=True, timeout=120, env=environment)
    assert shown.stderr.count("config error ") == 1, shown.stderr
    assert "exitcode  : 2" in shown.stderr
    assert not re.search(r'File ".*(pretrain_hope|/configs/|/hope/|/parallel/)', shown.stderr)


def misled(path: str) -> int:
    """A start of which rank 1 alone is given an unknown key."""
    told.PATIENCE_S = 2.0
    return run(path, *(["model.layerz=3"] if os.environ["RANK"] == "1" else []), "model.heads=3")


def test_ranks_without_torchrun_say_the_same_once_and_something_else_with_their_number(tmp_path, capfd):
    path = config_file(tmp_path)
    assert run_ranks(run, 3, path, "model.layerz=3", "train.global_batch=12", timeout=120) == [2, 2, 2]
    assert capfd.readouterr().err.count("config error ") == 1
    assert run_ranks(misled, 2, path, timeout=120) == [2, 2]
    error = capfd.readouterr().err
    assert error.count("config error ") == 2
    assert "rank 1: config error " in error
