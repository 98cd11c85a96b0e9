"""Where the time of a training step goes: by kind of module, and as a Chrome trace.

    python benchmarks/profile.py configs/hope_340m.yaml [section.key=value ...] --out profile

Random tokens, through the code that a run uses (no data files are read): `--warm` steps, then `--steps` recorded ones.
In a run of one's own `train.profile=[first, last]` does the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "profile":  # Python's own module of that name, which cProfile wants where this folder comes first
    import importlib.util
    import sysconfig

    own = importlib.util.spec_from_file_location("profile", Path(sysconfig.get_path("stdlib")) / "profile.py")
    assert own is not None
    assert own.loader is not None
    sys.modules["profile"] = importlib.util.module_from_spec(own)
    own.loader.exec_module(sys.modules["profile"])
else:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(argv: list[str] | None = None) -> int:
    import argparse

    import torch

    from configs.schema import load
    from hope.arguments import whole
    from hope.batch import Batch
    from hope.train.numerics import set_numerics
    from hope.train.profiler import StepProfiler
    from parallel.compute.replica import build_replica
    from parallel.referee.evidence import micro_batches
    from parallel.start import groups

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--warm", type=whole(0), default=3, help="steps before")
    parser.add_argument("--steps", type=whole(), default=2, help="recorded steps")
    parser.add_argument("--out", type=Path, default=Path("profile"), help="folder of the trace")
    args = parser.parse_intermixed_args(argv)
    config = load(args.config, args.overrides, check=False)
    train = config.train
    set_numerics(train)
    with groups.start(config.parallel) as ranks:
        replica = build_replica(
            config.model, config.optim, config.parallel, ranks, seq_len=train.seq_len, precision=train.precision,
            seed=config.run.seed, recompute=train.recompute, tokens_per_step=train.tokens_per_step,
            loss_chunk=train.loss_chunk, compile=train.compile, cuda_graphs=train.cuda_graphs,
        )  # fmt: skip
        tokens = torch.randint(0, config.model.vocab_size, (train.seq_len + 1, train.global_batch))
        mine = micro_batches(Batch(tokens[:-1], tokens[1:], None), train.micro_batch, ranks)
        first, last = args.warm + 1, args.warm + args.steps
        profiler = StepProfiler([first, last], replica.models, args.out, ranks.device, keeps=ranks.rank == 0)
        for step in range(1, last + 1):
            with profiler.step(step):
                replica.run(mine)
                replica.reduce()
                norm = sum(n * n for n in replica.optimizer.grad_norms().values()) ** 0.5
                replica.optimizer.set_lr(1e-4)
                replica.optimizer.step(min(1.0, 1 / (norm + 1e-6)))
        for text in profiler.told():
            print(text, flush=True)
        replica.close()
    return 0


if __name__ == "__main__":
    from hope.pipe import piped

    sys.exit(piped(main))
