"""The chunk-parallel linear memory against the published recurrences, token by token in float64: outputs, states and
all gradients, for odd lengths, documents, carried states and every cut; and the limits in which one rule is another."""

import pytest
import torch
from linear_reference import token_loop

from hope.memory.linear import channel_products, linear_memory

B, H, K, V = 2, 2, 6, 5
D = torch.float64
BOUND = 1e-12
DECAYS = ("none", "head", "channel")
RULES = [(decay, write, erase) for decay in DECAYS for write in (False, True) for erase in (False, True)]


def inputs(
    length: int, decay: str, write: bool, seed: int = 0, strength: float = 1.0
) -> dict[str, torch.Tensor | None]:
    """q, unit k, v, gates and a state, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(B, H, *shape, generator=generator, dtype=D)
    k = torch.nn.functional.normalize(draw(length, K), dim=-1)
    found = {
        "q": draw(length, K),
        "k": k,
        "v": draw(length, V),
        "log_decay": {"none": None, "head": draw(length, 1), "channel": draw(length, K)}[decay],
        "write": draw(length).sigmoid() if write else None,
        "state": draw(V, K),
    }
    if found["log_decay"] is not None:
        found["log_decay"] = -strength * found["log_decay"].exp()
    return {name: None if t is None else t.clone().requires_grad_() for name, t in found.items()}


def documents(length: int, rate: float, seed: int = 3) -> torch.Tensor:
    return (torch.rand(B, length, generator=torch.Generator().manual_seed(seed)) < rate).long().cumsum(-1)


def results(function, given, **settings) -> list[torch.Tensor]:
    """Output, state, and the gradients of a fixed weighting of both."""
    y, state = function(**given, **settings)
    weigh = lambda t: (t * torch.linspace(-1, 1, t.numel(), dtype=D).view_as(t)).sum()
    present = [t for t in given.values() if t is not None]
    return [y, state, *torch.autograd.grad(weigh(y) + 2 * weigh(state), present, materialize_grads=True)]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], bound: float = BOUND) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape
        error = (one - other).abs().max() / max(other.abs().max(), 1e-3)
        assert error <= bound, f"{number}: {error:.1e}"


@pytest.mark.parametrize(("decay", "write", "erase"), RULES)
@pytest.mark.parametrize(("length", "chunk"), [(1, 16), (7, 1), (13, 4), (21, 7), (21, 8), (37, 16), (64, 32)])
def test_outputs_states_and_gradients_are_those_of_the_recurrence(decay, write, erase, length, chunk):
    given = inputs(length, decay, write)
    expected = results(token_loop, given, erase=erase)
    assert_equal(results(linear_memory, given, erase=erase, chunk=chunk), expected)


@pytest.mark.parametrize(("decay", "write", "erase"), RULES)
@pytest.mark.parametrize("rate", [0.05, 0.4, 1.0])
def test_documents_do_not_see_each_other(decay, write, erase, rate):
    """With documents of one token, documents longer than a chunk, and a first token that continues the state or not."""
    given, segment = inputs(37, decay, write), documents(37, rate)
    settings = {"erase": erase, "segment": segment}
    expected = results(token_loop, given, **settings)
    assert_equal(results(linear_memory, given, chunk=8, **settings), expected)


@pytest.mark.parametrize(("decay", "write", "erase"), RULES)
def test_a_document_is_what_it_is_alone(decay, write, erase):
    given = {name: None if t is None else t.detach() for name, t in inputs(23, decay, write).items()}
    segment = torch.zeros(B, 23, dtype=torch.long)
    segment[:, 9:] = 1
    y, state = linear_memory(**given, erase=erase, chunk=8, segment=segment)
    later = {name: t if t is None or name == "state" else t[:, :, 9:] for name, t in given.items()}
    alone = linear_memory(**{**later, "state": torch.zeros(B, H, V, K, dtype=D)}, erase=erase, chunk=8)
    assert_equal([y[:, :, 9:], state], list(alone))


@pytest.mark.parametrize(("decay", "write", "erase"), RULES)
def test_a_state_in_the_middle_continues_as_the_whole(decay, write, erase):
    given, segment = inputs(19, decay, write), documents(19, 0.1)
    whole = linear_memory(**given, erase=erase, chunk=4, segment=segment)
    for cut in range(1, 19):
        part = lambda a, b, given=given: {n: t if t is None or n == "state" else t[:, :, a:b] for n, t in given.items()}
        first, state = linear_memory(**part(0, cut), erase=erase, chunk=4, segment=segment[:, :cut])
        rest = segment[:, cut:] - segment[:, cut - 1 : cut]
        second, state = linear_memory(**{**part(cut, 19), "state": state}, erase=erase, chunk=4, segment=rest)
        assert_equal([torch.cat([first, second], 2), state], list(whole))


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("strength", [1e-6, 30.0, 1e4])
def test_weak_and_strong_decays_stay_finite_in_fp32(decay, erase, strength):
    """exp(-g) of a chunk would be exp(1e6). Values and gradients are those of float64 within fp32's rounding."""
    given = inputs(64, decay, True, strength=strength)
    expected = results(token_loop, given, erase=erase)
    single = {name: t.detach().float().requires_grad_() for name, t in given.items()}
    y, state = linear_memory(**single, erase=erase, chunk=64)
    weigh = lambda t: (t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum()
    gradients = torch.autograd.grad(weigh(y) + 2 * weigh(state), list(single.values()))
    for name, one, other in zip(("y", "state", *single), (y, state, *gradients), expected, strict=True):
        scale = max(other.norm(), 1e-6 * expected[0].norm())
        # the gradient of a decay is a difference of sums over the chunk
        bound = 2e-4 if name == "log_decay" else 2e-5
        assert (one.double() - other).norm() <= bound * scale, name


def test_products_of_decaying_channels_meet_at_borders():
    generator = torch.Generator().manual_seed(1)
    for size in (1, 3, 4, 6, 8, 16, 24):
        x, k = (torch.randn(2, size, K, generator=generator, dtype=D) for _ in range(2))
        total = -torch.rand(2, size, K, generator=generator, dtype=D).cumsum(-2)
        written = torch.zeros(2, size, size, dtype=D)
        for t in range(size):
            for s in range(t + 1):
                written[:, t, s] = (x[:, t] * k[:, s] * (total[:, t] - total[:, s]).exp()).sum(-1)
        assert_equal([channel_products(x, k, total)], [written])


class TestLimits:
    """Where one row of the table is another."""

    def test_gated_deltanet_that_keeps_everything_is_deltanet(self):
        given = inputs(21, "head", True)
        kept = {**given, "log_decay": torch.zeros_like(given["log_decay"])}
        plain = linear_memory(**{**given, "log_decay": None}, erase=True, chunk=8)
        assert_equal(list(linear_memory(**kept, erase=True, chunk=8)), list(plain))

    def test_deltanet_without_erasing_is_linear_attention(self):
        """Invariant 4: W = sum b v k^T, and y_t = sum_{s <= t} (q_t . k_s) b_s v_s."""
        given = {**inputs(21, "none", True), "state": torch.zeros(B, H, V, K, dtype=D)}
        y, state = linear_memory(**given, erase=False, chunk=8)
        values = given["write"].unsqueeze(-1) * given["v"]
        assert_equal([y, state], [(given["q"] @ given["k"].mT).tril() @ values, values.mT @ given["k"]])

    def test_decay_without_erasing_is_retention(self):
        given = inputs(21, "head", False)
        given["log_decay"] = torch.full_like(given["log_decay"], -0.1)
        given["state"] = torch.zeros(B, H, V, K, dtype=D)
        lag = torch.arange(21, dtype=D).unsqueeze(1) - torch.arange(21, dtype=D)
        expected = ((given["q"] @ given["k"].mT) * (-0.1 * lag).exp()).tril() @ given["v"]
        assert_equal([linear_memory(**given, erase=False, chunk=8)[0]], [expected])

    @pytest.mark.parametrize("erase", [False, True])
    def test_equal_channels_are_a_decay_per_head(self, erase):
        given = inputs(21, "head", True)
        wide = {**given, "log_decay": given["log_decay"].expand(-1, -1, -1, K)}
        same = linear_memory(**given, erase=erase, chunk=8)
        assert_equal(list(linear_memory(**wide, erase=erase, chunk=8)), list(same))

    def test_the_dot_objective_of_nested_learning(self):
        """Invariant 4: M (alpha I - eta k k^T) + eta v k^T is the gated delta rule at the rate b = eta / alpha, with
        values alpha v."""
        given = inputs(9, "head", True, strength=0.1)
        alpha = given["log_decay"].exp()
        eta = given["write"].unsqueeze(-1) * alpha
        found, _ = linear_memory(**{**given, "v": alpha * given["v"]}, erase=True, chunk=4)
        m, rows = given["state"], []
        for t in range(9):
            k, a, e = given["k"][:, :, t], alpha[:, :, t, None], eta[:, :, t, None]
            outer = lambda x, k=k: x.unsqueeze(-1) @ k.unsqueeze(-2)
            m = m @ (a * torch.eye(K, dtype=D) - e * outer(k)) + e * outer(given["v"][:, :, t])
            rows.append((m @ given["q"][:, :, t, :, None]).squeeze(-1))
        assert_equal([found], [torch.stack(rows, 2)])

    def test_the_l2_objective_erases_twice(self):
        """Invariant 5, linear memory and one token per chunk: M (alpha I - 2 eta k k^T) + eta v k^T."""
        given = inputs(9, "head", True, strength=0.1)
        alpha = given["log_decay"].exp()
        eta = 0.5 * given["write"].unsqueeze(-1) * alpha
        _, found = linear_memory(**{**given, "v": 0.5 * alpha * given["v"]}, erase=True, chunk=4)
        m = given["state"]
        for t in range(9):
            k, v = given["k"][:, :, t, :, None], given["v"][:, :, t, :, None]
            a, e = alpha[:, :, t, None], eta[:, :, t, None]
            gradient = (m @ k - v) @ k.mT  # of 1/2 |M k - v|^2
            m = m @ (a * torch.eye(K, dtype=D) - e * k @ k.mT) - e * gradient
        assert_equal([found], [m])

    def test_titans_without_momentum_is_gated_deltanet(self):
        """Invariant 6 at eta_T = 0: M <- (1 - alpha_T) M - theta grad 1/2 |M k - v|^2 with the gradient at the decayed
        state, theta = b."""
        given = inputs(9, "head", True)
        _, found = linear_memory(**given, erase=True, chunk=4)
        m = given["state"].detach()
        for t in range(9):
            m = (given["log_decay"][:, :, t, None].exp() * m).detach().requires_grad_()
            k, v = given["k"][:, :, t, :, None], given["v"][:, :, t, :, None]
            loss = 0.5 * (m @ k - v).square().sum()
            (gradient,) = torch.autograd.grad(loss, m)
            m = m - given["write"][:, :, t, None, None] * gradient
        assert_equal([found], [m])

    @pytest.mark.parametrize("decay", DECAYS)
    def test_a_write_rate_of_zero_leaves_the_state(self, decay):
        """Invariant 8: eta = 0 and alpha = 1."""
        given = inputs(9, decay, True)
        given["write"] = torch.zeros_like(given["write"])
        if decay != "none":
            given["log_decay"] = torch.zeros_like(given["log_decay"])
        y, state = linear_memory(**given, erase=True, chunk=4)
        assert_equal([y, state], [given["q"] @ given["state"].mT, given["state"]])


@pytest.mark.parametrize("erase", [False, True])
def test_no_token_sees_a_later_one(erase):
    given = inputs(21, "channel", True)
    first = linear_memory(**given, erase=erase, chunk=8)[0]
    changed = {name: t.detach().clone() for name, t in given.items()}
    for name in ("q", "k", "v", "write", "log_decay"):
        changed[name][:, :, 11:] *= 0.5
    second = linear_memory(**changed, erase=erase, chunk=8)[0]
    assert torch.equal(first[:, :, :11], second[:, :, :11])
    assert not torch.equal(first[:, :, 11], second[:, :, 11])
