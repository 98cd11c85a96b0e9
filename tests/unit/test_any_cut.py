"""One call of a model equals any cutting of it into calls, for every mixer: inside chunks, inside documents, by token.

In float64, to 1e-12 of the largest logit. Whatever a state forgets, or remembers of another document, shows here.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import LEVELS

from hope.config import CmsConfig, ModelConfig
from hope.memory.config import MemoryConfig
from hope.memory.linear_config import RULES, LinearConfig
from hope.memory.titans_config import TITANS_RULES, TitansConfig
from hope.mixers import MIXERS
from hope.mixers.attention import AttentionConfig
from hope.mixers.mamba2 import Mamba2Config
from hope.mixers.titans_attention import GateConfig, LayerConfig
from hope.mixers.titans_context import ContextConfig
from hope.model import Model

LENGTH, BATCH, VOCAB = 23, 3, 32
BOUND = 1e-12
MEMORIES = {
    "matrix": MemoryConfig(projection_chunk=4, main_chunk=4, eta_max=0.5),
    "matrix-zero": MemoryConfig(forget="zero", projection_chunk=4, main_chunk=4, eta_max=0.5),
    "matrix-two-clocks": MemoryConfig(projection_chunk=2, main_chunk=8, eta_max=0.5),
    "matrix-long-projections": MemoryConfig(projection_chunk=8, main_chunk=4, momentum=0.5),
    "matrix-boundary": MemoryConfig(projection_chunk=4, main_chunk=4, read="boundary", adaptive_query=True),
    "matrix-no-conv": MemoryConfig(projection_chunk=4, main_chunk=4, conv_width=1),
    "matrix-gates": MemoryConfig(self_made="gates", static="projected", projection_chunk=2, main_chunk=4),
    "matrix-erase": MemoryConfig(erase_max=1.9, projection_chunk=2, main_chunk=4, eta_max=0.5),
    "matrix-projected": MemoryConfig(static="projected", projection_chunk=2, main_chunk=8, eta_max=0.5),
    "mlp-projected": MemoryConfig(memory="mlp", static="projected", projection_chunk=4, main_chunk=4),
    "mlp": MemoryConfig(memory="mlp", projection_chunk=4, main_chunk=4, eta_max=0.25),
    "mlp-zero": MemoryConfig(memory="mlp", forget="zero", projection_chunk=4, main_chunk=4, eta_max=0.25),
    "mlp-momentum": MemoryConfig(memory="mlp", projection_chunk=2, main_chunk=4, momentum=0.5),
}
PATTERNS = {name: (["hope"], {"hope": memory}) for name, memory in MEMORIES.items()} | {
    "attention": (["attention"], {}),
    "attention-window": (["attention"], {"attention": AttentionConfig(window=5)}),
    "attention-nope": (["attention"], {"attention": AttentionConfig(positions="none", qk_norm=True, window=16)}),
    "hybrid": (["hope", "attention"], {"hope": MEMORIES["matrix-two-clocks"]}),
    **{rule: (["linear"], {"linear": LinearConfig(rule=rule, chunk=8)}) for rule in RULES},
    "mamba2": (["mamba2"], {"mamba2": Mamba2Config(state=6, chunk=8)}),
    "mamba2-groups": (["mamba2"], {"mamba2": Mamba2Config(state=6, groups=2, chunk=4, conv_width=3)}),
    **{rule: (["titans"], {"titans": TitansConfig(rule=rule, chunk=4, theta_max=0.2)}) for rule in TITANS_RULES},
    "mag": (["titans_mag"], {"titans_mag": GateConfig(chunk=4, window=5, persistent=3, theta_max=0.2)}),
    "mal": (["titans_mal"], {"titans_mal": LayerConfig(chunk=4, window=6, persistent=2, theta_max=0.2)}),
    "mac": (["titans_mac"], {"titans_mac": ContextConfig(chunk=2, segment=6, persistent=2, theta_max=0.2)}),
    **{name: (["attention"], {}) for name in LEVELS},
    "lmm-online": (["titans"], {"titans": TitansConfig(depth=1, chunk=1, conv_width=0, theta_max=0.1)}),
}


def build(name: str) -> Model:
    pattern, mixers = PATTERNS[name]
    cms = LEVELS.get(name, CmsConfig(periods=[1, 2], hidden=16))
    config = ModelConfig(pattern, VOCAB, 16, 2, 2, mixers=mixers, cms=cms)
    model = Model(config).double().initialise(5)
    with torch.no_grad():  # away from special initial values: identity convolutions, saturated gates
        generator = torch.Generator().manual_seed(6)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


MODELS = {name: build(name) for name in PATTERNS}
TOKENS = torch.randint(0, VOCAB, (LENGTH, BATCH), generator=torch.Generator().manual_seed(7))


def in_pieces(model: Model, cuts: list[int], starts: torch.Tensor | None) -> torch.Tensor:
    bounds, state, out = [0, *cuts, LENGTH], None, []
    for first, last in itertools.pairwise(bounds):
        part = None if starts is None else starts[first:last]
        logits, state = model(TOKENS[first:last], state, part)
        out.append(logits)
    return torch.cat(out)


@torch.no_grad()
def assert_equal(name: str, cuts: list[int], starts: torch.Tensor | None) -> None:
    whole = MODELS[name](TOKENS, starts=starts)[0]
    error = (in_pieces(MODELS[name], cuts, starts) - whole).abs().max() / whole.abs().max()
    assert error <= BOUND, f"{name} cut at {cuts}: {error:.1e}"


CUTS = st.sets(st.integers(1, LENGTH - 1), max_size=6).map(sorted)


@pytest.mark.parametrize("name", list(PATTERNS))
@settings(max_examples=12, deadline=None)
@given(cuts=CUTS)
def test_any_cut_of_one_document(name, cuts):
    assert_equal(name, cuts, None)


@pytest.mark.parametrize("name", list(PATTERNS))
@settings(max_examples=12, deadline=None)
@given(cuts=CUTS, seed=st.integers(0, 1000), rate=st.sampled_from([0.05, 0.2, 0.5]))
def test_any_cut_of_packed_documents(name, cuts, seed, rate):
    """Also a cut at a document's first token, and rows that begin in the middle of a document."""
    starts = torch.rand(LENGTH, BATCH, generator=torch.Generator().manual_seed(seed)) < rate
    assert_equal(name, cuts, starts)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", list(PATTERNS))
