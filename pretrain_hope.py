"""Pretrain a HOPE: `python pretrain_hope.py configs/quickstart.yaml [a.b=c ...] [--dry-run]`, or under torchrun, srun.

Read from top to bottom: load the configuration, check it, build, resume, train. hope/ says what is computed,
parallel/ where; this file is the only place where they meet. Exit codes: 0 done, 2 config or data error, 85 saved and
please requeue, 93 do not restart.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError
from configs.schema import Config, load, to_yaml
from data_prep.errors import DataError
from data_prep.reading import Batch, BatchLoader, HeldoutSet, TrainingSet, heldout_batches
from hope.model import Model, next_token_loss
from hope.optim.dmgd import Dmgd
from hope.optim.levels import parameter_groups
from hope.train.diagnostics import MemoryProbe
from hope.train.evaluate import heldout_loss
from hope.train.metrics import NoLog, open_log
from hope.train.schedule import learning_rate
from hope.train.signals import StopRequest
from hope.train.throughput import Devices, StepTimer, memory_gb, mfu
from parallel import groups, launcher, report
from parallel.errors import CheckpointError, LaunchError
from parallel.pipeline import Stage, forward_backward
from parallel.resume import refuse_to_mix, resume_run, save_run
from parallel.zero import ShardedOptimizer

DONE, CONFIG_ERROR, REQUEUE, DO_NOT_RESTART = 0, 2, 85, 93


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, and stop")
    args = parser.parse_intermixed_args(argv)
    try:
        launch = launcher.from_environment(os.environ)
        config = load(args.config, args.overrides, world_size=launch.world_size)
        if launch.rank == 0:
            config.model.warn_hazards()
            print(facts(config, launch.world_size), flush=True)
        if args.dry_run:
            return DONE
        with groups.start(config.parallel) as ranks:
            return Run(config, ranks).train()
    except (ConfigError, DataError, CheckpointError, LaunchError) as error:
        kind = {DataError: "data error: ", CheckpointError: "checkpoint error: ", LaunchError: "launch error: "}
        print(f"{kind.get(type(error), '')}{error}", file=sys.stderr, flush=True)
        return CONFIG_ERROR


def facts(config: Config, world_size: int) -> str:
    return report.describe(
        config.model,
        config.parallel.dims(world_size),
        seq_len=config.train.seq_len,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        bf16=config.train.precision == "bf16",
        adam=config.optim.preconditioner == "adam",
    )


def loss_of(model: Model, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits, _ = model(batch.tokens_TB, starts=batch.starts_TB)
    loss = next_token_loss(logits, batch.targets_TB)
    return loss, {"loss": loss}


class Run:
    """One process's part of a run: everything built, then `train`."""

    def __init__(self, config: Config, ranks: groups.Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.folder = Path(config.run.dir) / config.run.name
        if config.train.precision == "bf16":
            torch.set_float32_matmul_precision("high")  # fp32 memory states through tf32 products
        # 1. the model and its optimizer
        self.model = Model(config.model).initialise(config.run.seed).to(ranks.device)
        self.stage = Stage(self.model, config.train.precision)
        inner = Dmgd(parameter_groups(self.model, config.optim.weight_decay), config.optim)
        self.optimizer = ShardedOptimizer(self.model, inner, config.train.precision, ranks, config.parallel.zero)
        self.probe = MemoryProbe(self.model)
        # 2. the data
        data, train = config.data, config.train
        self.training = TrainingSet(data.train, train.seq_len, data.seed, data.cache)
        self.heldout = HeldoutSet(data.heldout, train.seq_len)
        self.heldout_windows = self._heldout_windows()
        sizes = (train.global_batch, train.micro_batch, ranks.dp_rank, ranks.dp_size)
        self.loader = BatchLoader(self.training, *sizes, documents=data.documents)
        # 3. where it stands
        self.checkpoints = self.folder / "checkpoints"
        self.resumed = None
        if config.checkpoint.resume == "never":
            refuse_to_mix(self.checkpoints)
        else:
            self.resumed = resume_run(
                self.checkpoints, ranks, self.model, self.optimizer, self._order(), self._next_batch
            )
        self.step = self.resumed.step if self.resumed else 0
        self.skips = self.resumed.extra["skips"] if self.resumed else 0

    def train(self) -> int:
        """Run to the last step, `train.stop_after`, or a signal."""
        config, ranks = self.config, self.ranks
        devices = Devices.of(ranks.device, ranks.world_size)
        last = min(config.train.stop_after or config.train.steps, config.train.steps)
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest(usr1=True))
            stack.callback(self.loader.close)
            log = stack.enter_context(
                open_log(
                    ranks.rank == 0,
                    self.folder,
                    steps=config.train.steps,
                    devices=devices,
                    resume_step=self.step if self.resumed else None,
                    tensorboard=config.log.tensorboard,
                )
            )
            self._announce(log)
            self.timer = StepTimer(config.train.tokens_per_step, devices)
            if self.step == 0:
                log.scalars({**self._empty_record(), "heldout_loss": self.evaluate()})
            while self.step < last:
                self._one_step(log, last, devices)
                if self.skips >= config.train.max_skips:
                    log.event("STOP", step=self.step, reason="nonfinite_gradients", in_a_row=self.skips)
                    return DO_NOT_RESTART
                stopping = groups.any_rank(stop.requested)
                due = config.checkpoint.every > 0 and self.step % config.checkpoint.every == 0
                if stopping or due or self.step == last:
                    self._save(log)
                if stopping:
                    log.event("SIGNAL", name=stop.name or "on another rank", agreed_step=self.step)
                    # SIGINT is a person who wants to stop; the others come from a scheduler that can start us again
                    return REQUEUE if groups.any_rank(stop.name in ("TERM", "USR1")) else DONE
            log.say(f"done at step {self.step}: {self.folder}")
        return DONE

    def _one_step(self, log: NoLog, last: int, devices: Devices) -> None:
        """Forward, backward, reduce, and either update or skip; then whatever this step logs."""
        config, step = self.config, self.step + 1
        logged = step % config.log.every == 0 or step in (1, last)
        evaluated = step == last or (config.train.eval_every > 0 and step % config.train.eval_every == 0)
        drawn = config.log.histograms > 0 and step % config.log.histograms == 0
        self.probe.arm(logged or drawn)
        self.timer.begin()
        batches = [batch.to(self.ranks.device) for batch in self.loader.batches(self.step * config.train.global_batch)]
        self.timer.got_data()
        reports = forward_backward(self.stage, batches, loss_of)
        self.optimizer.reduce()
        norms = self.optimizer.grad_norms()
        total = math.sqrt(sum(n * n for n in norms.values()))
        rate = self._rate(step)
        if math.isfinite(total):
            clip = config.train.grad_clip
            self.optimizer.set_lr(rate)
            self.optimizer.step(min(1.0, clip / (total + 1e-6)) if clip else 1.0)
            self.skips = 0
        else:  # no weight, moment or level clock moves; the data position does
            self.skips += 1
            log.event("SKIP", step=step, reason="nonfinite_gradient", param=self.optimizer.first_nonfinite())
            self.optimizer.discard()
        self.timer.end()
        self.step = step
        if drawn:
            for name, values in self.probe.histograms():
                log.histogram(name, values, step)
        if logged or evaluated:
            loss = groups.mean_over_data(torch.stack([r["loss"] for r in reports]).mean()).item()
            record = self._record(loss, total, rate, norms, devices)
            self.probe.arm(False)
            log.scalars({**record, "heldout_loss": self.evaluate()} if evaluated else record)

    def _rate(self, step: int) -> float:
        optim = self.config.optim
        return learning_rate(
            step,
            peak=optim.lr,
            warmup=optim.warmup,
            steps=self.config.train.steps,
            decay=optim.decay,
            final=optim.final_lr,
        )

    def _record(
        self, loss: float, grad_norm: float, rate: float, norms: dict[str, float], devices: Devices
    ) -> dict[str, Any]:
        speed = self.timer.report()
        flops = self.model.flops(self.config.train.seq_len).training
        return {
            "step": self.step,
            "tokens": self.step * self.config.train.tokens_per_step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": rate,
            **speed,
            "mfu": mfu(speed["tokens_per_s"], flops, devices),
            "memory_gb": memory_gb(self.ranks.device),
            "eta_s": self.timer.eta_s(self.config.train.steps - self.step),
            **{f"grad_norm.{name}": norm for name, norm in norms.items()},
            **self.probe.scalars(),
        }

    def _empty_record(self) -> dict[str, Any]:
        keys = ("loss", "grad_norm", "lr", "step_time_s", "data_time_s", "tokens_per_s", "tokens_per_s_per_device")
        return {"step": 0, "tokens": 0, **dict.fromkeys((*keys, "mfu", "memory_gb"))}

    def evaluate(self) -> float:
        """Mean loss in nats over the held-out windows."""
        micro, ranks = self.config.train.micro_batch, self.ranks
        documents = self.config.data.documents
        batches = heldout_batches(self.heldout, self.heldout_windows, micro, ranks.dp_rank, ranks.dp_size, documents)
        forward = lambda batch: forward_backward(self.stage, [batch.to(ranks.device)], loss_of, forward_only=True)[0]
        return heldout_loss(batches, forward, groups.mean_over_data)

    def _heldout_windows(self) -> int:
        """The configured number, or as many as divide evenly over ranks and micro-batches."""
        unit = self.config.train.micro_batch * self.ranks.dp_size
        wanted = self.config.train.eval_windows or len(self.heldout)
        windows = min(wanted, len(self.heldout)) // unit * unit
        if windows == 0:
            need = f"micro_batch x data-parallel ranks = {unit} windows at least"
            what = f"{wanted} is too few: {need}, and the held-out set has {len(self.heldout)}"
            raise ConfigError("config", [("train.eval_windows", what, "a smaller train.micro_batch")])
        return windows

    def _announce(self, log: NoLog) -> None:
        if self.ranks.rank == 0:
            (self.folder / "logs").mkdir(exist_ok=True)
            (self.folder / "config.yaml").write_text(to_yaml(self.config))
            (self.folder / "env.txt").write_text(report.environment(self.ranks.device))
        if self.resumed:
            for note in self.resumed.notes:
                log.say(f"RESUME note: {note}")
            log.event("RESUME", step=self.step, checkpoint=self.resumed.path)
        held_out = f"{self.heldout_windows} of {len(self.heldout)} held-out windows per evaluation"
        log.say(f"{len(self.training):,} training windows per epoch, {held_out}")

    def _save(self, log: NoLog) -> None:
        began = time.perf_counter()
        extra = {
            "order": self._order(),
            "next_batch": self._next_batch(self.step),
            "model": dataclasses.asdict(self.config.model),
            "skips": self.skips,
        }
        keep = self.config.checkpoint.keep
        size = save_run(self.checkpoints, self.step, self.ranks, self.model, self.optimizer, extra, keep)
        log.event("SAVE", step=self.step, total_s=time.perf_counter() - began, bytes=size)

    def _next_batch(self, step: int) -> str:
        """Hash of the token ids of the global batch after `step`."""
        batch = self.config.train.global_batch
        return self.training.fingerprint(step * batch, batch)

    def _order(self) -> dict[str, Any]:
        """What decides which tokens come next; a resumed run must agree."""
        train, data = self.config.train, self.config.data
        return {
            "train.seq_len": train.seq_len,
            "train.global_batch": train.global_batch,
            "data.seed": data.seed,
            "data.train": self.training.fingerprint_of_data,
        }


if __name__ == "__main__":
    sys.exit(main())
