"""Submit, watch and repeat pretraining runs: `python -m launch {submit,local,status,logs,cancel,resume,...}`."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from configs.errors import ConfigError
from configs.schema import load, validate_without_data
from hope.arguments import count, finite, named, result_file, whole
from hope.pipe import piped
from hope.sections import Problem
from launch import collect, grid, local, preflight_cli, profile, speeds, status, submit, sweep
from launch.folder import RunFolder
from launch.placement import Request, split_overrides
from launch.slurm import NoRun, SlurmError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 refused with every problem listed, 1 SLURM failed."""
    parser = argparse.ArgumentParser(prog="python -m launch", description=__doc__)
    acts = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_submit, _local, _status, _logs, _cancel, _resume, _estimate, _compare, _preflight, _sweep, _collect):
        add(acts)
    args, rest = parser.parse_known_args(argv)  # overrides may stand behind options, which argparse does not take
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        return int(args.act(args))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except NoRun as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
    except SlurmError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 1


def _command(acts: Commands, name: str, text: str, act: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    parser = acts.add_parser(name, help=text, description=text)
    parser.register("type", None, named)  # of all that state no type: runs, configurations, grids, profiles, folders
    parser.set_defaults(act=act)
    return parser


def _configured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="section.key=value for the run, YAML files to merge, site.key=value for the profile",
    )


def _submit(acts: Commands) -> None:
    def act(args: argparse.Namespace) -> int:
        request = Request(args.config, tuple(args.overrides), args.profile, args.nodes, args.parity)
        print(submit.submit(request, dry_run=args.dry_run))
        return 0

    parser = _command(acts, "submit", "check a run, write its batch script, and queue it", act)
    _configured(parser)
    parser.add_argument("--nodes", type=count, default=1)
    parser.add_argument("--profile", required=True, help="name in launch/profiles/, or a YAML file")
    parser.add_argument("--dry-run", action="store_true", help="check, print the script, write and queue nothing")
    parser.add_argument("--parity", action="store_true", help="run the referee on this layout before training")


def _local(acts: Commands) -> None:
    def act(args: argparse.Namespace) -> int:
        return local.local(args.config, args.overrides, args.processes, dry_run=args.dry_run)

    parser = _command(acts, "local", "the same on this machine", act)
    _configured(parser)
    parser.add_argument("--processes", type=count, default=1, help="ranks; one per GPU")
    parser.add_argument("--dry-run", action="store_true", help="check, and print the command")


def _status(acts: Commands) -> None:
    def act(args: argparse.Namespace) -> int:
        print(status.status_table(status.find_runs(args.runs)))
        return 0

    parser = _command(acts, "status", "a table of runs: progress, tokens/s, restarts, last checkpoint, verdict", act)
    parser.add_argument("runs", nargs="*", default=["runs"], help="run folders, or folders of run folders")


def _logs(acts: Commands) -> None:
    def act(args: argparse.Namespace) -> int:
        run = RunFolder(args.run)
        print(status.last_lines(run, args.rank, args.lines), flush=True)
        if args.follow:
            with contextlib.suppress(KeyboardInterrupt):
                status.follow(status.log_file(run, args.rank))
        return 0

    parser = _command(acts, "logs", "the end of a run's newest log", act)
    parser.add_argument("run")
    parser.add_argument("--rank", type=whole(0), default=0)
    parser.add_argument("--lines", type=whole(0), default=20)
    parser.add_argument("--follow", action="store_true")


def _cancel(acts: Commands) -> None:
    def act(args: argparse.Namespace) -> int:
        print(status.cancel(RunFolder(args.run)))
        return 0

    _command(acts, "cancel", "end a run's job, and the chain with it", act).add_argument("run")


def _resume(acts: Commands) -> None:
    def act(args: argparse.Namespace) -> int:
        print(submit.resume(args.run))
        return 0

    parser = _command(acts, "resume", "queue an ended run again, from its newest checkpoint", act)
    parser.add_argument("run")


