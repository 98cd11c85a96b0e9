"""The small network of a deep momentum: one per tensor, shared by its coordinates, trained online.

    y(k) = tanh(w2 . tanh(W1 k)),   W1 [H, F], w2 [H]

k holds F features of one coordinate, all odd in the gradient and in units of the tensor's gradient rms, and there are
no biases: turning every sign turns y. w2 starts at zero, so that the memory starts out linear; tanh bounds y by one
rms. Functions take the features of N coordinates as F tensors [N], and the weights of one network as one vector
[H F + H]: W1, then w2.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Key = tuple[Tensor, ...]

# Features are clamped here: single coordinates of an embedding reach hundreds of rms and would saturate every unit.
LIMIT = 8.0
LOG_SCALE, LOG_DIVISOR = 100.0, 5.0  # asinh(100 x) / 5 is a signed logarithm over 1e-2 .. 1e2 rms


def size(features: int, width: int) -> int:
    """Number of weights of a network."""
    return width * features + width


def initial(features: int, width: int, device: torch.device) -> Tensor:
    """Weights of a fresh network [P], the same for every tensor: no layout can change them."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(width * features, generator=generator) / features**0.5
    return torch.cat([first, torch.zeros(width)]).to(device)


def signed_log(x: Tensor) -> Tensor:
    return torch.asinh(x * LOG_SCALE) / LOG_DIVISOR


def key(*features: Tensor) -> Key:
    """One feature vector per coordinate, as F tensors [N]."""
    return tuple(feature.clamp(-LIMIT, LIMIT) for feature in features)


def read(weights: Tensor, keys: Key, width: int) -> Tensor:
    """y [N]."""
    first, last = _split(weights, len(keys), width)
    return torch.tanh(last @ torch.tanh(first @ torch.stack(keys)))


def read_and_gradient(weights: Tensor, keys: Key, width: int, error: Callable[[Tensor], Tensor]) -> Tensor:
    """[1 + P]: the inner loss's gradient by the weights, behind the squared norm of y's own gradient.

    Both are sums over coordinates; `error(y)` [N] is the loss's derivative by y. The mean of the first bounds the
    curvature of the mean loss: a step of a fraction of gradient / norm never overshoots (normalised least squares).
    """
    first, last = _split(weights, len(keys), width)
    stacked = torch.stack(keys)
    hidden = torch.tanh(first @ stacked)
    y = torch.tanh(last @ hidden)
    slope = 1 - y * y
    delta = error(y) * slope
    back = (1 - hidden * hidden) * last[:, None]
    norm = (slope * slope) @ (hidden.square().sum(0) + back.square().sum(0) * stacked.square().sum(0))
    return torch.cat([norm[None], ((back * delta) @ stacked.T).reshape(-1), hidden @ delta])


def _split(weights: Tensor, features: int, width: int) -> tuple[Tensor, Tensor]:
    first, last = weights.split([width * features, width])
    return first.view(width, features), last
