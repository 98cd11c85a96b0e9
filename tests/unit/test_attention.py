"""The choices of attention against a softmax over what a token may see, written out, in float64."""

import math

import pytest
import torch

from hope.config import CmsConfig, ModelConfig
from hope.documents import Documents
from hope.mixers import Trunk
from hope.mixers.attention import Attention, AttentionConfig
from hope.model import Model
from hope.parameters import initialise

WIDTH, HEADS, BATCH = 12, 3, 2
CHOICES = {
    "plain": {},
    "window": {"window": 4},
    "window 1": {"window": 1},
    "window as long": {"window": 13},
    "no positions": {"positions": "none"},
    "normed": {"qk_norm": True},
    "all": {"positions": "none", "qk_norm": True, "window": 5},
}


def built(**choices) -> Attention:
    mixer = Attention(Trunk(WIDTH, HEADS, 1), AttentionConfig(**choices))
    initialise(mixer, 0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return mixer.double()


def rms(z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return z / (z.square().mean() + 1e-6).sqrt() * weight


def turned(z: torch.Tensor, position: int, base: float) -> torch.Tensor:
    half = len(z) // 2
    angle = position * base ** (-torch.arange(half, dtype=torch.float64) * 2 / len(z))
    left, right = z[:half], z[half:]
    return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()])


def reference(mixer: Attention, x: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
    """Token by token and head by head."""
    length, config, head = x.shape[0], mixer.config, mixer.head_dim
    rows = []
    for t in range(length):
        out = []
        for b in range(BATCH):
            heads = []
            for h in range(HEADS):
                part = slice(h * head, (h + 1) * head)

                def project(linear, norm, s, b=b, part=part):
                    z = linear.weight[part] @ x[s, b]
                    z = z if norm is None else rms(z, norm.weight)
                    return turned(z, s, config.rope_base) if config.positions == "rope" else z

                q = project(mixer.query, mixer.query_norm, t)
                seen = []
                for s in range(t, -1, -1):
                    if config.window is not None and t - s >= config.window:
                        break
                    seen.append(s)
                    if starts is not None and starts[s, b]:
                        break
                keys = torch.stack([project(mixer.key, mixer.key_norm, s) for s in seen])
                values = torch.stack([mixer.value.weight[part] @ x[s, b] for s in seen])
                heads.append((keys @ q / math.sqrt(head)).softmax(0) @ values)
            out.append(mixer.output.weight @ torch.cat(heads))
        rows.append(torch.stack(out))
    return torch.stack(rows)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", list(CHOICES))
def test_outputs_and_gradients(name, packed):
    mixer, length = built(**CHOICES[name]), 13
    generator = torch.Generator().manual_seed(2)
    draw = lambda: torch.randn(length, BATCH, WIDTH, generator=generator, dtype=torch.float64)
    x, weights = draw().requires_grad_(), draw()
    starts = torch.rand(length, BATCH, generator=generator) < 0.2 if packed else None
    documents = None if starts is None else Documents(starts)
    variables = [x, *mixer.parameters()]
    found = mixer(x, None, documents)[0]
    expected = reference(mixer, x, starts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((y * weights).sum(), variables) for y in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    assert any(gradient.abs().max() > 1e-2 for gradient in gradients[0])


def test_a_window_keeps_a_state_of_its_size():
    mixer, state = built(window=4), None
    for length in (1, 2, 9, 1):
        state = mixer(torch.randn(length, BATCH, WIDTH, dtype=torch.float64), state)[1]
        assert state.keys.shape[2] <= 3
    assert state.position == 13


def test_a_window_of_one_token_keeps_nothing():
    mixer, x, state = built(window=1), torch.randn(6, BATCH, WIDTH, dtype=torch.float64), None
    starts = torch.zeros(6, BATCH, dtype=torch.bool)
    starts[3, 0] = True
    whole, pieces = mixer(x, None, Documents(starts))[0], []
    for first, last in ((0, 2), (2, 5), (5, 6)):
        y, state = mixer(x[first:last], state, Documents(starts[first:last]))
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=1e-14)
    assert state.keys.shape[2] == 0


def test_flops_count_what_is_seen():
    """By hand: token t sees min(t, W) keys, of which the causal half is counted as for the whole square."""
    config = lambda window: ModelConfig(
        ["attention"], 32, WIDTH, 1, HEADS, mixers={"attention": AttentionConfig(window=window)}, cms=CmsConfig([1])
    )
    flops = lambda window, length: Model(config(window)).flops(length).forward
    assert flops(None, 64) == flops(64, 64) == flops(100, 64)
    fixed = flops(None, 64) - 4 * 32 * WIDTH
    assert flops(16, 64) - fixed == pytest.approx(4 * WIDTH * (16 * 8 + 48 * 16) / 64)


def test_bad_choices_are_refused_by_name():
    [problem] = AttentionConfig(window=0).problems("model.mixers.attention", 4)
    assert problem.path == "model.mixers.attention.window"
    assert list(AttentionConfig(positions="none").problems("p", 3)) == []
    [problem] = AttentionConfig().problems("p", 3)
    assert "p.positions=none" in problem.fix