def test_one_token_at_a_time(name, packed):
    starts = torch.rand(LENGTH, BATCH, generator=torch.Generator().manual_seed(1)) < 0.15 if packed else None
    assert_equal(name, list(range(1, LENGTH)), starts)


@pytest.mark.parametrize("name", list(PATTERNS))
def test_calls_with_and_without_documents_may_be_mixed(name):
    model, state, out = MODELS[name], None, []
    starts = torch.zeros(LENGTH, BATCH, dtype=torch.bool)
    starts[9, 0] = starts[7, 1] = starts[11, 1] = True
    with torch.no_grad():
        for first, last in ((0, 6), (6, 13), (13, 14), (14, LENGTH)):
            marked = starts[first:last] if starts[first:last].any() else None
            logits, state = model(TOKENS[first:last], state, marked)
            out.append(logits)
        whole = model(TOKENS, starts=starts)[0]
    assert (torch.cat(out) - whole).abs().max() <= BOUND * whole.abs().max()


@pytest.mark.parametrize(
    "name",
    [
        "matrix-two-clocks",
        "matrix-projected",
        "mlp",
        "attention",
        "hybrid",
        *RULES,
        *TITANS_RULES,
        "mag",
        "mal",
        "mac",
        *LEVELS,
    ],
)
def test_gradients_pass_through_a_cut(name):
    model = MODELS[name]
    weights = torch.linspace(-1, 1, LENGTH * BATCH * VOCAB, dtype=torch.float64).view(LENGTH, BATCH, VOCAB)

    def gradients(cuts):
        model.zero_grad()
        (in_pieces(model, cuts, None) * weights).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    whole, cut = gradients([]), gradients([5, 6, 14])
    for parameter in whole:
        assert (cut[parameter] - whole[parameter]).norm() <= 1e-10 * whole[parameter].norm(), parameter


@pytest.mark.parametrize("name", list(PATTERNS))
def test_what_a_state_forgets_would_be_seen(name):
    """Without the state the second half is something else: the tests above compare what matters."""
    with torch.no_grad():
        whole = MODELS[name](TOKENS)[0][10:]
        forgotten = MODELS[name](TOKENS[10:])[0]
    assert (forgotten - whole).abs().max() > 1e-3 * whole.abs().max()


@pytest.mark.parametrize("name", list(PATTERNS))
def test_reset_and_detach(name):
    """A row that is reset goes on as if it were new; the other rows as they would have."""
    model = MODELS[name]
    rows = torch.tensor([True, False, True])
    with torch.no_grad():
        _, state = model(TOKENS[:10])
        fresh = {n: [s.start(BATCH) for s in block.sublayers()] for n, block in enumerate(model.blocks.values())}
        changed = {
            n: tuple(s if s is None else s.reset(rows, new).detach() for s, new in zip(states, fresh[n], strict=True))
            for n, states in state.items()
        }
        after, _ = model(TOKENS[10:], changed)
        alone, _ = model(TOKENS[10:])
        continued, _ = model(TOKENS[10:], state)
    scale = alone.abs().max()
    assert (after[:, rows] - alone[:, rows]).abs().max() <= BOUND * scale
    assert (after[:, ~rows] - continued[:, ~rows]).abs().max() <= BOUND * scale


def test_every_registered_mixer_is_here():
    assert {name for pattern, _ in PATTERNS.values() for name in pattern} >= set(MIXERS) - {"gated_delta_of_a_test"}
