"""The reference: one device, with nothing of parallel/. A plain model, the whole batch at once, plain autograd, the
optimizer on whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hope.batch import Batch
from hope.model import Model, next_token_loss
from hope.optim.build import build_optimizer
from hope.optim.levels import parameter_groups
from parallel.referee.evidence import Evidence, Task, clip_scale, state_squares


def single_device(
    task: Task, device: torch.device, *, dtype: torch.dtype | None = None, draw: int | None = None
) -> Evidence:
    """The evidence of one device.

    Args:
        dtype: of the model, instead of the task's precision. Masters and optimizer take it too where it is wider than
            fp32. Weights start from the same values in every dtype: those that the task's precision can hold.
        draw: if given, start from weights that are moved at random by up to one unit in the last place, and take the
            sequences of every batch in a random order. All that differs is rounding.
    """
    own = torch.bfloat16 if task.precision == "bf16" else torch.float32
    model = Model(task.model).initialise(task.seed).to(own)
    batches = task.batches
    if draw is not None:
        generator = torch.Generator().manual_seed(draw)
        _nudge(model, generator)
        shuffle = lambda batch: batch.reordered(torch.randperm(batch.tokens_TB.shape[1], generator=generator))
        batches = [shuffle(batch) for batch in batches]
    model = model.to(device).to(dtype or own)
    wide = torch.promote_types(torch.float32, dtype or own)
    masters = {name: nn.Parameter(p.detach().to(wide).clone()) for name, p in model.named_parameters()}
    levels = parameter_groups(model, task.optim.weight_decay, task.optim)
    groups = [{**group, "params": [masters[name] for name in group["names"]]} for group in levels]
    optimizer = build_optimizer(groups, task.optim, task.precision)
    found = Evidence()
    for batch in batches:
        loss = _loss(model, batch.to(device))
        loss.backward()
        found.losses.append(loss.item())
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            masters[name].grad = gradient.to(wide).clone()
            parameter.grad = None
        if not found.gradients:
            found.gradients = {n: [m.grad.cpu().clone()] for n, m in masters.items() if m.grad is not None}
        norm = optimizer.norm()
        found.grad_norms.append(norm)
        for group in optimizer.param_groups:
            group["grad_scale"] = clip_scale(norm, task.grad_clip)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
    found.weights = {name: [m.detach().cpu().clone()] for name, m in masters.items()}
    with torch.no_grad(), state_squares([model]) as squares:
        _loss(model, task.batches[0].to(device))
    found.state_norms = {layer: square.sqrt().item() for layer, square in squares.items()}
    return found


def _loss(model: Model, batch: Batch) -> Tensor:
    return next_token_loss(model(batch.tokens_TB, starts=batch.starts_TB)[0], batch.targets_TB)


@torch.no_grad()
def _nudge(model: nn.Module, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        move = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
        parameter.copy_(parameter.double() * (1 + torch.finfo(parameter.dtype).eps * move))
