"""Deep memories trained in the sequence, as a function of tensors: the closed forms against autograd, chunks against
the token loop, and the limits in which one published rule is another (docs/family.md). In float64."""

import dataclasses
import itertools

import pytest
import torch
from reference import HeadMemories
from test_linear_memory import assert_equal
from titans_reference import network, one_head

from hope.documents import plain_layout
from hope.memory.config import MemoryConfig
from hope.memory.deep import DeepMemory, Writes, deep_memory
from hope.memory.delta import DeltaState
from hope.memory.linear import linear_memory
from hope.memory.titans_config import TitansRule

B, H, K, T = 2, 2, 4, 13
D = torch.float64
PLAIN = TitansRule("", depth=1, momentum=False, decay=False)
RULES = {
    "matrix": TitansRule("", depth=1),
    "mlp": TitansRule("", depth=2, expansion=2),
    "ttt": TitansRule("", depth=2, expansion=2, activation="gelu", residual=True, inner_norm=True, momentum=False),
    "keeps all": TitansRule("", depth=3, decay=False, residual=True),
    "normed matrix": TitansRule("", depth=1, inner_norm=True),
    "deepest": TitansRule("", depth=4),
}


def inputs(rule: TitansRule, seed: int = 0) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...] | None]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=D)
    unit = lambda t: torch.nn.functional.normalize(t, dim=-1)
    widths = [K, *[rule.expansion * K] * (rule.depth - 1), K]
    shapes = [(rows, columns) for columns, rows in itertools.pairwise(widths)]
    found = {
        "q": unit(draw(B, H, T, K)),
        "k": unit(draw(B, H, T, K)),
        "v": draw(B, H, T, K),
        "theta": 0.4 * draw(B, H, T).sigmoid(),
        "keep": draw(B, H, T).sigmoid() if rule.decay else None,
        "eta": draw(B, H, T).sigmoid() if rule.momentum else None,
        "initial": tuple(draw(H, *shape) / shape[1] ** 0.5 for shape in shapes),
        "weights": tuple(draw(B, H, *shape) / shape[1] ** 0.5 for shape in shapes),
        "momenta": tuple(0.1 * draw(B, H, *shape) for shape in shapes) if rule.momentum else None,
        "norm": (draw(H, K), draw(H, K)) if rule.inner_norm else None,
    }
    return {n: t if t is None else _leaf(t) for n, t in found.items()}


def _leaf(value):
    return tuple(map(_leaf, value)) if isinstance(value, tuple) else value.requires_grad_()


def tensors(given) -> list[torch.Tensor]:
    flat = []
    for name, value in given.items():
        if name != "initial" and value is not None:  # a carried state has its weights
            flat += list(value) if isinstance(value, tuple) else [value]
    return flat


def by_chunks(rule: TitansRule, given) -> list[torch.Tensor]:
    """y and, at the last chunk border, every layer's weights and momenta."""
    memory = DeepMemory(given["initial"], rule.activation, rule.residual, given["norm"], rule.momentum)
    moves = given["momenta"] or [None] * rule.depth
    state = tuple(DeltaState(w, s) for w, s in zip(given["weights"], moves, strict=True))
    layout = plain_layout(B, T, rule.chunk, torch.device("cpu"))
    log = lambda t: None if t is None else pad(t.log())
    pad = lambda t: torch.nn.functional.pad(t, (0, layout.padded - T))
    writes = Writes(layout.spread(given["k"]), layout.spread(given["v"]), pad(given["theta"]), log(given["keep"]),
                    log(given["eta"]))  # fmt: skip
    y, after = deep_memory(memory, layout.spread(given["q"]), writes, layout, rule.chunk, state)
    return [layout.collect(y), *(t for layer in after for t in (layer.weight, layer.momentum) if t is not None)]


def by_tokens(rule: TitansRule, given, length: int | None = None) -> list[torch.Tensor]:
    """The same by the token loop; of the states, those after the last whole chunk."""
    border = T // rule.chunk * rule.chunk
    ys, ends = [], []
    for b in range(B):
        for h in range(H):
            pick = lambda name, n=T, b=b, h=h: None if given[name] is None else given[name][b, h][:n]
            norm = None if given["norm"] is None else tuple(t[h] for t in given["norm"])
            run = lambda n, b=b, h=h, pick=pick, norm=norm: one_head(
                *(pick(name, n) for name in ("q", "k", "v", "theta", "keep", "eta")),
                [w[b, h] for w in given["weights"]], rule, norm,
                None if given["momenta"] is None else [s[b, h] for s in given["momenta"]],
            )  # fmt: skip
            ys.append(run(T)[0])
            weights, momenta = run(border)[1:] if border else ([w[b, h] for w in given["weights"]],) * 2
            ends.append([t for pair in zip(weights, momenta, strict=True) for t in pair[: 1 + rule.momentum]])
    heads = lambda rows: torch.stack(rows).unflatten(0, (B, H))
    return [heads(ys), *(heads([end[i] for end in ends]) for i in range(len(ends[0])))]


