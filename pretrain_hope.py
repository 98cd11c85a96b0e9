"""Pretrain a HOPE: `python pretrain_hope.py configs/quickstart.yaml [a.b=c ...] [--dry-run]`, or under torchrun, srun.

Read from top to bottom: load the configuration, check it, build, resume, train. hope/ says what is computed,
parallel/ where; this file is the only place where they meet. Exit codes: 0 done, 2 config or data error, 85 saved and
please requeue, 93 do not restart.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from configs.changes import settle
from configs.errors import ConfigError
from configs.schema import Config, load, to_yaml
from configs.used import recorded
from data_prep.errors import DataError
from data_prep.training.feed import Feed
from hope.train.diagnostics import MixerProbe
from hope.train.heartbeat import Heartbeat
from hope.train.metrics import NoLog, open_log
from hope.train.numerics import set_numerics
from hope.train.schedule import rate_at
from hope.train.signals import StopRequest
from hope.train.skips import SkipPolicy
from hope.train.stragglers import BusyTimer
from hope.train.throughput import Devices, StepTimer, memory_gb, mfu
from parallel.checkpoint.errors import CheckpointError, SaveError
from parallel.checkpoint.resume import check_data, start_from
from parallel.checkpoint.saving import Saver
from parallel.compute.evaluation import heldout_losses
from parallel.compute.pipeline import mean_loss
from parallel.compute.replica import build_replica
from parallel.layout import report
from parallel.layout.memory import StepShape
from parallel.start import groups, launcher
from parallel.start.errors import LaunchError

DONE, FAILURE, CONFIG_ERROR, REQUEUE, DO_NOT_RESTART = 0, 1, 2, 85, 93


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", help="section.key=value, or YAML files, the last one winning")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, and stop")
    parser.add_argument("--devices", type=int, metavar="N", help="with --dry-run: as if started on N devices")
    args = parser.parse_intermixed_args(argv)
    if args.devices is not None and (args.devices < 1 or not args.dry_run):
        parser.error(
            "--devices N, at least 1, goes with --dry-run; a run counts the processes that its launcher started"
        )
    beat = Heartbeat()
    try:
        launch = launcher.from_environment(os.environ)
        world_size = args.devices or launch.world_size
        config = load(args.config, args.overrides, world_size=world_size)
        if launch.rank == 0:
            config.model.warn_hazards()
            print(facts(config, world_size), flush=True)
        if args.dry_run:
            return DONE
        with StopRequest(usr1=True) as stop:
            beat("init")  # from here on signals are safe: the agent holds them back until the first beat
            with groups.start(config.parallel) as ranks:
                return Run(config, ranks, stop, beat).train()
    except (ConfigError, DataError, CheckpointError, LaunchError) as error:
        kinds = {DataError: "data error: ", CheckpointError: "checkpoint error: ", LaunchError: "launch error: "}
        kind = next((word for known, word in kinds.items() if isinstance(error, known)), "")
        print(f"{kind}{error}", file=sys.stderr, flush=True)
        return FAILURE if isinstance(error, SaveError) else CONFIG_ERROR


def facts(config: Config, world_size: int) -> str:
    dims = config.parallel.dims(world_size)
    shape = StepShape.of(config.train, config.parallel, dims)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return report.describe(config.model, dims, shape, config.train.global_batch, config.optim, device)


class Run:
    """One process's part of a run: everything built, then `train`."""

    def __init__(self, config: Config, ranks: groups.Ranks, stop: StopRequest, beat: Heartbeat) -> None:
        self.ranks, self.stop, self.beat = ranks, stop, beat
        self.folder = Path(config.run.dir) / config.run.name
        # 1. where it stands: a checkpoint has a say in the configuration
        checkpointer, self.resumed, self.notes = start_from(self.folder / "checkpoints", config.checkpoint, ranks)
        if self.resumed:
            config, changes = settle(config, self.resumed.manifest.extra["config"], ranks.world_size)
            self.notes += changes
        self.config = config
        set_numerics(config.train)
        # 2. this rank's part of the model, and its optimizer
        train = config.train
        self.replica = build_replica(
            config.model,
            config.optim,
            config.parallel,
            ranks,
            seq_len=train.seq_len,
            precision=train.precision,
            seed=config.run.seed,
            recompute=train.recompute,
            tokens_per_step=train.tokens_per_step,
        )
        self.optimizer = self.replica.optimizer
        self.probe = MixerProbe(self.replica.models)
        self.busy = BusyTimer(ranks.rank, ranks.device)
        self.flops = report.model_flops(config.model)
        # 3. the data
        self.feed = Feed(config.data, train, ranks.dp_rank, ranks.dp_size)
        # 4. go on
        self.step, self.norms = 0, dict[str, float]()  # norms: of each parameter group when it was last due
        self.skips = SkipPolicy(train.max_skips, train.spike_sigma, train.spike_window)
        if self.resumed:
            check_data(self.resumed, self.feed.order(), self.feed.next_batch)
            self.notes += checkpointer.load(self.resumed, self.replica.models, self.optimizer)
            self.step = self.resumed.manifest.step
            self.skips.restore(self.resumed.manifest.extra["skips"])
        models = self.replica.models
        self.saver = Saver(self.folder, config.checkpoint, checkpointer, ranks, models, self.optimizer, self._contents)

    def train(self) -> int:
        """Run to the last step, `train.stop_after`, or a signal."""
        config, ranks = self.config, self.ranks
        devices = Devices.of(ranks.device, ranks.world_size)
        last = min(config.train.stop_after or config.train.steps, config.train.steps)
        with ExitStack() as stack:
            stack.callback(self.feed.close)
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
            stack.callback(self.saver.close, log)
            self._announce(log)
            self.timer = StepTimer(config.train.tokens_per_step, devices)
            if self.step == 0:
                log.scalars({**self._empty_record(), **self.evaluate()})
            wishes = self.saver.wishes(self.stop.requested)
            while self.step < last and not wishes.signal:
                self._one_step(log, last, devices)
                if self.skips.stop:
                    log.event("STOP", step=self.step, reason=self.skips.stop, in_a_row=self.skips.in_a_row)
                    return DO_NOT_RESTART
                wishes = self.saver.wishes(self.stop.requested)
                self.beat("save")
                self.saver.after_step(self.step, self.step == last, wishes, log)
                if wishes.stop and not wishes.signal:
                    log.event("STOP", step=self.step, reason="the file STOP in the run folder")
                    return DONE
            if wishes.signal:
                log.event("SIGNAL", name=self.stop.name or "on another rank", agreed_step=self.step)
                # SIGINT is a person who wants to stop; the others come from a scheduler that can start us again
                return REQUEUE if groups.any_rank(self.stop.name in ("TERM", "USR1")) else DONE
            self.beat("exit")
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
        self.busy.begin()
        self.beat("data", step)
        batches = [batch.to(self.ranks.device) for batch in self.feed.batches(step)]
        self.timer.got_data()
        reports = self.replica.run(batches, phase=self.beat)
        self.busy.end()
        self.beat("optimizer")
        self.replica.reduce()
        norms = self.optimizer.grad_norms()
        total = math.sqrt(sum(n * n for n in norms.values()))
        rate, loss = rate_at(step, config.optim, config.train.steps), None
        if logged or evaluated or self.skips.needs_loss:
            loss = groups.loss_on_all_ranks(mean_loss(reports, self.ranks.device), self.ranks).item()
        self.norms |= {name: norm for name, norm in norms.items() if norm}  # a level that is not due has 0
        skip = self.skips.judge(total, loss)
        if skip is None:
            clip = config.train.grad_clip
            self.optimizer.set_lr(rate)
            self.optimizer.watch(logged)
            self.optimizer.step(min(1.0, clip / (total + 1e-6)) if clip else 1.0)
        else:  # no weight, moment or level clock moves; the data position does
            param = {} if math.isfinite(total) else {"param": self.optimizer.first_nonfinite()}
            log.event("SKIP", step=step, **skip, **param)
            self.optimizer.discard()
        self.timer.end()
        self.step = step
        if drawn:
            for name, values in self.probe.histograms():
                log.histogram(name, values, step)
        if loss is not None and (logged or evaluated):
            record = self._record(loss, total, rate, devices)
            for slow in self.busy.take_slow(record, config.launch.slow):
                log.event("SLOW", step=step, **slow)
            self.probe.arm(False)
            log.scalars({**record, **self.evaluate()} if evaluated else record)

    def _record(self, loss: float, grad_norm: float, rate: float, devices: Devices) -> dict[str, Any]:
        speed = self.timer.report()
        flops = self.flops(self.config.train.seq_len_at(self.step)).training
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
            "reduced_bytes": self.optimizer.reduced_bytes,
            **{f"grad_norm.{name}": norm for name, norm in self.norms.items()},
            **self.optimizer.statistics(),
            **groups.merged({**self.probe.scalars(), **self.busy.entry()}),
        }

    def _empty_record(self) -> dict[str, Any]:
        keys = ("loss", "grad_norm", "lr", "step_time_s", "data_time_s", "tokens_per_s", "tokens_per_s_per_device")
        return {"step": 0, "tokens": 0, **dict.fromkeys((*keys, "mfu", "memory_gb"))}

    def evaluate(self) -> dict[str, float]:
        """Held-out losses in nats, of every source and of the blend; nothing if asked to stop."""
        losses = heldout_losses(self.replica, self.feed.heldout(), self.beat, lambda: self.stop.requested)
        return {} if losses is None else self.feed.summary(losses)

    def _announce(self, log: NoLog) -> None:
        if self.ranks.rank == 0:
            (self.folder / "logs").mkdir(exist_ok=True)
            (self.folder / "config.yaml").write_text(to_yaml(self.config))
            (self.folder / "env.txt").write_text(report.environment(self.ranks.device))
        for note in self.notes:
            log.say(f"RESUME note: {note}")
        if self.resumed:
            noted = {"notes": self.notes} if self.notes else {}
            log.event("RESUME", step=self.step, checkpoint=self.resumed.path, **noted)
        log.say(self.feed.describe())

    def _contents(self, step: int) -> dict[str, Any]:
        """What a checkpoint records beside the tensors and clocks."""
        optim, train = self.config.optim, self.config.train
        return {
            **self.feed.position(step),
            "tokens": step * train.tokens_per_step,
            "schedule": {"step": step, "of": train.steps, "lr": rate_at(step, optim, train.steps)},
            "skips": self.skips.state(),
            "config": recorded(self.config),
        }


if __name__ == "__main__":
    sys.exit(main())
