"""Process groups: torch.distributed starts them, megatron-core owns them."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from parallel.layout.topology import ParallelConfig, ParallelDims
from parallel.start import cpu, launcher
from parallel.start.errors import LaunchError
from parallel.start.meeting import meet

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job, and the device that it computes on.

    `rank` = (pp_rank × dp_size + dp_rank) × tp_size + tp_rank. `vp_size`: model chunks on each pipeline rank.
    """

    rank: int
    world_size: int
    local_rank: int
    dp_rank: int
    dp_size: int
    device: torch.device
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    vp_size: int = 1

    @property
    def first_stage(self) -> bool:
        """Whether this rank's first chunk takes token ids."""
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank's last chunk knows the loss."""
        return self.pp_rank == self.pp_size - 1

    @property
    def dims(self) -> ParallelDims:
        """The layout of the job."""
        return ParallelDims(self.world_size, self.tp_size, self.pp_size, virtual_pipeline=self.vp_size)


@contextlib.contextmanager
def start(config: ParallelConfig, timeout_s: float = 1800.0, who: Mapping[str, str] | None = None) -> Iterator[Ranks]:
    """Join the job and build its process groups; leave them on exit.

    NCCL when CUDA is present, else gloo. Works under torchrun, under srun, and with no launcher (one process).
    `timeout_s`: a collective that waits longer fails and names itself, so a lost peer is no endless hang;
    megatron-core's groups round it to whole minutes, at least one. `who`: what tells this run from others that may be
    started beside it; ranks of different runs refuse each other.

    Raises:
        LaunchError: the launcher's variables do not fit this machine or the layout, or another run is in the way.
    """
    launch = launcher.from_environment(os.environ)
    who = {**launcher.attempt(os.environ), **(who or {})}
    device = _device(launch.local_rank)
    import_quietly()
    # DeepSpeed reads its rank from these three and sets its device to LOCAL_RANK, which under srun with one
    # visible GPU per task is 0 for everybody.
    names = {"RANK": launch.rank, "WORLD_SIZE": launch.world_size, "LOCAL_RANK": device.index or 0}
    with _environment({name: str(value) for name, value in names.items()}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*deprecated")  # theirs
        _init_torch(launch, who, device, timeout_s)
        try:
            yield _init_libraries(config, launch, device, timeout_s)
        finally:
            _destroy()


def in_another_layout(config: ParallelConfig, ranks: Ranks, timeout_s: float = 1800.0) -> Ranks:
    """The same processes in another layout, numbered as `start` would: for measurements, which need no new start.

    Inside `start`, with whose end these groups end too. What was built on the groups of before is of no use any more.
    Collective. `timeout_s`: as for `start`.
    """
    barrier()
    library, known = parallel_state(), dist.distributed_c10d._world.pg_map
    made = [group for group in library._global_process_group_list or () if group in known]
    library.destroy_model_parallel()
    for group in made:  # megatron-core only forgets them, and NCCL's buffers would stay on the device
        dist.destroy_process_group(group)
    launch = launcher.Launch(ranks.rank, ranks.world_size, ranks.local_rank, "", 0)
    return _init_libraries(config, launch, ranks.device, timeout_s)


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on at least one rank; every rank gets the same answer."""
    count = torch.tensor([int(flag)], device=_collective_device())
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return bool(count.item())


def loss_on_all_ranks(loss: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The mean over data-parallel ranks of a scalar that only the last pipeline stage knows, on every rank.

    `loss`: on the last stage equal over its tensor ranks; what other stages give is ignored. One all-reduce.
    """
    known = loss.detach().clone() if ranks.last_stage else torch.zeros_like(loss)
    dist.all_reduce(known)
    return known / (ranks.dp_size * ranks.tp_size)


def from_first(own: Any) -> Any:
    """What rank 0 says, on every rank."""
    box = [own]
    dist.broadcast_object_list(box, src=0, device=_collective_device())
    return box[0]


def merged(own: dict[K, V]) -> dict[K, V]:
    """The union of every rank's entries, on every rank; of several for one key, that of the lowest rank."""
    everyone: list[dict[K, V]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own)
    return {key: value for part in reversed(everyone) for key, value in part.items()}


def barrier() -> None:
    """Wait for every rank."""
    any_rank(False)  # dist.barrier() guesses a device under NCCL; an all-reduce of one number does not


def data_group() -> dist.ProcessGroup:
    """The data-parallel process group of this rank."""
    return parallel_state().get_data_parallel_group()


def tensor_group() -> dist.ProcessGroup:
    """The ranks that hold the other shards of this rank's matrices."""
    return parallel_state().get_tensor_model_parallel_group()


def pipeline_group() -> dist.ProcessGroup:
    """The ranks that hold the other stages of this rank's model replica, first stage first."""
    return parallel_state().get_pipeline_model_parallel_group()


def embedding_group(ranks: Ranks) -> dist.ProcessGroup | None:
    """The first and the last stage of this rank's pipeline, on ranks of these two; None elsewhere and without one."""
    if ranks.pp_size == 1 or not (ranks.first_stage or ranks.last_stage):
        return None
    return parallel_state().get_embedding_group()


def parallel_state() -> Any:
    """megatron-core's module of process groups, imported when it is needed: it takes seconds."""
    from megatron.core import parallel_state as module

    return module


def import_quietly() -> None:
    """Import megatron-core and DeepSpeed (7 s) without their notices about optional packages."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no accelerator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import megatron.core.pipeline_parallel.schedules
        import megatron.core.transformer.multi_token_prediction  # noqa: F401  the schedule imports it when it runs
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Else the first init compiles shm.cpp, and a run killed in it leaves a lock that hangs every later run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cpu.enable()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible > 1 and local_rank >= visible:
        raise LaunchError(
            f"local rank {local_rank} has no GPU: this node shows {visible}; start at most {visible} processes here"
        )
    return torch.device("cuda", local_rank if visible > 1 else 0)


def _collective_device() -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _init_torch(launch: launcher.Launch, who: Mapping[str, str], device: torch.device, timeout_s: float) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=meet(launch, who, timeout_s),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def _init_libraries(config: ParallelConfig, launch: launcher.Launch, device: torch.device, timeout_s: float) -> Ranks:
    import deepspeed

    parallel_state().initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
        create_gloo_process_groups=False,
    )
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    tensor, pipeline, data = config.dims(launch.world_size).coordinates(launch.rank)
    groups = (tensor_group(), pipeline_group(), data_group())
    if tuple(dist.get_rank(group) for group in groups) != (tensor, pipeline, data):
        raise AssertionError(f"megatron-core numbers ranks in another order than {config.dims(launch.world_size)}")
    sizes = [dist.get_world_size(group) for group in groups]
    return Ranks(
        rank=launch.rank,
        world_size=launch.world_size,
        local_rank=launch.local_rank,
        dp_rank=data,
        dp_size=sizes[2],
        device=device,
        tp_rank=tensor,
        tp_size=sizes[0],
        pp_rank=pipeline,
        pp_size=sizes[1],
        vp_size=config.virtual_pipeline,
    )


def _destroy() -> None:
    parallel_state().destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
