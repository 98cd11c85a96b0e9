"""The model as a whole: first loss, initialisation, slices, micro-batches (invariant 22), kinds, FLOPs."""

import math

import pytest
import torch
from models import named

from hope.config import CmsConfig, ModelConfig
from hope.memory.config import MemoryConfig
from hope.model import Model, Slice, next_token_loss
from hope.optim.levels import parameter_groups

KINDS = ["hope", "hope_attention", "transformer"]


def config(kind: str = "hope", **changes) -> ModelConfig:
    defaults = {"vocab_size": 96, "width": 32, "layers": 3, "heads": 2}
    memory = MemoryConfig(memory=changes.pop("memory_kind", "matrix"), projection_chunk=8, main_chunk=8)
    return named(kind, memory=memory, **{**defaults, **changes})


def tokens(length: int = 33, batch: int = 4, vocab: int = 96) -> torch.Tensor:
    return torch.randint(0, vocab, (length, batch), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [256, 8192])
@pytest.mark.parametrize("kind", KINDS)
def test_first_loss_is_ln_vocab(kind, vocab, tied):
    model = Model(config(kind, vocab_size=vocab, width=128, tie_embeddings=tied)).initialise(0)
    ids = tokens(129, 8, vocab)
    loss = next_token_loss(model(ids[:-1])[0], ids[1:]).item()
    assert loss == pytest.approx(math.log(vocab), rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_compose_to_the_whole_and_start_from_its_weights(kind):
    """Any contiguous slices, initialised on their own from the same seed, are the whole model cut up."""
    whole = Model(config(kind)).initialise(7)
    first, last = Model(config(kind), Slice(0, 1)).initialise(7), Model(config(kind), Slice(1, 3)).initialise(7)
    for part in (first, last):
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, dict(whole.named_parameters())[name]), name
    union = {n for part in (first, last) for n, _ in part.named_parameters()}
    assert union == {n for n, _ in whole.named_parameters()}
    ids = tokens()
    assert torch.equal(last(first(ids)[0])[0], whole(ids)[0])
    assert not torch.equal(Model(config(kind)).initialise(8).embedding.weight, whole.embedding.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_depth_scaled_init_divides_what_is_added_to_the_trunk(kind):
    """By the root of how many maps add to it in the whole model, in a slice of it too. All else is drawn as before."""
    scaled = dict(Model(config(kind, depth_scaled_init=True), Slice(1, 3)).initialise(7).named_parameters())
    plain = dict(Model(config(kind)).initialise(7).named_parameters())
    outputs = [name for name in scaled if name.endswith(("mixer.output.weight", "mlp.down.weight"))]
    per_layer = 2 if kind == "transformer" else 3  # the mixer and each level of the CMS
    assert len(outputs) == 2 * per_layer
    for name, parameter in scaled.items():
        factor = (3 * per_layer) ** -0.5 if name in outputs else 1.0
        torch.testing.assert_close(parameter, plain[name] * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [Slice(0, 0), Slice(2, 4), Slice(-1, 2)])
def test_impossible_slices_are_refused(bad):
    with pytest.raises(ValueError, match="slice"):
        Model(config(), bad)


@pytest.mark.parametrize("memory_kind", ["matrix", "mlp"])
def test_micro_batches_do_not_share_fast_weights(memory_kind):
    """Gradients of the whole batch equal the mean over two micro-batches run one after the other."""
    model = Model(config(memory_kind=memory_kind)).double().initialise(0)
    ids = tokens()

    def gradient(batches):
        model.zero_grad()
        for part in batches:
            (next_token_loss(model(part[:-1])[0], part[1:]) / len(batches)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    whole, parts = gradient([ids]), gradient(ids.chunk(2, 1))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_second_document_of_a_packed_row_equals_that_document_alone(kind):
    model = Model(config(kind)).double().initialise(0)
    ids = tokens(30, 2)
    starts = torch.zeros(30, 2, dtype=torch.bool)
    starts[0] = True
    starts[13] = True
    packed = model(ids, starts=starts)[0][13:]
    alone = model(ids[13:])[0]
    unmarked = model(ids)[0][13:]
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-10)
    assert (unmarked - alone).abs().max() > 1e-4


def test_model_state_is_carried():
    model = Model(config()).double().initialise(0)
    ids = tokens(24, 2)
    first, state = model(ids[:16])
    second, _ = model(ids[16:], state)
    torch.testing.assert_close(torch.cat([first, second]), model(ids)[0], rtol=1e-9, atol=1e-10)


def test_a_state_of_other_blocks_is_refused():
    model = Model(config()).initialise(0)
    _, state = model(tokens())
    with pytest.raises(ValueError, match=r"a state of blocks \[0, 1\] for blocks 0, 1, 2"):
        model(tokens(), {0: state[0], 1: state[1]})


def test_every_parameter_is_in_one_group_with_its_clock():
    model = Model(config(cms=CmsConfig(periods=[1, 4, 16])))
    groups = parameter_groups(model, 0.1)
    names = [n for g in groups for n in g["names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    period = {n: g["period"] for g in groups for n in g["names"]}
    assert period["blocks.1.cms.levels.2.mlp.up.weight"] == 16
    assert period["blocks.1.cms.levels.1.norm.weight"] == 4
    assert period["blocks.1.mixer.memories.initial.k"] == 1
    decay = {n: g["weight_decay"] for g in groups for n in g["names"]}
    assert decay["blocks.1.cms.levels.2.mlp.up.weight"] == 0.1
    assert decay["blocks.1.norm.weight"] == decay["blocks.1.mixer.eta_bias"] == 0.0


def test_flops_match_torchs_count_of_matrix_products():
    """A Transformer++ counted by torch's own counter, but for the upper half of the scores, which we leave out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, length = Model(config("transformer", width=64, vocab_size=512)).initialise(0), 64
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens(length, 1, 512))
    attention = 3 * 2 * length * 64 * length  # torch counts the full score square, we count the causal half
    assert counter.get_total_flops() == pytest.approx(model.flops(length).forward * length + attention, rel=1e-6)


@pytest.mark.parametrize("memory_kind", ["matrix", "mlp"])
def test_hope_flops_are_near_torchs_count(memory_kind):
    """The memory loop's stated FLOPs lie within 15 % of the products torch counts (it does not see solves)."""
    from torch.utils.flop_counter import FlopCounterMode

    settings = named(vocab_size=64, width=128, layers=1, heads=2, memory=MemoryConfig(memory=memory_kind))
    model = Model(settings).initialise(0)
    with FlopCounterMode(display=False) as counter:
        model(tokens(256, 1, 64))
    assert counter.get_total_flops() == pytest.approx(model.flops(256).forward * 256, rel=0.15)
    assert model.flops(256).writes > 0


@pytest.mark.parametrize(
    ("inputs", "starts", "message"),
    [
        (tokens().float(), None, r"tokens are float32 \[33, 4\]; a model takes whole numbers \[time, batch\]"),
        (tokens()[:, 0], None, r"tokens are int64 \[33\]"),
        (tokens(), torch.zeros(4, 33, dtype=torch.bool), r"starts are bool \[4, 33\] for tokens \[33, 4\]"),
        (tokens(), torch.zeros(33, 4), r"starts are float32 \[33, 4\]"),
    ],
)
def test_what_cannot_be_tokens_is_refused(inputs, starts, message):
    with pytest.raises(ValueError, match=message):
        Model(config()).initialise(0)(inputs, starts=starts)
