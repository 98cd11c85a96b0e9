"""Layout problems and launchers, in plain numbers."""

from __future__ import annotations

import pytest

from parallel.errors import LaunchError
from parallel.launcher import first_host, from_environment
from parallel.topology import ParallelConfig, ParallelDims


def problems(config: ParallelConfig, world: int = 8, batch: int = 64, micro: int = 4) -> list[tuple[str, str, str]]:
    return list(config.problems(world, batch, micro))


def test_a_layout_that_fits_has_no_problems() -> None:
    assert problems(ParallelConfig()) == []
    assert problems(ParallelConfig(), 1, 1, 1) == []


@pytest.mark.parametrize("key", ["tensor", "pipeline", "virtual_pipeline", "context"])
@pytest.mark.parametrize("degree", [2, 0, -1])
def test_other_degrees_are_refused(key: str, degree: int) -> None:
    [(path, wrong, works)] = problems(ParallelConfig(**{key: degree}))
    assert path == f"parallel.{key}"
    assert wrong == f"is {degree}; this version runs data parallel only"
    assert works == "1"


def test_all_problems_come_at_once() -> None:
    config = ParallelConfig(tensor=2, sequence=True, zero=3)
    found = {path: works for path, _, works in problems(config, 8, 1000, 4)}
    assert found == {
        "parallel.tensor": "1",
        "parallel.sequence": "false",
        "parallel.zero": "1",
        "train.global_batch": "nearest: 992, 1024; or keep 1000 with train.micro_batch 1",
    }


@pytest.mark.parametrize(
    ("world", "batch", "micro", "works"),
    [
        (8, 1001, 4, "nearest: 992, 1024"),
        (8, 16, 4, "nearest: 32; or keep 16 with train.micro_batch 2"),
        (8, 0, 4, "nearest: 32"),
        (2, 36, 8, "nearest: 32, 48; or keep 36 with train.micro_batch 6"),
    ],
)
def test_the_advice_about_batches_works(world: int, batch: int, micro: int, works: str) -> None:
    [(path, wrong, advice)] = problems(ParallelConfig(), world, batch, micro)
    assert (path, advice) == ("train.global_batch", works)
    assert f"global {batch} sequences" in wrong
    assert f"micro {micro} × dp {world} = {micro * world}" in wrong
    for nearest in advice.removeprefix("nearest: ").split(";")[0].split(", "):
        assert problems(ParallelConfig(), world, int(nearest), micro) == []
    if "micro_batch" in advice:
        assert problems(ParallelConfig(), world, batch, int(advice.split()[-1])) == []


def test_an_empty_micro_batch_is_a_problem() -> None:
    assert [path for path, _, _ in problems(ParallelConfig(), 8, 64, 0)] == ["train.micro_batch"]


def test_data_degree_is_what_is_left() -> None:
    assert ParallelDims(32, tensor=2, pipeline=4).data == 4
    assert ParallelConfig().dims(6).data == 6


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29400"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "17005",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def test_launchers_are_read() -> None:
    torchrun = from_environment(TORCHRUN)
    assert (torchrun.rank, torchrun.world_size, torchrun.local_rank) == (3, 4, 1)
    assert (torchrun.address, torchrun.port) == ("n1", 29400)
    srun = from_environment(SRUN)
    assert (srun.rank, srun.world_size, srun.local_rank, srun.address, srun.port) == (5, 8, 1, "gpu03", 15005)
    assert from_environment({**SRUN, "MASTER_PORT": "1234", "MASTER_ADDR": "h"}).port == 1234
    assert from_environment({**SRUN, "SLURM_STEP_NUM_TASKS": "6"}).world_size == 6
    assert from_environment(TORCHRUN | SRUN) == torchrun  # torchrun inside an srun step
    assert from_environment({}).world_size == 1


def test_python_in_a_batch_script_is_one_process() -> None:
    batch_script = {key: value for key, value in SRUN.items() if "STEP" not in key} | {"SLURM_PROCID": "0"}
    assert from_environment(batch_script).world_size == 1


@pytest.mark.parametrize("key", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_launcher_is_an_error(key: str) -> None:
    with pytest.raises(LaunchError, match=key):
        from_environment({name: value for name, value in TORCHRUN.items() if name != key})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-07,11],x1", "gpu03"), ("a-b[1,3]c,z", "a-b1c"), ("r1n[007]", "r1n007")],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
