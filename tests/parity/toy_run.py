"""A tiny model, momentum SGD as the optimizers of this project have it, and a training loop over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from hope.optim.clocks import Due
from hope.optim.config import DmgdConfig, OptimConfig
from hope.optim.dmgd import Dmgd
from parallel.compute.pipeline import Stage, forward_backward
from parallel.optimizer.zero import ZeroOptimizer
from parallel.start.groups import Ranks, data_group

VOCAB, DIM = 31, 10
GLOBAL_BATCH, SEQ = 8, 6


class Toy(nn.Module):
    """A language model whose groups differ by 60 times in size, with one that never gets a gradient."""

    def __init__(self, dim: int = DIM, seed: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.emb = nn.Embedding(VOCAB, dim)
        self.gain = nn.Parameter(torch.ones(dim // 2))
        self.up = nn.Linear(dim, 3 * dim)
        self.down = nn.Linear(3 * dim, dim)
        self.unused = nn.Parameter(torch.full((3,), 0.5))
        self.register_buffer("scale", torch.tensor([0.7]))

    def forward(self, tokens_TB: torch.Tensor) -> torch.Tensor:
        x = self.emb(tokens_TB)
        x = x * torch.cat([self.gain, self.gain])
        x = x + self.down(torch.tanh(self.up(x))) * self.scale.to(x.dtype)
        return x @ self.emb.weight.T


MOMENTUM = OptimConfig(lr=0.05, beta1=0.9, dmgd=DmgdConfig(objective="dot", preconditioner="none"))
ADAMW = OptimConfig(lr=0.05)


class Momentum(Dmgd):
    """Dmgd, by default at SGD's setting, with integers per tensor to see what a checkpoint does to them."""

    per_tensor_keys = Dmgd.per_tensor_keys | {"odd"}

    def __init__(self, groups: list[dict], config: OptimConfig = MOMENTUM) -> None:
        super().__init__(groups, config)
        for group in self.param_groups:
            group["tensors"] = len(group["params"])
        self.calls = 0

    def allocate_states(self) -> None:
        super().allocate_states()
        for group in self.param_groups:
            for p in group["params"]:
                if "odd" not in self.state[p]:
                    self.state[p]["odd"] = torch.zeros(group["tensors"], 5, dtype=torch.int64, device=p.device)

    def update(self, due: Due) -> None:
        self.calls += 1
        self.allocate_states()
        super().update(due)
        for group, params in due:
            for p in params:
                rows = torch.arange(group["tensors"], device=p.device)
                increment = 2**40 + group["clock"] * (1 + rows)  # 2**40 + 1 is not an fp32 number
                self.state[p]["odd"] += increment.unsqueeze(1)


def groups_of(model: Toy) -> list[dict]:
    """Groups with and without a rate of their own. One has a clock that began earlier than its updates."""
    return [
        {"params": [model.emb.weight, model.up.weight, model.up.bias, model.down.weight], "name": "matrices"},
        {"params": [model.gain], "name": "gain", "lr": 0.02, "clock": 3},
        {"params": [model.down.bias], "name": "bias"},
        {"params": [model.unused], "name": "unused"},
    ]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, targets), both [GLOBAL_BATCH, SEQ]."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCAB, (GLOBAL_BATCH, SEQ + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def micro_batches(step: int, ranks: Ranks, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of the global batch, in micro-batches of `size` sequences."""
    tokens, targets = (x.chunk(ranks.dp_size)[ranks.dp_rank].to(ranks.device) for x in batch(step))
    return list(zip(tokens.split(size), targets.split(size), strict=True))


def loss_fn(model: nn.Module, pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    tokens, targets = pair
    logits = model(tokens.T)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.T.reshape(-1))
    return loss, {"loss": loss.detach()}


def step_fn(model: nn.Module, hidden: None, pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    return loss_fn(model, pair)


class ToyRun:
    """Model, stage and optimizer of one rank."""

    def __init__(
        self, ranks: Ranks, precision: str = "fp32", dim: int = DIM, micro: int = 1, optim: OptimConfig = MOMENTUM
    ) -> None:
        self.ranks, self.micro = ranks, micro
        self.model = Toy(dim).to(ranks.device)
        self.stage = Stage(self.model, precision)
        self.inner = Momentum(groups_of(self.model), optim)
        self.optimizer = ZeroOptimizer(self.model, self.inner, precision, ranks)

    def backward(self, step: int) -> float:
        """Accumulate and reduce the gradients of `step`; returns the mean loss of the global batch."""
        reports = forward_backward(self.stage, micro_batches(step, self.ranks, self.micro), step_fn)
        self.optimizer.prepare()
        self.optimizer.reduce()
        local = torch.stack([report["loss"] for report in reports]).mean()
        dist.all_reduce(local, group=data_group())
        return local.item() / self.ranks.dp_size

    def train(self, steps: range, clip_scale: float = 1.0) -> list[float]:
        losses = []
        for step in steps:
            losses.append(self.backward(step))
            self.optimizer.step(clip_scale)
        return losses

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().float().cpu().clone() for name, p in self.model.named_parameters()}

    def states(self) -> dict[tuple[str, str, int], torch.Tensor]:
        """Copies of this rank's masters and optimizer states by (key, name, offset)."""
        return {(p.key, p.name, p.offset): p.values.clone() for p in self.optimizer.pieces()}
