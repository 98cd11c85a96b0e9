"""Training speed of small models on the CPU, and how cost grows with sequence length.

    python benchmarks/cpu_speed.py                 full training steps at d=128, 2 layers, 4 heads, vocab 256, T=256
    python benchmarks/cpu_speed.py --lengths       matrix and mlp memories from 1k to 16k tokens

A step is forward, backward and optimizer. Kinds take turns inside every round, so that noise of the machine hits all
alike; printed are medians over the rounds, with the range.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from hope.arguments import count, whole
from hope.config import CmsConfig, ModelConfig
from hope.memory.config import MemoryConfig
from hope.model import Model, next_token_loss
from hope.optim.config import OptimConfig
from hope.optim.dmgd import Dmgd
from hope.optim.levels import parameter_groups
from hope.pipe import piped

KINDS = {"matrix": ("hope", "matrix"), "mlp": ("hope", "mlp"), "transformer": ("transformer", "matrix")}


class Trainer:
    """A model of one kind and its full training step on random tokens."""

    def __init__(self, kind: str, length: int, chunk: int, layers: int = 2) -> None:
        family, memory = KINDS[kind]
        mixer = MemoryConfig(memory=memory, projection_chunk=chunk, main_chunk=chunk)
        own = {"pattern": ["hope"], "mixers": {"hope": mixer}, "cms": CmsConfig()}
        control = {"pattern": ["attention"], "cms": CmsConfig(periods=[1])}
        config = ModelConfig(
            vocab_size=256, width=128, layers=layers, heads=4, **(own if family == "hope" else control)
        )
        self.model = Model(config).initialise(0)
        settings = OptimConfig()
        self.optimizer = Dmgd(parameter_groups(self.model, settings.weight_decay), settings)
        self.tokens = torch.randint(0, 256, (length + 1, 1), generator=torch.Generator().manual_seed(0))
        self.length = length

    def step(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self.optimizer.zero_grad()
        next_token_loss(self.model(self.tokens[:-1])[0], self.tokens[1:]).backward()
        self.optimizer.step()
        return time.perf_counter() - began


def measure(trainers: dict, rounds: int) -> dict:
    """Tokens per second of every trainer, one figure per round."""
    for trainer in trainers.values():
        trainer.step(), trainer.step()
    speeds: dict = {name: [] for name in trainers}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            speeds[name].append(trainer.length / trainer.step())
    return speeds


def row(name: str, speeds: list[float]) -> str:
    return f"| {name} | {statistics.median(speeds):,.0f} | {min(speeds):,.0f} - {max(speeds):,.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", action="store_true")
    parser.add_argument("--threads", type=count, default=2)
    parser.add_argument("--rounds", type=whole(), default=30)
    parser.add_argument("--chunk", type=whole(), default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.lengths:
        speeds = measure({kind: Trainer(kind, 256, args.chunk) for kind in KINDS}, args.rounds)
        print("| model | tokens/s, median | range |\n|---|---|---|")
        print("\n".join(row(name, values) for name, values in speeds.items()))
        return 0
    print("| tokens | matrix ms/token | mlp ms/token | matrix vs 1k | mlp vs 1k |\n|---|---|---|---|---|")
    first: dict[str, float] = {}
    for length in (1024, 2048, 4096, 8192, 16384):
        trainers = {kind: Trainer(kind, length, args.chunk) for kind in ("matrix", "mlp")}
        speeds = measure(trainers, max(3, args.rounds * 1024 // length // 4))
        cost = {kind: 1e3 / statistics.median(values) for kind, values in speeds.items()}
        first = first or cost
        growth = " | ".join(f"{cost[k] * length / (first[k] * 1024):.2f}x" for k in cost)
        print(f"| {length} | {cost['matrix']:.4f} | {cost['mlp']:.4f} | {growth} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
