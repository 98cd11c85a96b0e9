"""What the login node refuses, and profiles that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import config_file

from configs.errors import ConfigError
from configs.schema import load
from launch import profile
from launch.__main__ import main
from launch.checks import problems
from launch.local import local_request
from launch.placement import Request, place
from launch.plan import plan
from launch.prepare import prepare
from launch.profile import Profile
from launch.script import render
from launch.slurm import seconds

SITE = {"gpus_per_node": 0, "tasks_per_node": 2, "cpus_per_task": 1, "time": "01:00:00"}


def site(folder: Path, **more) -> Profile:
    return Profile(**{**SITE, "shared": [str(folder)], **more})


def refused(path: str, overrides: list[str], where: Profile, nodes: int = 2) -> list[tuple[str, str, str]]:
    config = load(path, overrides, check=False)
    job = place(config, where, Request(path, tuple(overrides), "", nodes), Path.cwd())
    return problems(config, job, ask_slurm=False)


def test_everything_wrong_is_said_at_once(tmp_path):
    path = config_file(tmp_path)
    words = ["parallel.tensor=8", "data.train=nowhere", "train.global_batch=7", "launch.attempts=0"]
    found = refused(path, words, Profile(**SITE, preflight=profile.PreflightConfig(free_gb=1e9)))
    paths = [where for where, _, _ in found]
    assert {"parallel.tensor", "parallel", "data.train", "launch.attempts", "run.dir"} <= set(paths)
    assert paths.count("run.dir") == 2  # too small, and not shared
    assert any("which the 2 nodes do not share" in what for _, what, _ in found)


def test_the_layout_is_checked_against_nodes_times_ranks(tmp_path):
    path = config_file(tmp_path)
    assert refused(path, ["parallel.tensor=2"], site(tmp_path), 2) == []
    [problem] = refused(path, ["parallel.tensor=2", "train.global_batch=10"], site(tmp_path), 4)
    assert problem[0] == "train.global_batch"
    assert "micro 2 × dp 4 = 8" in problem[1]


def test_a_single_node_needs_no_shared_folder(tmp_path):
    assert refused(config_file(tmp_path), [], Profile(**SITE), 1) == []


def test_a_run_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    [problem] = refused(config_file(tmp_path), [f"run.dir={tmp_path}/file/runs"], site(tmp_path))
    assert "not a folder that you can write to" in problem[1]


def test_the_time_limit_must_hold_a_checkpoint(tmp_path):
    path = config_file(tmp_path)
    [problem] = refused(path, [], site(tmp_path, time="00:07:00"))
    assert problem[0] == "site.time"
    assert "launch.checkpoint_s 300 + margin_s 120" in problem[1]
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    lines = [f'{{"step": {step}, "step_time_s": 2.0}}' for step in range(8)]
    (tmp_path / "runs" / "tiny" / "metrics.jsonl").write_text("\n".join(lines))
    words = ["checkpoint.every=2000", "train.steps=9999"]
    [problem] = refused(path, words, site(tmp_path))
    assert problem[0] == "checkpoint.every"
    assert "2000 steps of 2.00 s between checkpoints (4000 s) + 420 s" in problem[1]
    assert problem[2].startswith("at most 1590;")
    assert refused(path, ["checkpoint.every=1590", "train.steps=9999"], site(tmp_path)) == []


def test_a_rank_that_does_not_fit_is_refused_with_layouts_that_do(tmp_path):
    path = config_file(tmp_path)
    words = ["model.width=512", "model.layers=4", "model.heads=4", "train.global_batch=32", "train.micro_batch=8"]
    small = site(tmp_path, gpus_per_node=4, tasks_per_node=0, gpu_memory_gb=0.3)
    [problem] = refused(path, words, small, 1)
    assert problem[0] == "parallel"
    assert "optimizer" in problem[1]
    assert problem[2].startswith("fits: tensor ")
    fits = dict(zip(problem[2].split()[1::2], problem[2].split()[2::2], strict=False))
    layout = [f"parallel.tensor={fits['tensor']}", f"parallel.pipeline={fits['pipeline']}"]
    assert refused(path, [*words, *layout], small, 1) == []


def test_submit_prints_all_problems_and_writes_nothing(tmp_path, capsys):
    path = config_file(tmp_path)
    assert main(["submit", path, "--nodes", "2", "--profile", "h100", "parallel.tensor=3", "--dry-run"]) == 2
    printed = capsys.readouterr().err
    assert "problems" in printed
    assert "parallel.tensor" in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "path", "what"),
    [
        (["time=soon"], "site.time", "'soon' is not a time limit"),
        (["gpus_per_node=0"], "site.gpus_per_node", "start no rank"),
        (["tasks_per_node=4"], "site.tasks_per_node", "4 ranks on 8 GPUs; a rank drives exactly one"),
        (["container.kind=pyxis"], "site.container.image", "pyxis needs an image"),
        (["requeue=array", "chain=1"], "site.chain", "1 elements are no chain"),
        (["env.HF_TOKEN=x"], "site.env", "HF_TOKEN looks like a secret"),
        (["partitoin=gpu"], "partitoin", "unknown key"),
        (["starter=mpirun"], "starter", "'mpirun' is not one of srun, torchrun, c10d"),
    ],
)
def test_bad_profiles(words, path, what):
    with pytest.raises(ConfigError) as caught:
        profile.load("h100", words)
    assert [p for p, _, _ in caught.value.problems] == [path]
    assert what in caught.value.problems[0][1]


def test_an_unknown_profile_names_the_known_ones():
    with pytest.raises(ConfigError, match="one of: cpu, cpu_apptainer, h100, h200_pyxis"):
        profile.load("nowhere", [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("02:30", 150), ("01:00:00", 3600), ("2-00", 172800), ("1-12:30", 131400), ("1-00:00:01", 86401),
     ("soon", None), ("", None)],
)  # fmt: skip
def test_time_limits_as_slurm_reads_them(text, expected):
    assert seconds(text) == expected


def test_the_launch_section_is_checked():
    with pytest.raises(ConfigError) as caught:
        load("configs/quickstart.yaml", ["launch.slow=0.5", "launch.limits.data=0", "launch.limits.dta=1"])
    assert {p for p, _, _ in caught.value.problems} >= {"launch.limits.dta"}
    with pytest.raises(ConfigError) as caught:
        load("configs/quickstart.yaml", ["launch.slow=0.5", "launch.limits.data=0"])
    assert {"launch.slow", "launch.limits.data"} <= {p for p, _, _ in caught.value.problems}


def test_a_file_among_the_overrides_reaches_the_job(tmp_path):
    """As the resolved configuration of the run folder: the job knows neither the files nor the words."""
    path = config_file(tmp_path, "attention")
    (tmp_path / "short.yaml").write_text("train: {steps: 5}\nmodel: {cms: {periods: [1]}}\n")
    planned = plan(local_request(path, [str(tmp_path / "short.yaml"), "optim.lr=2e-2"], 1), ask_slurm=False)
    fresh = prepare(planned, render(planned.job))
    config = load(str(fresh / planned.job.run.config.name), [])
    assert config == planned.config
    assert (config.train.steps, config.model.cms.periods, config.optim.lr) == (5, [1], 2e-2)
