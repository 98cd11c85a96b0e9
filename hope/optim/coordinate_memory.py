"""The small network of a deep momentum: one per tensor, shared by its coordinates, trained online.

    y(k) = tanh(w2 . tanh(W1 k)),   W1 [H, F], w2 [H]

k holds F features of one coordinate, all odd in the gradient and in units of the tensor's gradient rms, and there are
no biases: turning every sign turns y. w2 starts at zero, so that the memory starts out linear; tanh bounds y by one
rms. Functions take the features of N coordinates as F tensors [N], and the weights of one network as one vector
[H F + H]: W1, then w2.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Key = tuple[Tensor, ...]

# Features are clamped here: single coordinates of an embedding reach hundreds of rms and would saturate every unit.
_LIMIT = 8.0
_LOG_SCALE = 100.0  # asinh(100 x) / 5 is a signed logarithm over 1e-2 .. 1e2 rms


def size(features: int, width: int) -> int:
    """Number of weights of a network."""
    return width * features + width


def initial(features: int, width: int, device: torch.device) -> Tensor:
    """Weights of a fresh network [P], the same for every tensor: no layout can change them."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(width * features, generator=generator) / features**0.5
    return torch.cat([first, torch.zeros(width)]).to(device)


def signed_log(x: Tensor) -> Tensor:
    return torch.asinh(x * _LOG_SCALE) / 5


def key(*features: Tensor) -> Key:
    """One feature vector per coordinate, as F tensors [N]."""
    return tuple(feature.clamp(-_LIMIT, _LIMIT) for feature in features)


def read(weights: Tensor, keys: Key, width: int) -> Tensor:
    """y [N]."""
    first, last = _split(weights, len(keys), width)
    if torch.compiler.is_compiling():
        return torch.tanh(_weighted(last, _hidden(first, keys)))
    return torch.tanh(last @ torch.tanh(first @ torch.stack(keys)))


def read_and_gradient(weights: Tensor, keys: Key, width: int, error: Callable[[Tensor], Tensor]) -> Tensor:
    """[1 + P]: the inner loss's gradient by the weights, behind the squared norm of y's own gradient.

    Both are sums over coordinates; `error(y)` [N] is the loss's derivative by y. The mean of the first bounds the
    curvature of the mean loss: a step of a fraction of gradient / norm never overshoots (normalised least squares).
    """
    first, last = _split(weights, len(keys), width)
    if torch.compiler.is_compiling():
        return _unrolled_gradient(first, last, keys, error)
    stacked = torch.stack(keys)
    hidden = torch.tanh(first @ stacked)
    y = torch.tanh(last @ hidden)
    slope = 1 - y * y
    delta = error(y) * slope
    back = (1 - hidden * hidden) * last[:, None]
    norm = (slope * slope) @ (hidden.square().sum(0) + back.square().sum(0) * stacked.square().sum(0))
    return torch.cat([norm[None], ((back * delta) @ stacked.T).reshape(-1), hidden @ delta])


def _unrolled_gradient(first: Tensor, last: Tensor, keys: Key, error: Callable[[Tensor], Tensor]) -> Tensor:
    """The same without products of matrices: a compiler makes one kernel of it, which keeps [H, N] in registers."""
    hidden = _hidden(first, keys)
    y = torch.tanh(_weighted(last, hidden))
    slope = 1 - y * y
    delta = error(y) * slope
    backs = [(1 - unit * unit) * last[h] for h, unit in enumerate(hidden)]
    square = sum((unit * unit for unit in hidden), start=torch.zeros_like(y))
    back_square = sum((back * back for back in backs), start=torch.zeros_like(y))
    key_square = sum((k * k for k in keys), start=torch.zeros_like(y))
    norm = (slope * slope * (square + back_square * key_square)).sum()
    inner = [(back * delta * k).sum() for back in backs for k in keys]
    return torch.stack([norm, *inner, *[(unit * delta).sum() for unit in hidden]])


def _hidden(first: Tensor, keys: Key) -> list[Tensor]:
    return [torch.tanh(_weighted(row, keys)) for row in first.unbind()]


def _weighted(weights: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights.unbind()[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total


def _split(weights: Tensor, features: int, width: int) -> tuple[Tensor, Tensor]:
    first, last = weights.split([width * features, width])
    return first.view(width, features), last
