"""Layout problems and launchers, in plain numbers."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hope.config import CmsConfig, ModelConfig
from parallel.layout.topology import ParallelConfig, ParallelDims
from parallel.start.errors import LaunchError
from parallel.start.launcher import first_host, from_environment

MODEL = ModelConfig(vocab_size=8192, width=384, layers=8, heads=6, cms=CmsConfig(hidden=512))


def problems(
    config: ParallelConfig, world: int = 8, batch: int = 64, micro: int = 4, model: ModelConfig | None = MODEL
) -> list[tuple[str, str, str]]:
    return list(config.problems(world, batch, micro, model, 1024))


@pytest.mark.parametrize(
    ("config", "world"),
    [
        (ParallelConfig(), 8),
        (ParallelConfig(), 1),
        (ParallelConfig(tensor=2, sequence=True), 8),
        (ParallelConfig(pipeline=4, virtual_pipeline=2), 4),
        (ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=4, sequence=True), 8),
        (ParallelConfig(pipeline=8), 8),
    ],
)
def test_a_layout_that_fits_has_no_problems(config: ParallelConfig, world: int) -> None:
    assert problems(config, world) == []


REFUSED = [
    (ParallelConfig(context=2), "context", "is 2; context parallelism is not in this version", "1; "),
    (ParallelConfig(zero=2), "zero", "stage 2 reduces gradients inside each backward pass", "1, which every layout"),
    (ParallelConfig(zero=3, pipeline=2), "zero", "stage 3 reduces gradients inside each backward", "1, which every"),
    (ParallelConfig(zero=0), "zero", "is 0; stage 0 is not in this version", "1, which every layout"),
    (
        ParallelConfig(tensor=4),
        "tensor",
        "heads 6 is not a multiple of tensor 4",
        "tensor 3, 6, 2; or model.heads 4, 8",
    ),
    (ParallelConfig(sequence=True), "sequence", "but tensor is 1", "false; or tensor 2"),
    (ParallelConfig(virtual_pipeline=2), "virtual_pipeline", "is 2, but pipeline is 1", "1; or parallel.pipeline 2"),
    (
        ParallelConfig(pipeline=4, virtual_pipeline=4),
        "pipeline",
        "pipeline 4 × virtual 4 = 16 stages, but the model has 8 layers",
        "pipeline 2; or model.layers 16",
    ),
    (ParallelConfig(tensor=0), "tensor", "is 0, less than 1", "1"),
    (ParallelConfig(pipeline=-1), "pipeline", "is -1, less than 1", "1"),
    (ParallelConfig(virtual_pipeline=0), "virtual_pipeline", "is 0, less than 1", "1"),
]


@pytest.mark.parametrize(("config", "key", "what", "works"), REFUSED)
def test_one_wrong_degree_is_one_problem(config: ParallelConfig, key: str, what: str, works: str) -> None:
    [(path, wrong, advice)] = problems(config)
    assert path == f"parallel.{key}"
    assert what in wrong
    assert advice.startswith(works)


def test_vocabulary_hidden_width_and_length_divide_over_tensor_ranks() -> None:
    model = ModelConfig(vocab_size=8191, width=384, layers=8, heads=6, cms=CmsConfig(hidden=515))
    found = list(ParallelConfig(tensor=2, sequence=True).problems(8, 64, 4, model, 1023))
    assert [(path, wrong) for path, wrong, _ in found] == [
        ("parallel.tensor", "vocabulary 8191 is not a multiple of tensor 2"),
        ("parallel.tensor", "MLP hidden width 515 is not a multiple of tensor 2"),
        ("parallel.sequence", "train.seq_len 1023 is not a multiple of tensor 2"),
    ]
    assert found[0][2] == "tensor 1; or model.vocab_size 8192"
    assert found[1][2] == "tensor 1; or model.cms.hidden 514, 516"
    assert found[2][2] == "train.seq_len 1022, 1024; or false"


def test_all_problems_come_at_once() -> None:
    config = ParallelConfig(tensor=4, context=2, virtual_pipeline=2, zero=3)
    found = [path for path, _, _ in problems(config, 8, 1001, 4)]
    assert found == [
        "parallel.context",
        "parallel.zero",
        "parallel.tensor",
        "parallel.virtual_pipeline",
        "train.global_batch",
    ]


@pytest.mark.parametrize(("world", "tensor", "pipeline"), [(32, 3, 2), (8, 3, 1), (1, 2, 1), (6, 2, 2), (64, 6, 5)])
def test_layouts_that_are_advised_fit(world: int, tensor: int, pipeline: int) -> None:
    found = problems(ParallelConfig(tensor=tensor, pipeline=pipeline), world, 64 * world)
    [(wrong, advice)] = [(wrong, advice) for path, wrong, advice in found if path == "parallel"]
    assert f"tensor {tensor} × pipeline {pipeline} × context 1 = {tensor * pipeline} does not divide {world}" in wrong
    layouts = re.findall(r"tensor (\d+) pipeline (\d+) \(data (\d+)\)", advice)
    assert layouts
    for advised in layouts:
        t, p, d = map(int, advised)
        assert t * p * d == world
        assert problems(ParallelConfig(tensor=t, pipeline=p), world, 64 * world) == []


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


def test_the_interleaved_schedule_takes_rounds_of_micro_batches() -> None:
    config = ParallelConfig(pipeline=4, virtual_pipeline=2)
    [(path, wrong, advice)] = problems(config, 8, 48, 4)
    assert path == "train.global_batch"
    assert "micro 4 × dp 2 × pipeline 4 (the interleaved schedule takes micro-batches in rounds of 4) = 32" in wrong
    assert advice == "nearest: 32, 64; or keep 48 with train.micro_batch 3"
    assert problems(config, 8, 32, 4) == problems(config, 8, 64, 4) == problems(config, 8, 48, 3) == []
    assert problems(ParallelConfig(pipeline=4), 8, 48, 4) == []  # 1F1B takes any number


def test_an_empty_micro_batch_is_a_problem() -> None:
    assert [path for path, _, _ in problems(ParallelConfig(), 8, 64, 0)] == ["train.micro_batch"]


def test_data_degree_is_what_is_left() -> None:
    assert ParallelDims(32, tensor=2, pipeline=4).data == 4
    assert ParallelConfig().dims(6).data == 6
    assert str(ParallelConfig(2, True, 4, 2).dims(16)) == "tensor 2 x pipeline 4 (x 2 virtual) x data 2"


def test_coordinates_number_tensor_fastest_and_pipeline_slowest() -> None:
    dims = ParallelDims(24, tensor=2, pipeline=3)
    expected = [(t, p, d) for p, d, t in itertools.product(range(3), range(4), range(2))]
    assert [dims.coordinates(rank) for rank in range(24)] == expected
    for rank in (-1, 24):
        with pytest.raises(ValueError, match=f"rank {rank} of 24"):
            dims.coordinates(rank)


def test_refused_in_seconds_without_loading_the_libraries() -> None:
    """A login node answers at once: neither torch nor megatron-core nor DeepSpeed is imported for it."""
    code = (
        "import sys; from parallel.layout.topology import ParallelConfig as P\n"
        "print(*[p for p, *_ in P(tensor=3, sequence=True, zero=2).problems(8, 10, 4)])\n"
        "assert not {'torch', 'megatron', 'deepspeed'} & set(sys.modules)"
    )
    began = time.monotonic()
    root = Path(__file__).parents[2]
    told = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=30)
    assert time.monotonic() - began < 5
    assert (told.stdout.split(), told.stderr) == (["parallel.zero", "parallel"], "")


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
    assert (srun.rank, srun.world_size, srun.local_rank, srun.address, srun.port) == (5, 8, 1, "gpu03", 19934)
    assert from_environment({**SRUN, "MASTER_PORT": "1234", "MASTER_ADDR": "h"}).port == 1234
    assert from_environment({**SRUN, "SLURM_STEP_NUM_TASKS": "6"}).world_size == 6
    assert from_environment(TORCHRUN | SRUN) == torchrun  # torchrun inside an srun step
    assert from_environment({}).world_size == 1


def test_ports_of_jobs_steps_and_restarts_that_may_be_at_once_differ() -> None:
    def port(job: int, step: int = 0, restart: int = 0) -> int:
        numbers = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(restart)}
        return from_environment({**SRUN, **numbers}).port

    ports = [port(job, step, restart) for job in (17005, 17006) for step in range(3) for restart in range(9)]
    assert len(set(ports)) == len(ports)
    assert all(15000 <= number < 32000 for number in ports)


@pytest.mark.parametrize("size", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_an_mpi_launcher_is_told_what_to_set(size: str) -> None:
    with pytest.raises(LaunchError, match=rf"{size} is 2.* WORLD_SIZE=\${size} RANK=\$.*MASTER_ADDR"):
        from_environment({size: "2"})
    assert from_environment({size: "1"}).world_size == 1
    assert from_environment({size: "2", **TORCHRUN}).world_size == 4
    assert from_environment({size: "2", **SRUN}).world_size == 8


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