def with_gradients(function, rule: TitansRule, given) -> list[torch.Tensor]:
    results = function(rule, given)
    total = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in results)
    return [*results, *torch.autograd.grad(total, tensors(given), materialize_grads=True)]


@pytest.mark.parametrize("name", list(RULES))
def test_closed_form_gradients_are_autograds(name):
    """Invariant 3, of every layer and token."""
    rule, given = RULES[name], inputs(RULES[name])
    memory = DeepMemory(given["initial"], rule.activation, rule.residual, given["norm"], rule.momentum)
    state = tuple(DeltaState(w) for w in given["weights"])
    factors = memory.gradients(state, given["k"], given["v"])
    for b, h, t in ((0, 0, 0), (1, 1, 5), (0, 1, 12)):
        norm = None if given["norm"] is None else tuple(p[h] for p in given["norm"])
        weights = [w[b, h].detach().requires_grad_() for w in given["weights"]]
        loss = 0.5 * (network(weights, given["k"][b, h, t], rule, norm) - given["v"][b, h, t]).square().sum()
        expected = torch.autograd.grad(loss, weights)
        found = [torch.outer(errors[b, h, t], hidden[b, h, t]) for errors, hidden in factors]
        assert_equal(found, list(expected), 1e-11)


@pytest.mark.parametrize("chunk", [1, 2, 5, 13])
@pytest.mark.parametrize("name", list(RULES))
def test_outputs_states_and_gradients_are_those_of_the_token_loop(name, chunk):
    """Invariants 1 and 2: from a carried state, chunks that divide the length or not; 1 is the recurrence itself."""
    rule = dataclasses.replace(RULES[name], chunk=chunk)
    given = inputs(rule)
    assert_equal(with_gradients(by_chunks, rule, given), with_gradients(by_tokens, rule, given), 1e-10)


class TestLimits:
    """Where one published rule is another. Matrix memories; theta is the write rate b."""

    def linear(self, given, **changes) -> torch.Tensor:
        return linear_memory(**{**{"q": given["q"], "k": given["k"], "v": given["v"], "log_decay": None,
                                   "write": given["theta"], "state": given["weights"][0]}, **changes},
                             chunk=4)[0]  # fmt: skip

    def test_titans_without_momentum_and_decay_is_deltanet(self):
        """Invariant 6, eta_T = alpha_T = 0, a matrix, one token per chunk (Titans, Appendix C)."""
        rule = dataclasses.replace(PLAIN, chunk=1)
        given = inputs(rule)
        assert_equal([by_chunks(rule, given)[0]], [self.linear(given, erase=True)])

    def test_titans_without_momentum_is_the_gated_delta_rule(self):
        """Invariants 4 and 6: gradients at the state before it decays, M (keep I - theta k k^T) + theta v k^T: the rate
        is theta / keep, of values keep v."""
        rule = dataclasses.replace(PLAIN, decay=True, chunk=1)
        given = inputs(rule)
        keep = given["keep"]
        changes = {"log_decay": keep.log().unsqueeze(-1), "write": given["theta"] / keep}
        expected = self.linear(given, erase=True, v=keep.unsqueeze(-1) * given["v"], **changes)
        assert_equal([by_chunks(rule, given)[0]], [expected])

    def test_one_chunk_from_an_empty_matrix_is_linear_attention(self):
        """Every gradient is -v k^T there, so that nothing is erased: y_t = sum theta_s (q_t . k_s) v_s, Hebbian writes
        with L2's own gradient. With decay it is retention."""
        for decay in (False, True):
            rule = dataclasses.replace(PLAIN, decay=decay, chunk=64)
            given = inputs(rule)
            given["weights"] = (torch.zeros(B, H, K, K, dtype=D),)
            log_decay = given["keep"].log().unsqueeze(-1) if decay else None
            expected = self.linear(given, erase=False, log_decay=log_decay, state=given["weights"][0])
            assert_equal([by_chunks(rule, given)[0]], [expected])

    def test_ttt_with_a_bare_matrix_is_gradient_descent_on_the_mini_batch(self):
        """TTT-Linear without norm and residual: W - sum theta (W k - v) k^T over the chunk (Titans, Appendix C)."""
        rule = dataclasses.replace(PLAIN, chunk=T)
        given = inputs(rule)
        w = given["weights"][0]
        error = given["k"] @ w.mT - given["v"]
        assert_equal([by_chunks(rule, given)[1]], [w - (given["theta"].unsqueeze(-1) * error).mT @ given["k"]])

    def test_a_momentum_of_nearly_nothing_is_none(self):
        rule = dataclasses.replace(RULES["mlp"], chunk=4)
        given = inputs(rule)
        given |= {
            "eta": torch.full_like(given["eta"], 1e-300),
            "momenta": tuple(map(torch.zeros_like, given["momenta"])),
        }
        without = {**given, "eta": None, "momenta": None}
        assert_equal(by_chunks(rule, given)[:1], by_chunks(dataclasses.replace(rule, momentum=False), without)[:1])

    def test_a_rate_of_zero_leaves_the_initial_network(self):
        """Invariant 8."""
        rule = dataclasses.replace(RULES["keeps all"], chunk=4, momentum=False)
        given = {**inputs(rule), "theta": torch.zeros(B, H, T, dtype=D)}
        y, *weights = by_chunks(rule, given)
        one = lambda b, h, t: network([w[b, h] for w in given["weights"]], given["q"][b, h, t], rule, None)
        expected = torch.stack([one(b, h, t) for b in range(B) for h in range(H) for t in range(T)]).view(B, H, T, K)
        assert_equal([y, *weights], [expected, *given["weights"]])


