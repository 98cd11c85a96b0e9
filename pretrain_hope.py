"""Pretrain a HOPE: `python pretrain_hope.py configs/quickstart.yaml [a.b=c ...] [--dry-run]`, or under torchrun, srun.

Read from top to bottom: load the configuration, check it, build, resume, train. hope/ says what is computed,
parallel/ where; this file is the only place where they meet. Exit codes: 0 done, 2 config or data error, 85 saved and
please requeue, 93 do not restart.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.changes import settle
from configs.errors import ConfigError
from configs.schema import Config, load, to_yaml, validate_without_data
from configs.used import recorded
from data_prep.training.feed import Feed
from data_prep.training.phase_order import phases_of
from hope.train.console import print_line
from hope.train.continual import Course
from hope.train.heartbeat import Heartbeat
from hope.train.instruments import Instruments, Taken
from hope.train.metrics import NoLog, open_log, record_of_no_step
from hope.train.numerics import set_numerics
from hope.train.schedule import rate_at
from hope.train.signals import StopRequest
from hope.train.sink import Background
from hope.train.skips import SkipPolicy
from launch.arguments import arguments
from launch.outlook import facts, outlook, tasks_of
from launch.tracker import wandb_sink
from parallel.checkpoint.carried import Stream
from parallel.checkpoint.resume import check_data, check_end, new_start, start_from
from parallel.checkpoint.saving import Saver
from parallel.compute.evaluation import heldout_losses, task_scores, without_levels
from parallel.compute.pipeline import Report, mean_loss
from parallel.compute.replica import build_replica
from parallel.exits import DO_NOT_RESTART, DONE, EXPLAINED, REQUEUE, refused
from parallel.layout import report
from parallel.start import groups, launcher
from parallel.start.meeting import of_run
from parallel.start.owner import hold_for_all


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv, __doc__)
    beat, launch, met = Heartbeat(), None, False
    try:
        launch = launcher.from_environment(os.environ)
        world_size = args.devices or launch.world_size
        planned = args.devices is not None  # the data may be where these devices are
        config = load(args.config, args.overrides, world_size=world_size, check=not planned)
        missing = validate_without_data(config, world_size, args.config) if planned else []
        folder = Path(config.run.dir) / config.run.name
        foreseen = outlook(config, folder, world_size, data=not missing, here=not planned) if args.dry_run else []
        if launch.rank == 0:
            config.model.warn_hazards()
            print_line("\n".join([facts(config, world_size), *foreseen]))
            for problem in missing:
                print_line(f"not checked {problem.path}: {problem.what}")
        if args.dry_run:
            return DONE
        with StopRequest(usr1=True) as stop:
            beat("init")  # from here on signals are safe: the agent holds them back until the first beat
            with (
                groups.start(config.parallel, who=of_run(folder, config)) as ranks,
                hold_for_all(folder, ranks, lambda: beat("init")) as check_owner,
            ):
                met = True  # what a Run refuses, it refuses on every rank
                return Run(config, ranks, stop, beat).train(check_owner)
    except EXPLAINED as error:
        return refused(error, launch, met)


class Run:
    """One process's part of a run: everything built, then `train`."""

    def __init__(self, config: Config, ranks: groups.Ranks, stop: StopRequest, beat: Heartbeat) -> None:
        self.ranks, self.stop = ranks, stop
        self.folder = Path(config.run.dir) / config.run.name
        # 1. where it stands: a checkpoint has a say in the configuration
        checkpointer, self.resumed, self.notes = start_from(self.folder / "checkpoints", config.checkpoint, ranks)
        if self.resumed:
            record, at = self.resumed.manifest.extra["config"], self.resumed.manifest.step
            config, changes = settle(config, record, ranks.world_size, at)
            self.notes += changes
            check_end(self.resumed, config.train)
        start, problems = (
            (None, []) if self.resumed else new_start(config.model, asdict(config.data), checkpointer, ranks)
        )
        if problems:
            raise ConfigError("against model.init", problems)
        self.origin = start.record() if start else self.resumed and self.resumed.manifest.extra.get("origin")
        self.config = config
        set_numerics(config.train)
        # 2. this rank's part of the model, and its optimizer
        train = config.train
        self.replica = build_replica(
            config.model, config.optim, config.parallel, ranks, seq_len=train.seq_len, precision=train.precision,
            seed=config.run.seed, recompute=train.recompute, tokens_per_step=train.tokens_per_step,
            loss_chunk=train.loss_chunk, compile=train.compile, cuda_graphs=train.cuda_graphs, start=start,
            carry=config.data.documents == "stream",
        )  # fmt: skip
        self.optimizer = self.replica.optimizer
        carried, sizes = self.replica.carried, (train.global_batch, train.micro_batch, train.seq_len)
        stream = Stream(carried, *sizes, config.parallel.sequence) if carried else None
        self.flops = report.model_flops(config.model)
        models = self.replica.models
        rank, world_size, device = ranks.rank, ranks.world_size, ranks.device
        self.course = Course(phases_of(config.data, train))
        borders = self.course.borders
        self.instruments = Instruments(beat, train, config.log, models, rank, world_size, device, self.folder, borders)
        # 3. the data
        self.feed = Feed(config.data, train, ranks.dp_rank, ranks.dp_size)
        self.tasks = tasks_of(config)
        # 4. go on
        self.step, self.norms = 0, dict[str, float]()  # norms: of each parameter group when it was last due
        self.skips = SkipPolicy(train.max_skips, train.spike_sigma, train.spike_window)
        if self.resumed:
            check_data(self.resumed, self.feed.order(), self.feed.next_batch)
            self.notes += checkpointer.load(self.resumed, models, self.optimizer, stream)
            self.step = self.resumed.manifest.step
            self.skips.restore(self.resumed.manifest.extra["skips"])
            self.course.restore(self.resumed.manifest.extra.get("course", []))
        self.saver = Saver(
            self.folder, config.checkpoint, checkpointer, ranks, models, self.optimizer, self._contents, stream
        )

    def train(self, check_owner: Callable[[], None] = lambda: None) -> int:
        """Run to the last step, `train.stop_after`, or a signal. `check_owner` raises if the folder is lost."""
        config, beat = self.config, self.instruments.beat
        last = min(config.train.stop_after or config.train.total_steps, config.train.total_steps)
        with ExitStack() as stack:
            stack.callback(self.replica.close)  # last, and before the groups go: NCCL waits for graphs that use them
            stack.callback(self.feed.close)
            log = stack.enter_context(open_log(
                self.ranks.rank == 0, self.folder, steps=config.train.total_steps, devices=self.instruments.devices,
                resume_step=self.step if self.resumed else None, tensorboard=config.log.tensorboard,
                sink=self._tracker if config.log.wandb else None,
            ))  # fmt: skip
            stack.callback(self.saver.close, log)
            stack.callback(self.instruments.close, log.say)
            self._announce(log)
            if self.step == 0:
                log.scalars({**record_of_no_step(), **self.evaluate()})
            elif self.course.lacks(self.step) and self.evaluate():
                log.event("PHASE", step=self.step, **self.course.ended(self.step))
            wishes = self.saver.wishes(self.stop.requested)
            while self.step < last and not wishes.signal:
                self._one_step(log, last)
                if self.skips.stop:
                    return self._give_up(log, self.skips.stop)
                check_owner()
                wishes = self.saver.wishes(self.stop.requested)
                beat("save")
                self.saver.after_step(self.step, self.step == last, wishes, log)
                if wishes.stop and not wishes.signal:
                    log.event("STOP", step=self.step, reason="the file STOP in the run folder")
                    break
            if wishes.signal:
                log.event("SIGNAL", name=self.stop.name or "on another rank", agreed_step=self.step)
                # SIGINT is a person who wants to stop; the others come from a scheduler that can start us again
                if groups.any_rank(self.stop.name in ("TERM", "USR1")):
                    return REQUEUE
            beat("exit")
            if self.skips.doubt:
                return self._give_up(log, self.skips.doubt)
            log.say(f"done at step {self.step}: {self.folder}")
        return DONE

    def _give_up(self, log: NoLog, reason: str) -> int:
        """Say which checkpoint to resume from; a restart as it is would come to the same."""
        skips, last_good = self.skips.in_a_row, self.saver.last_good(log)
        log.event("STOP", step=self.step, reason=reason, in_a_row=skips, last_good=last_good)
        return DO_NOT_RESTART

    def _one_step(self, log: NoLog, last: int) -> None:
        """Forward, backward, reduce, and either update or skip; then whatever this step logs."""
        step, train = self.step + 1, self.config.train
        with self.instruments.step(step, last) as taken:
            batches = [batch.to(self.ranks.device) for batch in self.feed.batches(step)]
            with self.instruments.passes() as phase:
                reports = self.replica.run(batches, phase=phase)
            self.replica.reduce()
            norms = self.optimizer.grad_norms()
            total = math.sqrt(sum(n * n for n in norms.values()))
            rate = rate_at(step, self.config.optim, train.total_steps)
            loss = self._loss(reports) if taken.line or self.skips.needs_loss else None
            skip = self.skips.judge(total, loss)
            if skip is None:
                self.optimizer.set_lr(rate)
                within = lambda group: self.instruments.logged_within(step, group["period"], last)
                self.optimizer.watch(within)  # a slow level's last update before each line
                self.optimizer.step(min(1.0, train.grad_clip / (total + 1e-6)) if train.grad_clip else 1.0)
            else:  # no weight, moment, level clock or carried state moves; the data position does
                param = {} if math.isfinite(total) else {"param": self.optimizer.first_nonfinite()}
                log.event("SKIP", step=step, **skip, **param)
                self.optimizer.discard()
            if self.replica.carried:
                self.replica.carried.keep(skip is None)
        self.step = step
        self.norms |= {name: norm for name, norm in norms.items() if norm}  # a level that is not due has 0
        self._log(log, taken, {"loss": loss, "grad_norm": total, "lr": rate})

    def _loss(self, reports: list[Report]) -> float:
        """Mean loss of the global batch in nats, the same on every rank. Collective."""
        return groups.loss_on_all_ranks(mean_loss(reports, self.ranks.device), self.ranks).item()

    def _log(self, log: NoLog, taken: Taken, numbers: dict[str, float | None]) -> None:
        """The records of the step that has just ended."""
        self.instruments.tell(log.say)
        if taken.drawn:
            for name, values in self.instruments.probe.histograms():
                log.histogram(name, values, self.step)
        if taken.line:
            record = self._record(numbers)
            for slow in self.instruments.take_slow(record, self.config.launch.slow):
                log.event("SLOW", step=self.step, **slow)
            log.scalars({**record, **self.evaluate()} if taken.evaluated else record)
            if ended := self.course.ended(self.step):
                log.event("PHASE", step=self.step, **ended)

    def _record(self, numbers: dict[str, float | None]) -> dict[str, Any]:
        train = self.config.train
        return {
            "step": self.step,
            "tokens": self.step * train.tokens_per_step,
            **numbers,
            **self.instruments.speed(self.step, self.flops(train.seq_len_at(self.step)).training),
            "reduced_bytes": self.optimizer.reduced_bytes,
            **{f"grad_norm.{name}": norm for name, norm in self.norms.items()},
            **self.optimizer.statistics(),
            **groups.merged(self.instruments.readings()),
        }

    def evaluate(self) -> dict[str, float]:
        """Held-out losses in nats, of every source and of the blend, and tasks; nothing if asked to stop."""
        self.instruments.probe.arm(False)
        beat, stop = self.instruments.beat, lambda: self.stop.requested
        take = lambda: heldout_losses(self.replica, self.feed.heldout(), beat, stop)
        losses = take()
        if losses is None:
            return {}
        train, documents = self.config.train, self.config.data.documents
        batch = train.micro_batch * train.seq_len
        models, levels = self.replica.models, len(self.config.model.periods) if train.eval_levels else 0
        scores = task_scores(self.replica, self.tasks, documents, batch, beat, stop)
        noted = self.course.note(self.step, self.feed.summary(losses))
        return noted | without_levels(models, levels, take, self.feed.summary) | scores

    def _tracker(self) -> Background:
        return wandb_sink(self.folder, recorded(self.config), resumed=bool(self.resumed), say=print_line)

    def _announce(self, log: NoLog) -> None:
        log.text("config.yaml", to_yaml(self.config))
        log.text("env.txt", report.environment(self.ranks.device))
        for note in self.notes:
            log.say(f"RESUME note: {note}")
        if self.resumed:
            noted = {"notes": self.notes} if self.notes else {}
            log.event("RESUME", step=self.step, checkpoint=self.resumed.path, **noted)
        elif self.origin:
            log.event("INIT", **self.origin)
        log.say(self.feed.describe())

    def _contents(self, step: int) -> dict[str, Any]:
        """What a checkpoint records beside the tensors and clocks."""
        optim, train = self.config.optim, self.config.train
        return {
            **self.feed.position(step),
            "tokens": step * train.tokens_per_step,
            "schedule": {"step": step, "of": train.total_steps, "lr": rate_at(step, optim, train.total_steps)},
            "skips": self.skips.state(),
            "doubt": self.skips.doubt,
            "course": self.course.state(),
            "config": recorded(self.config),
            **({"origin": self.origin} if self.origin else {}),
        }


if __name__ == "__main__":
    sys.exit(main())
