"""The parallel layout of a run, in plain numbers: no process group, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hope.sections import Problem
from parallel.layout.advice import ModelSizes, batch_problems, divisors, layouts_that_fit, near, near_multiples

__all__ = ["ModelSizes", "ParallelConfig", "ParallelDims"]


@dataclass(frozen=True)
class ParallelDims:
    """How `world_size` devices are divided. `data` is what the other degrees leave over.

    Ranks are numbered as megatron-core and DeepSpeed both do: tensor fastest, then context, data, pipeline.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    virtual_pipeline: int = 1

    @property
    def data(self) -> int:
        """Data-parallel degree: the number of model replicas."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tensor, pipeline, data) rank of a global rank: rank = (pipeline × data degree + data) × tensor degree
        + tensor; without context parallelism.

        Raises:
            ValueError: there is no such rank, or the layout has a context degree.
        """
        if not 0 <= rank < self.world_size or self.context != 1:
            raise ValueError(f"rank {rank} of {self.world_size} with context {self.context}")
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return tensor, pipeline, data

    def __str__(self) -> str:
        virtual = f" (x {self.virtual_pipeline} virtual)" if self.virtual_pipeline > 1 else ""
        return f"tensor {self.tensor} x pipeline {self.pipeline}{virtual} x data {self.data}"


@dataclass
class ParallelConfig:
    """The `parallel` section of a config: degrees; what they leave over of the devices is data parallel."""

    tensor: int = 1
    """Tensor-parallel degree: heads, MLP columns and vocabulary over devices."""
    sequence: bool = False
    """Sequence parallelism: trunk activations divided over the tensor ranks."""
    pipeline: int = 1
    """Pipeline stages: consecutive blocks over devices."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline stage (interleaved schedule); needs pipeline > 1."""
    context: int = 1
    """Context-parallel degree: sequence over devices. Only 1 in this version."""
    zero: int = 1
    """ZeRO stage of the optimizer states. Only 1 in this version."""

    def dims(self, world_size: int) -> ParallelDims:
        """The layout on `world_size` devices. Call it after `problems` found none."""
        return ParallelDims(world_size, self.tensor, self.pipeline, self.context, self.virtual_pipeline)

    def problems(
        self,
        world_size: int,
        global_batch: int,
        micro_batch: int,
        model: ModelSizes | None = None,
        seq_len: int | None = None,
    ) -> Iterator[Problem]:
        """Yield (YAML path, what is wrong, what would work) for a run on `world_size` devices.

        `global_batch` and `micro_batch` count sequences: per optimizer step over all devices, and per
        forward pass of one device. Without `model` or `seq_len` (tokens) what depends on them is not checked.
        """
        yield from self._unsupported()
        below_one = [key for key in ("tensor", "pipeline", "virtual_pipeline") if getattr(self, key) < 1]
        for key in below_one:
            yield Problem(f"parallel.{key}", f"is {getattr(self, key)}, less than 1", "1")
        if below_one:
            return
        if model is not None:
            yield from self._sizes(model)
        yield from self._sequence(seq_len)
        yield from self._virtual()
        shared = self.tensor * self.pipeline
        if world_size % shared:
            what = f"tensor {self.tensor} × pipeline {self.pipeline} × context 1 = {shared}"
            virtual = self.virtual_pipeline
            fits = layouts_that_fit(world_size, (self.tensor, self.pipeline), model, virtual)
            yield Problem(
                "parallel", f"{what} does not divide {world_size} device{'s' * (world_size != 1)}", f"fits: {fits}"
            )
            return
        multiple = self.pipeline if self.virtual_pipeline > 1 else 1
        yield from batch_problems(world_size // shared, global_batch, micro_batch, multiple)

    def _unsupported(self) -> Iterator[Problem]:
        if self.context != 1:
            what = f"is {self.context}; context parallelism is not in this version"
            yield Problem(
                "parallel.context", what, "1; to fit long sequences: parallel.tensor with parallel.sequence true"
            )
        if self.zero != 1:
            why = "is not in this version"
            if self.zero in (2, 3):
                why = "reduces gradients inside each backward pass, which failed under megatron-core's schedule"
            yield Problem(
                "parallel.zero", f"is {self.zero}; stage {self.zero} {why}", "1, which every layout here supports"
            )

    def _sizes(self, model: ModelSizes) -> Iterator[Problem]:
        """What the tensor ranks must divide evenly, and whether every stage gets a block."""
        divided = (
            ("heads", model.heads, "model.heads"),
            ("vocabulary", model.vocab_size, "model.vocab_size"),
            ("MLP hidden width", model.hidden_per_level(), "model.cms.hidden"),
            *(
                (f"heads of level {number} in context", heads, f"model.cms.in_context[{number}].heads")
                for number, heads in enumerate(model.in_context_heads())
            ),
            *((key, size, key) for key, size in model.divided_by_mixers()),
        )
        for name, size, key in divided:
            if size >= 1 and size % self.tensor:
                fits = [d for d in divisors(size) if d <= 2 * self.tensor]
                sizes = near_multiples(size, self.tensor)
                if key == "model.vocab_size":  # the tokenizer needs its rows: only a larger one is sure to work
                    sizes = sizes.split(", ")[-1]
                advice = f"tensor {near(fits, self.tensor, 3)}; or {key} {sizes}"
                yield Problem("parallel.tensor", f"{name} {size} is not a multiple of tensor {self.tensor}", advice)
        chunks = self.pipeline * self.virtual_pipeline
        if 1 <= model.layers < chunks:
            virtual = f" × virtual {self.virtual_pipeline}" if self.virtual_pipeline > 1 else ""
            what = f"pipeline {self.pipeline}{virtual} = {chunks} stages, but the model has {model.layers} layers"
            stages = model.layers // self.virtual_pipeline
            fewer = f"pipeline {stages}" if stages >= 2 or virtual == "" else "virtual_pipeline 1"
            yield Problem("parallel.pipeline", what, f"{fewer}; or model.layers {chunks}")

    def _sequence(self, seq_len: int | None) -> Iterator[Problem]:
        if not self.sequence:
            return
        if self.tensor == 1:
            yield Problem(
                "parallel.sequence", "divides tokens over the tensor ranks, but tensor is 1", "false; or tensor 2"
            )
        elif seq_len is not None and seq_len % self.tensor:
            what = f"train.seq_len {seq_len} is not a multiple of tensor {self.tensor}"
            yield Problem("parallel.sequence", what, f"train.seq_len {near_multiples(seq_len, self.tensor)}; or false")

    def _virtual(self) -> Iterator[Problem]:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            what = f"is {self.virtual_pipeline}, but pipeline is 1: there are no stages to interleave"
            yield Problem("parallel.virtual_pipeline", what, "1; or parallel.pipeline 2")
