"""Share of a training step spent waiting for data, out of a run's own metrics.jsonl.

python benchmarks/data_wait.py                                  # the quick start's model and data, on whatever is there
python benchmarks/data_wait.py --gpus 2 --config configs/hope_17m_1xh200.yaml --data TRAIN HELDOUT train.seq_len=1024

Every case is a run of `--steps` logged steps: one source with documents carried, reset, and one per row, and a blend of
two sources. The first step, which no reading ahead can serve, is shown apart.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hope.arguments import count, whole
from hope.pipe import piped

ROOT = Path(__file__).parents[1]
SOURCES = ("a", 3), ("b", 1)


def cases(train: str, heldout: str) -> dict[str, list[str]]:
    """Name -> overrides."""
    single = [f"data.train={train}", f"data.heldout={heldout}"]
    found = {documents: [*single, f"data.documents={documents}"] for documents in ("carry", "reset", "doc")}
    sources = [f"{{name: {name}, train: {train}, heldout: {heldout}, weight: {weight}}}" for name, weight in SOURCES]
    blend = ["data.train=", "data.heldout=", f"data.sources=[{', '.join(sources)}]"]
    return {**found, "blend, reset": [*blend, "data.documents=reset"]}


def run(config: str, overrides: list[str], processes: int, steps: int) -> list[dict]:
    """The records of the logged steps 1 .. steps."""
    from configs.schema import load

    evaluated = load(config, overrides, check=False).train.micro_batch * processes
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        fixed = [f"run.dir={folder}", "run.name=wait", f"train.steps={steps}", "log.every=1", "log.tensorboard=false"]
        fixed += ["optim.warmup=1", "train.eval_every=0", f"train.eval_windows={evaluated}"]
        fixed += ["checkpoint.every=0", "log.histograms=0"]
        command = [*launcher, "pretrain_hope.py", config, *overrides, *fixed]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        lines = (Path(folder) / "wait" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["step"] > 0]


def main() -> int:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--data", nargs=2, default=["data/quickstart/train", "data/quickstart/heldout"])
    parser.add_argument("--steps", type=whole(), default=20)
    parser.add_argument("--processes", "--gpus", type=count, default=1)
    parser.add_argument("overrides", nargs="*", help="section.key=value for every case")
    args = parser.parse_intermixed_args()
    print(f"{'case':<14}{'step ms':>10}{'wait ms':>10}{'share':>9}{'worst step':>12}{'first step':>12}")
    for name, overrides in cases(*map(str, (Path(path).absolute() for path in args.data))).items():
        first, *rest = run(args.config, [*overrides, *args.overrides], args.processes, args.steps)
        shares = [record["data_time_s"] / record["step_time_s"] for record in rest]
        share = sum(record["data_time_s"] for record in rest) / sum(record["step_time_s"] for record in rest)
        step, wait = (1e3 * statistics.median(record[key] for record in rest) for key in ("step_time_s", "data_time_s"))
        begun = first["data_time_s"] / first["step_time_s"]
        print(f"{name:<14}{step:>10.1f}{wait:>10.3f}{share:>9.3%}{max(shares):>12.3%}{begun:>12.3%}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
