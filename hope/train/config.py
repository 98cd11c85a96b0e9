"""The sections of the configuration about a run: run, train, checkpoint and log."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from hope.dense import SHAPES
from hope.sections import Problem, only_if


def _at_least(section: object, path: str, bounds: dict[str, int]) -> Iterator[Problem]:
    """Problems of whole numbers below their bound."""
    for name, low in bounds.items():
        value = getattr(section, name)
        if value < low:
            yield Problem(f"{path}.{name}", f"{value} is less than {low}", f"{low} or more")


def _near_divisors(value: int, wanted: int) -> str:
    """The divisors of `value` on both sides of `wanted`."""
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    return "nearest: " + ", ".join(map(str, below + [d for d in divisors if d > wanted][:1]))


@dataclass(kw_only=True)
class RunConfig:
    """Name and place of a run."""

    name: str
    """Folder of the run below `dir`."""
    dir: str = "runs"
    """Folder that holds all runs."""
    seed: int = 1
    """Seed of the initial weights."""

    def problems(self, path: str = "run") -> Iterator[Problem]:
        if self.name in ("", ".", "..") or set(self.name) & set("/\\\0\n"):
            yield Problem(f"{path}.name", f"{self.name!r} is not the name of one folder", "letters, digits, - and _")
        if not self.dir:
            yield Problem(f"{path}.dir", "is empty", "runs")
        if not 0 <= self.seed < 2**63:
            yield Problem(f"{path}.seed", f"{self.seed} is not in [0, 2^63)", "1")


@dataclass(kw_only=True)
class SeqLenStage:
    """From one step on, sequences of `seq_len` tokens."""

    from_step: int
    """First step of the stage, counted from 1."""
    seq_len: int
    """Tokens per sequence; divides train.seq_len."""


@dataclass(kw_only=True)
class TrainConfig:
    """How long, how much per step, how often it is evaluated."""

    mode: Literal["blend", "continual"] = "blend"
    """blend: data.sources are mixed by weight; continual: they are read one after another, each for the share of the
    steps that is its weight, and every source's held-out loss is measured at every border (docs/continual.md)."""
    steps: int | None = None
    """Optimizer steps of the whole run; the learning-rate schedule ends here. Give this or train.tokens."""
    tokens: int | None = None
    """Tokens of the whole run, instead of train.steps: a whole number of steps of global_batch x seq_len each."""
    stop_after: int = 0
    """Save and stop after this step while the schedule still follows the whole run; 0: run to the end."""
    seq_len: int
    """Tokens per sequence that are predicted; also the window in which data positions are counted."""
    seq_len_stages: list[SeqLenStage] = field(default_factory=list)
    """[{from_step: 1, seq_len: 512}, ...]: each window is cut into shorter sequences, more of them per step, so that
    tokens per step and the order of the data stay; empty: seq_len throughout. Evaluation always takes seq_len."""
    global_batch: int
    """Sequences per optimizer step, over all devices."""
    micro_batch: int
    """Sequences per device and forward pass."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16; master weights and fast weights stay fp32."""
    deterministic: bool = False
    """Only kernels that repeat themselves: on a GPU too, a run that runs again, or is resumed, is then the same to the
    last bit (same layout, same kind of GPU, same versions). Attention becomes slower."""
    recompute: Literal["none", "memory", "mlp", "block"] = "none"
    """What the backward pass computes again instead of keeping: nothing, the mixers (chunk loops), the MLPs, or whole
    blocks."""
    compile: Literal["none", "dense", "block"] = "none"
    """dense: norms, gates, convolutions, rotations and the loss are fused by torch.compile; memory loops and products
    stay as they are. block: whole blocks in training, and the same parts elsewhere (data.documents=reset trains as
    dense). The first steps take a minute longer. Needs a C compiler on a GPU, a C++ compiler on a CPU."""
    cuda_graphs: bool = False
    """The passes of a micro-batch as one CUDA graph, which a host starts with one call, or under a pipeline as two for
    each of its chunks: small models wait for the host otherwise. Needs a GPU, precision bf16, and
    data.documents carry or doc."""
    loss_chunk: int | None = None
    """Tokens whose scores over the vocabulary are held at once in the loss and its gradient; 0: those of the whole
    micro-batch; null: by size, the whole up to 2^27 scores."""
    profile: list[int] | None = None
    """[first, last]: steps that rank 0 records with torch's profiler, into the run's folder profile/; a table of the
    time of every kind of module is printed. null: none."""
    eval_every: int = 0
    """Steps between evaluations on held-out data; 0: only before the first and after the last step."""
    eval_windows: int = 0
    """Held-out windows (sequences) of one evaluation, per source; 0: all."""
    eval_levels: bool = False
    """Evaluate once more for each level of model.cms.periods with that level switched off, `heldout_loss_without.cms0`
    and so on."""
    tasks: dict[str, str] = field(default_factory=dict)
    """Files of JSON lines that are scored at every evaluation, {NAME: FILE} (docs/evaluate.md): task.NAME.accuracy.
    Needs the tokenizer beside the data, and parallel.tensor and parallel.pipeline 1."""
    task_items: int = only_if("tasks", default=0)
    """Items of each task, from the first on; 0: all."""
    grad_clip: float = 1.0
    """Largest global gradient norm, larger ones are scaled down to it; 0: never."""
    max_skips: int = 10
    """Skipped steps (non-finite gradients, spikes) in a row after which the run ends with code 93."""
    spike_sigma: float = 0.0
    """Skip a step whose loss is more than this many standard deviations above the recent mean (try 6); 0: never."""
    spike_window: int = only_if("spike_sigma", default=64)
    """Number of recent accepted losses used for the mean and standard deviation. Spikes are detected only once the
    window is full."""

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_len

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, whichever way its length was given; 0 if it was not."""
        if self.steps is not None:
            return self.steps
        return (self.tokens or 0) // max(1, self.tokens_per_step)

    def seq_len_at(self, step: int) -> int:
        """Tokens per sequence in a step (counted from 1)."""
        begun = [stage.seq_len for stage in self.seq_len_stages if stage.from_step <= step]
        return begun[-1] if begun else self.seq_len

    def ends_before(self, step: int) -> dict[str, int]:
        """The ends, by key below `train`'s path, that lie before `step`: a run resumed from there would do nothing."""
        whole = "train.steps" if self.tokens is None else "train.tokens"
        ends = {whole: self.total_steps, "train.stop_after": self.stop_after or step}
        return {path: last for path, last in ends.items() if last < step}

    def problems(self, path: str = "train") -> Iterator[Problem]:
        ones = dict.fromkeys(("seq_len", "global_batch", "micro_batch", "max_skips"), 1)
        zeros = dict.fromkeys(("stop_after", "eval_every", "eval_windows", "task_items"), 0)
        yield from _at_least(self, path, ones | zeros)
        yield from self._budget_problems(path)
        if 1 <= self.total_steps < self.stop_after:
            given = "train.steps" if self.tokens is None else "that of train.tokens,"
            what = f"{self.stop_after} is after the last step, {given} {self.total_steps}"
            yield Problem(f"{path}.stop_after", what, f"1 to {self.total_steps}, or 0 for none")
        if not (math.isfinite(self.grad_clip) and self.grad_clip >= 0):
            yield Problem(f"{path}.grad_clip", f"{self.grad_clip} is not a norm", "1.0, or 0 to never clip")
        if not (math.isfinite(self.spike_sigma) and self.spike_sigma >= 0):
            yield Problem(
                f"{path}.spike_sigma", f"{self.spike_sigma} is not a number of deviations", "6, or 0 for never"
            )
        if self.spike_window < 2:
            yield Problem(f"{path}.spike_window", f"{self.spike_window} losses have no deviation", "64")
        if self.loss_chunk is not None and self.loss_chunk < 0:
            what = f"{self.loss_chunk} is no number of tokens"
            yield Problem(f"{path}.loss_chunk", what, "4096, 0 for the whole micro-batch, or null for a choice by size")
        yield from self._compile_problems(path)
        if self.cuda_graphs and self.precision != "bf16":
            what = "true, and train.precision fp32 leaves gradients where no graph can add to them"
            yield Problem(f"{path}.cuda_graphs", what, "false; or train.precision=bf16")
        yield from self._profile_problems(path)
        yield from self._stage_problems(f"{path}.seq_len_stages")

    def _compile_problems(self, path: str) -> Iterator[Problem]:
        if self.compile == "none":
            return
        if self.deterministic:
            what = "chooses kernels by their time, which need not repeat itself, and train.deterministic is true"
            yield Problem(f"{path}.compile", what, "none; or train.deterministic=false")
        if self.compile == "block" and self.recompute in ("memory", "mlp", "sublayer"):
            what = f"block makes one graph of a block, and train.recompute={self.recompute} computes a part of it again"
            yield Problem(f"{path}.compile", what, "dense; or train.recompute=none or block")
        lengths = len({stage.seq_len for stage in self.seq_len_stages})
        if lengths > SHAPES:
            what = f"compiles anew for every length, and train.seq_len_stages has {lengths}"
            yield Problem(f"{path}.compile", what, f"none; or at most {SHAPES} lengths")

    def _profile_problems(self, path: str) -> Iterator[Problem]:
        if self.profile is None:
            return
        if len(self.profile) != 2:
            yield Problem(f"{path}.profile", f"{self.profile} is not a first and a last step", "[11, 12], or null")
            return
        first, last = self.profile
        if not 1 <= first <= last <= self.total_steps:
            what = f"{self.profile} are no steps of a run with {self.total_steps} steps, in order"
            yield Problem(f"{path}.profile", what, f"1 <= first <= last <= {self.total_steps}; or null")

    def _budget_problems(self, path: str) -> Iterator[Problem]:
        if self.steps is None and self.tokens is None:
            what = "required, but neither train.steps nor train.tokens is given"
            yield Problem(f"{path}.steps", what, "train.steps=1000, or train.tokens=20_000_000")
        elif self.steps is not None and self.tokens is not None:
            what = f"{self.tokens:,} tokens and train.steps {self.steps:,} both say how long the run is"
            yield Problem(f"{path}.tokens", what, "train.steps=null, or leave train.tokens out")
        elif self.steps is not None:
            yield from _at_least(self, path, {"steps": 1})
        elif self.tokens is not None and min(self.global_batch, self.seq_len) >= 1:
            step = self.tokens_per_step
            if self.tokens < 1 or self.tokens % step:
                near = sorted({max(1, self.tokens // step) * step, max(1, -(-self.tokens // step)) * step})
                what = f"{self.tokens:,} tokens are no whole number of steps of {step:,} (global_batch x seq_len)"
                yield Problem(f"{path}.tokens", what, "nearest: " + " or ".join(map(str, near)))

    def _stage_problems(self, path: str) -> Iterator[Problem]:
        before = 0
        for number, stage in enumerate(self.seq_len_stages):
            if number == 0 and stage.from_step != 1:
                yield Problem(
                    f"{path}[0].from_step", f"{stage.from_step} leaves the steps before it without a length", "1"
                )
            elif stage.from_step <= before:
                what = f"{stage.from_step} is not after the stage before it, which begins at step {before}"
                yield Problem(f"{path}[{number}].from_step", what, f"{before + 1} or more")
            before = stage.from_step
            if stage.seq_len < 1 or self.seq_len % stage.seq_len:
                what = f"{stage.seq_len} does not divide train.seq_len {self.seq_len}, the window of the data"
                yield Problem(f"{path}[{number}].seq_len", what, _near_divisors(self.seq_len, stage.seq_len))


@dataclass(kw_only=True)
class CheckpointConfig:
    """When a run is saved, how many are kept, whether it resumes from the last."""

    every: int = 0
    """Steps between checkpoints; 0: only when the run stops."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0: none."""
    asynchronous: bool = True
    """Write in a thread while training continues, which waits only for the copy to host memory: its own share of the
    optimizer state once more on every rank. false: wait until it is on disk."""
    max_failures: int = 3
    """Failed saves in a row after which the run ends; before that it continues, with the checkpoints that it has."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the newest durable checkpoint of the run folder, if any; never: start from step 0."""
    on_change: dict[str, str] = only_if("resume", "auto", factory=dict)
    """What a resumed run does about keys that differ from its checkpoint: {optim.lr: override, train: keep, all: keep};
    keep: the checkpoint's value, override: this one. A run with unlisted differences is refused."""

    def problems(self, path: str = "checkpoint") -> Iterator[Problem]:
        yield from _at_least(self, path, {"every": 0, "keep": 1, "keep_every": 0, "max_failures": 1})
        for key, word in self.on_change.items():
            if word not in ("keep", "override"):
                yield Problem(f"{path}.on_change", f"{key}: {word!r} says neither", "keep, or override")


@dataclass(kw_only=True)
class LogConfig:
    """What is written while training."""

    every: int = 10
    """Steps between lines on the console and in metrics.jsonl."""
    tensorboard: bool = True
    """Write the same numbers for TensorBoard."""
    histograms: int = 0
    """Steps between TensorBoard histograms of the memories' eta and alpha gates; 0: never."""

    wandb: bool = False
    """Send the same numbers to Weights & Biases (the extra `wandb`; its own WANDB_* variables say where). Whatever
    happens to it, the run goes on."""

    def problems(self, path: str = "log") -> Iterator[Problem]:
        yield from _at_least(self, path, {"every": 1, "histograms": 0})
        if self.histograms > 0 and not self.tensorboard:
            what = f"histograms every {self.histograms} steps need TensorBoard, which is off"
            yield Problem(f"{path}.histograms", what, "log.tensorboard=true, or log.histograms=0")