class GivenValues(HeadMemories):
    """HOPE's referee (Eq. 88) where a memory is written with the value itself, not with what it makes of it."""

    def objective_read(self, weights, z):
        return self.targets if z is self.targets else super().objective_read(weights, z)

    def gradients(self, start, k, v):
        self.targets = v
        return super().gradients(start, k, v)


@pytest.mark.parametrize("memory", ["matrix", "mlp"])
def test_hope_with_given_keys_and_values_is_titans(memory):
    """Invariant 6. The update of HOPE's main memory, Eq. 88 as tests/reference.py writes it, is Titans' with a residual
    where: keys, values and gates are given (static projections); values are not self-made; nothing is erased beside the
    gradient; alpha forgets towards zero; the contribution is 1; Titans' eta is HOPE's one momentum. Then alpha of HOPE
    is 1 - alpha of Titans, and its eta is Titans' theta."""
    beta = 0.6
    config = MemoryConfig(memory=memory, forget="zero", erase="none", momentum=beta, contribution=1.0)
    depth = 1 if memory == "matrix" else 2
    rule = TitansRule("", depth=depth, residual=True, chunk=4)
    given = inputs(rule)
    given["eta"] = torch.full_like(given["eta"], beta)
    given["momenta"] = tuple(map(torch.zeros_like, given["momenta"]))
    y = by_chunks(rule, given)[0]
    for b, h in ((0, 0), (1, 1)):
        head = object.__new__(GivenValues)  # the memory alone, without the mixer that it is made from
        layers = [w[b, h] for w in given["weights"]][::-1]  # HOPE counts from the output
        head.config, head.now, head.initial = config, {"main": layers}, {"main": layers}
        head.momenta = {"main": [torch.zeros_like(w) for w in layers]}
        for t in range(T):
            if t % rule.chunk == 0:
                start = list(head.now["main"])
            k, v, q = (given[name][b, h, t] for name in ("k", "v", "q"))
            head.write("main", start, k, v, given["theta"][b, h, t], given["keep"][b, h, t], torch.tensor(0.0))
            assert_equal([y[b, h, t]], [q + head.contribution(head.now["main"], q)])


@pytest.mark.parametrize("rate", [-60.0, -4.0, 60.0])
@pytest.mark.parametrize("name", ["matrix", "mlp"])
def test_weak_and_strong_gates_stay_finite_in_fp32(name, rate):
    """Shares of nothing and of everything that are forgotten and carried on: values and gradients are those of float64
    within fp32's rounding."""
    rule = dataclasses.replace(RULES[name], chunk=8)
    given = inputs(rule)
    logits = rate + torch.linspace(-1, 1, B * H * T, dtype=D).view(B, H, T)
    given |= {"keep": logits.sigmoid().requires_grad_(), "eta": (-logits).sigmoid().requires_grad_()}
    expected = with_gradients(by_chunks, rule, given)
    single = {n: t if t is None else _single(t) for n, t in given.items()}
    found = with_gradients(by_chunks, rule, single)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        assert (one.double() - other).norm() <= 2e-4 * max(other.norm(), 1e-3 * expected[0].norm())


def _single(value):
    return tuple(map(_single, value)) if isinstance(value, tuple) else value.detach().float().requires_grad_()


def test_no_token_sees_a_later_one():
    rule = dataclasses.replace(RULES["mlp"], chunk=4)
    given = inputs(rule)
    first = by_chunks(rule, given)[0]
    changed = dict(given)
    for name in ("q", "k", "v", "theta", "keep", "eta"):
        changed[name] = torch.cat([given[name][:, :, :6], 0.5 * given[name][:, :, 6:]], 2)
    second = by_chunks(rule, changed)[0]
    assert torch.equal(first[:, :, :6], second[:, :, :6])
    assert not torch.equal(first[:, :, 6], second[:, :, 6])