def _estimate(acts: Commands) -> None:
    def act(args: argparse.Namespace) -> int:
        from launch import against, estimate, scaling  # bring torch: 2 s that the other commands need not wait for

        own, sites = split_overrides(args.overrides)
        site = profile.load(args.profile, sites)
        config = load(args.config, own, check=False)
        validate_without_data(config, None, args.config)
        if wrong := list(_no_numbers(args)):
            raise ConfigError("estimate", wrong)
        tokens = args.tokens or config.train.total_steps * config.train.tokens_per_step
        say = lambda text: print(f"estimate: {text}", file=sys.stderr, flush=True)
        known = against.speeds_of(scaling.read(args.speeds), str(args.speeds)) if args.speeds else speeds.MEASURED
        print(estimate.describe(config, args.nodes * site.ranks_per_node, site, tokens, args.mfu, say, known))
        return 0

    parser = _command(acts, "estimate", "parameters, memory per rank, days for a token budget, layouts that fit", act)
    _configured(parser)
    parser.add_argument("--nodes", type=count, default=1)
    parser.add_argument("--profile", required=True, help="name in launch/profiles/, or a YAML file")
    parser.add_argument("--tokens", type=float, help="token budget; default: that of the run")
    parser.add_argument("--mfu", type=float, help="model FLOPs utilisation, 0 to 1; default: the nearest measured")
    parser.add_argument("--speeds", type=Path, help="measured ones: rows that `collect --json` wrote, of one GPU")


def _no_numbers(args: argparse.Namespace) -> Iterator[Problem]:
    if args.tokens is not None and not 1 <= args.tokens < math.inf:
        yield Problem("--tokens", f"{args.tokens:g} is no number of tokens", "3e9")
    if args.mfu is not None and not 0 < args.mfu <= 1:
        yield Problem("--mfu", f"{args.mfu:g} is no share of the peak", "0.3; or leave it out, for the measured one")


def _compare(acts: Commands) -> None:
    def act(args: argparse.Namespace) -> int:
        from launch import against, collectives, scaling  # bring torch

        rows = [row for path in args.rows for row in scaling.read(path)]
        found = against.compare(rows, collectives.Bus(inside=args.bus_gb_s))
        print(against.table(found))
        return 0

    parser = _command(acts, "compare", "estimated step times against measured ones, with the error of each", act)
    parser.add_argument("rows", type=Path, nargs="+", help="what `collect --json` or benchmarks/scale.py wrote")
    parser.add_argument(
        "--bus-gb-s", type=finite, default=profile.BUS_GB_S, help="all-reduce bus bandwidth of the host's GPUs"
    )


def _preflight(acts: Commands) -> None:
    def act(args: argparse.Namespace) -> int:
        return preflight_cli.check_site(args.profile, args.overrides, args.nodes, args.config)

    parser = _command(acts, "preflight", "check the nodes of an allocation or of a new one, in under a minute", act)
    parser.add_argument("overrides", nargs="*", help="site.key=value")
    parser.add_argument("--nodes", type=count, default=1)
    parser.add_argument("--profile", required=True, help="name in launch/profiles/, or a YAML file")
    parser.add_argument("--parity", dest="config", help="also run the referee on this configuration")


def _sweep(acts: Commands) -> None:
    def act(args: argparse.Namespace) -> int:
        return sweep.run(grid.load(args.grid), dry_run=args.dry_run, devices=args.devices)

    parser = _command(acts, "sweep", "a grid of runs: throttled, restartable, finished cells skipped", act)
    parser.add_argument("grid", help="YAML file, see launch/sweeps/")
    parser.add_argument("--dry-run", action="store_true", help="check and list the cells")
    _limited(parser)


def _collect(acts: Commands) -> None:
    def act(args: argparse.Namespace) -> int:
        return collect.collect(grid.load(args.grid), args.out, args.json, args.devices)

    parser = _command(acts, "collect", "a sweep's results as a table (CSV) and a scaling plot (SVG)", act)
    parser.add_argument("grid", help="YAML file, see launch/sweeps/")
    parser.add_argument("--out", help="folder; default: the sweep's folder of runs")
    parser.add_argument(
        "--json", type=result_file, help="also add a row per cell to this file; one of the same cell is replaced"
    )
    _limited(parser)


def _limited(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--devices",
        type=count,
        help="cells that need more are left out; default: with `where: local` this machine's GPUs, if it has any",
    )


if __name__ == "__main__":
    sys.exit(piped(main))
