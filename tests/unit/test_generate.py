"""Generation: prefill and steps equal the full call, batches equal single sequences, a memory from a file goes on as if
it had never been put away, and tokens are chosen as a plain reference chooses them."""

import dataclasses
import random

import pytest
import torch
from models import LEVELS

from hope.config import CmsConfig, ModelConfig
from hope.generate.errors import GenerationError
from hope.generate.loop import Memory, Sequences, on_one_device, write
from hope.generate.sampling import Sampling, allowed, choose, uniform
from hope.generate.session import Session, identity_of, read_session, write_session
from hope.generate.text import Stream, Writer
from hope.memory.config import MemoryConfig
from hope.memory.linear_config import LinearConfig
from hope.memory.titans_config import TitansConfig
from hope.mixers import MIXERS
from hope.mixers.mamba2 import Mamba2Config
from hope.mixers.titans_attention import GateConfig, LayerConfig
from hope.mixers.titans_context import ContextConfig
from hope.model import Model
from hope.stored.safetensors import read_with_metadata

VOCAB, CPU = 24, torch.device("cpu")
BOUND = 1e-10
TWO_CLOCKS = MemoryConfig(projection_chunk=2, main_chunk=4, eta_max=0.5)
PATTERNS = {
    "matrix": (["hope"], {"hope": MemoryConfig(projection_chunk=4, main_chunk=4, eta_max=0.5)}),
    "projected": (
        ["hope"],
        {"hope": MemoryConfig(static="projected", erase_max=1.9, projection_chunk=2, main_chunk=4)},
    ),
    "momentum": (["hope"], {"hope": MemoryConfig(projection_chunk=2, main_chunk=4, momentum=0.5)}),
    "mlp": (["hope"], {"hope": MemoryConfig(memory="mlp", projection_chunk=4, main_chunk=4, eta_max=0.25)}),
    "attention": (["attention"], {}),
    "hybrid": (["hope", "attention"], {"hope": TWO_CLOCKS}),
    "retnet": (["linear"], {"linear": LinearConfig(rule="retnet", chunk=4)}),
    "kda": (["linear"], {"linear": LinearConfig(rule="kda", chunk=4)}),
    "mamba2": (["mamba2"], {"mamba2": Mamba2Config(state=6, chunk=4)}),
    "titans": (["titans"], {"titans": TitansConfig(chunk=4, theta_max=0.2)}),
    "mag": (["titans_mag"], {"titans_mag": GateConfig(chunk=4, window=5, persistent=3, theta_max=0.2)}),
    "mac": (["titans_mac"], {"titans_mac": ContextConfig(chunk=2, segment=6, persistent=2, theta_max=0.2)}),
    "mal": (["titans_mal"], {"titans_mal": LayerConfig(chunk=4, window=6, persistent=2, theta_max=0.2)}),
    **{name: (["attention"], {}) for name in LEVELS},
}


def build(name: str, seed: int = 5) -> Model:
    pattern, mixers = PATTERNS[name]
    cms = LEVELS.get(name, CmsConfig(periods=[1, 2], hidden=16))
    config = ModelConfig(pattern, VOCAB, 16, 2, 2, mixers=mixers, cms=cms)
    model = Model(config).double().initialise(seed).requires_grad_(False)
    generator = torch.Generator().manual_seed(6)
    for parameter in model.parameters():  # away from special initial values, and with a sharper distribution
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


MODELS = {name: build(name) for name in PATTERNS}
IDS = torch.randint(0, VOCAB, (13,), generator=torch.Generator().manual_seed(7)).tolist()
WARM = Sampling(temperature=0.8, top_k=12, top_p=0.95, seed=3)


@pytest.fixture(autouse=True)
def one_thread():
    """Two that meet after every tiny product wait for each other, for minutes on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recorded:
    """A model's forward pass, and the scores that it gave last in every call."""

    def __init__(self, model: Model) -> None:
        self.scores: list[torch.Tensor] = []
        self._forward = on_one_device(model)

    def __call__(self, tokens, state, starts):
        scores, after = self._forward(tokens, state, starts)
        self.scores.append(scores)
        return scores, after


def continued(model: Model, prompts, steps: int, sampling=WARM, chunk: int = 4, memory=None):
    """(ids [steps][B], the scores [B, V] that each was chosen from, the sequences)."""
    forward = Recorded(model)
    sequences = Sequences(forward, prompts, sampling, CPU, chunk=chunk, memory=memory)
    ids, scores = [], []
    for _ in range(steps):
        ids.append(sequences.next())
        scores.append(forward.scores[-1])
    return ids, scores, sequences


def assert_full_call(model: Model, row: list[int], first: int, scores: list[torch.Tensor]) -> None:
    """`scores`, one [V] for each token of `row` from `first` on, against one call for all of `row`."""
    whole = model(torch.tensor(row).unsqueeze(1))[0][first - 1 : len(row) - 1, 0]
    error = (torch.stack(scores) - whole).abs().max()
    assert error <= BOUND * whole.abs().max(), error


@pytest.mark.parametrize("name", list(PATTERNS))
def test_prefill_and_steps_equal_the_full_call_at_every_prefix(name):
    for first in range(1, len(IDS) + 1):
        ids, scores, _ = continued(MODELS[name], [IDS[:first]], 5, chunk=3)
        assert_full_call(MODELS[name], IDS[:first] + [step[0] for step in ids], first, [s[0] for s in scores])


def test_every_registered_mixer_is_here():
    assert {name for pattern, _ in PATTERNS.values() for name in pattern} >= set(MIXERS) - {"gated_delta_of_a_test"}


@pytest.mark.parametrize("name", list(PATTERNS))
def test_prompts_of_unequal_length_are_what_each_is_alone(name):
    prompts = [IDS[:3], IDS, IDS[4:5], IDS[2:10]]
    ids, scores, _ = continued(MODELS[name], prompts, 9)
    for row, prompt in enumerate(prompts):
        alone, single, _ = continued(MODELS[name], [prompt], 9)
        assert [step[row] for step in ids] == [step[0] for step in alone]
        error = max((s[row] - t[0]).abs().max() for s, t in zip(scores, single, strict=True))
        assert error <= BOUND * torch.stack(single).abs().max()
        assert_full_call(MODELS[name], [*prompt, *(step[row] for step in ids)], len(prompt), [s[row] for s in scores])


def test_copies_of_a_prompt_draw_other_tokens_and_the_first_is_as_alone():
    ids, _, _ = continued(MODELS["matrix"], [IDS, IDS[:2], IDS], 12)
    alone, _, _ = continued(MODELS["matrix"], [IDS], 12)
    rows = list(zip(*ids, strict=True))
    assert list(rows[0]) == [step[0] for step in alone]
    assert rows[0] != rows[2]


def test_memory_does_not_grow_with_the_sequence_unless_it_is_attention():
    sizes = {}
    for name in ("matrix", "mlp", "hybrid", "attention"):
        _, _, sequences = continued(MODELS[name], [IDS], 1)
        found = []
        for _ in range(3):
            for _ in range(8):  # whole chunks: the tokens since the last border are as many
                sequences.next()
            found.append(sum(part.nbytes() for states in sequences.memory().state.values() for part in states if part))
        sizes[name] = found
    assert len(set(sizes["matrix"])) == len(set(sizes["mlp"])) == 1
    assert sizes["attention"][0] < sizes["attention"][1] < sizes["attention"][2]
    assert sizes["hybrid"][2] - sizes["hybrid"][1] == (sizes["attention"][2] - sizes["attention"][1]) / 2


def test_a_prompt_must_have_a_token():
    with pytest.raises(ValueError, match="without a token"):
        Sequences(on_one_device(MODELS["matrix"]), [[1], []], WARM, CPU)
    with pytest.raises(ValueError, match="memory of one sequence for 2 prompts"):
        Sequences(on_one_device(MODELS["matrix"]), [[1], [2]], WARM, CPU, memory=Memory())


# Sampling


def reference(scores: list[float], sampling: Sampling, draw: float) -> int:
    """One row, by lists: softmax, sort, cut, draw."""
    top = max(scores)
    weights = [2.718281828459045 ** ((score - top) / sampling.temperature) for score in scores]
    shares = [weight / sum(weights) for weight in weights]
    order = sorted(range(len(shares)), key=lambda token: (-shares[token], token))[: sampling.top_k or len(shares)]
    total, kept, have = sum(shares[token] for token in order), [], 0.0
    for token in order:
        kept.append(token)
        have += shares[token]
        if have >= sampling.top_p * total:
            break
    remaining = draw * sum(shares[token] for token in kept)
    for token in sorted(kept):
        remaining -= shares[token]
        if remaining < 0:
            return token
    return max(kept)


@pytest.mark.parametrize("top_k", [None, 1, 5, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.2])
def test_tokens_are_those_of_a_plain_reference(top_k, top_p):
    generator = random.Random(f"{top_k}{top_p}")
    for temperature in (0.3, 1.0, 2.0):
        sampling = Sampling(temperature, top_k, top_p)
        rows = [[generator.gauss(0, 2) for _ in range(30)] for _ in range(40)]
        rows[0][3] = rows[0][8] = rows[0][11] = max(rows[0]) + 1  # the most probable ones are equal
        draws = [generator.random() for _ in rows]
        found = choose(torch.tensor(rows, dtype=torch.float64), sampling, draws)
        assert found == [reference(row, sampling, draw) for row, draw in zip(rows, draws, strict=True)]


def test_draws_fill_the_distribution():
    scores = torch.randn(1, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampling = Sampling(0.7, 6, 0.95)
    number = 20_000
    found = choose(scores.expand(number, -1), sampling, [(i + 0.5) / number for i in range(number)])
    counts = torch.bincount(torch.tensor(found), minlength=9) / number
    wanted = allowed((scores / 0.7).softmax(-1), sampling)[0]
    assert 3 <= (wanted > 0).sum() <= 6
    assert (counts - wanted / wanted.sum()).abs().max() <= 1.01 / number


def test_a_draw_next_to_one_takes_no_token_that_is_left_out():
    scores = torch.tensor([[1.0, 3.0, -200.0, 2.0, -300.0]])
    assert choose(scores, Sampling(top_k=2), [1 - 2.0**-53]) == [3]
    assert choose(scores, Sampling(top_k=2), [0.0]) == [1]
    many = torch.randn(500, 20, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(top_k=7)
    for row, token in zip(many, choose(many, sampling, [1 - 2.0**-53] * 500), strict=True):
        assert token == row.topk(7).indices.max()


def test_greedy_is_the_first_of_the_most_probable():
    assert choose(torch.tensor([[1.0, 4.0, 4.0], [9.0, 0.0, 1.0]]), Sampling(temperature=0), [0.9, 0.9]) == [1, 0]


def test_the_smallest_temperatures_are_greedy():
    for temperature in (5e-324, 1e-309, 1e-200):
        assert choose(torch.tensor([[1.0, 40.0, 3.0]]), Sampling(temperature), [0.9]) == [1]


def test_scores_that_are_not_finite_are_refused():
    for value in (float("nan"), float("inf")):
        with pytest.raises(GenerationError, match="not finite"):
            choose(torch.tensor([[1.0, value]]), Sampling(), [0.5])


def test_draws_are_a_function_of_seed_copy_and_place():
    found = [uniform(seed, copy, place) for seed in range(3) for copy in range(3) for place in range(200)]
    assert len(set(found)) == len(found)
    assert min(found) >= 0
    assert max(found) < 1
    assert abs(sum(found) / len(found) - 0.5) < 0.02
    assert uniform(7, 0, 12) == 0.7957599330181563  # in every version: a seed is a promise


def test_ids_beyond_the_vocabulary_are_never_chosen():
    sequences = Sequences(on_one_device(MODELS["matrix"]), [IDS], Sampling(temperature=50.0), CPU, vocabulary=3)
    assert {sequences.next()[0] for _ in range(40)} == {0, 1, 2}


# A memory as a file


@pytest.mark.parametrize("name", list(PATTERNS))
def test_a_memory_from_a_file_goes_on_as_if_it_had_never_been_put_away(name, tmp_path):
    model = MODELS[name]
    whole, scores, _ = continued(model, [IDS], 11)
    for cut in (1, 4, 7):
        _, _, first = continued(model, [IDS], cut)
        write_session(tmp_path / "s", Session(first.memory(), [1, 2], 1), "me", torch.float64)
        found = read_session(tmp_path / "s", model, "me", CPU)
        assert (found.tail, found.held, found.memory.place) == ([1, 2], 1, len(IDS) + cut)
        rest, others, _ = continued(model, [[]], 11 - cut, memory=found.memory)
        assert rest == whole[cut:]
        assert all(torch.equal(a, b) for a, b in zip(others, scores[cut:], strict=True))


def test_a_memory_goes_on_with_a_new_prompt(tmp_path):
    model = MODELS["hybrid"]
    said, _, first = continued(model, [IDS[:5]], 3)
    write_session(tmp_path / "s", Session(first.memory(), [], 0), "me", torch.float64)
    memory = read_session(tmp_path / "s", model, "me", CPU).memory
    ids, scores, _ = continued(model, [IDS[5:]], 4, memory=memory)
    before = IDS[:5] + [step[0] for step in said] + IDS[5:]
    assert_full_call(model, before + [step[0] for step in ids], len(before), [s[0] for s in scores])


def test_what_two_banks_share_is_written_once_and_shared_again(tmp_path):
    model = MODELS["matrix"]
    _, _, first = continued(model, [IDS], 2)
    write_session(tmp_path / "s", Session(first.memory(), [], 0), "me", torch.float64)
    state = read_session(tmp_path / "s", model, "me", CPU).memory.state[0][0]
    assert state.projections is state.main
    tensors, _ = read_with_metadata(tmp_path / "s")
    assert sum(t.nbytes for t in tensors.values()) == sum(s[0].nbytes() for s in first.memory().state.values())


def test_another_models_memory_is_refused(tmp_path):
    model, path = MODELS["matrix"], tmp_path / "s"
    _, _, first = continued(model, [IDS], 2)
    write_session(path, Session(first.memory(), [], 0), identity_of(model), torch.float64)
    read_session(path, model, identity_of(model), CPU)
    other = build("matrix")
    other.blocks["1"].norm.weight[3] += 1e-9
    assert identity_of(build("matrix")) == identity_of(model)
    assert len({identity_of(m) for m in (model, other, MODELS["momentum"])}) == 3
    with pytest.raises(GenerationError, match=r"s belongs to another model: .*hash .{12}\.\.\., .* .{12}\.\.\.; give"):
        read_session(path, other, identity_of(other), CPU)
    with pytest.raises(GenerationError, match="written with --dtype float64, this model is float32"):
        read_session(path, build("matrix").float(), identity_of(model), CPU)


def test_what_is_no_session_is_refused(tmp_path):
    model, path = MODELS["matrix"], tmp_path / "s"
    _, _, first = continued(model, [IDS], 2)
    write_session(path, Session(first.memory(), [], 0), "me", torch.float64)
    content = path.read_bytes()
    changed = {
        b"": "a header of 0 bytes|no JSON",
        content[: len(content) // 2]: "bytes",
        content.replace(b"hope.generate session 1", b"hope.generate session 9"): "is no session",
        content.replace(b'\\"pending_q\\"', b'\\"pending_r\\"'): "was changed, or written by another version",
        content.replace(b'\\"unread\\"', b'\\"unraed\\"'): "was changed, or written by another version",
    }
    for bad, said in changed.items():
        assert bad != content
        path.write_bytes(bad)
        with pytest.raises(GenerationError, match=said):
            read_session(path, model, "me", CPU)
    with pytest.raises(GenerationError, match="none cannot be read: No such file"):
        read_session(tmp_path / "none", model, "me", CPU)


def test_a_state_with_something_else_in_it_is_not_written(tmp_path):
    _, _, first = continued(MODELS["matrix"], [IDS], 1)
    memory = dataclasses.replace(first.memory(), state={0: (["list"],)})
    with pytest.raises(GenerationError, match="state with a list cannot be written"):
        write_session(tmp_path / "s", Session(memory, [], 0), "me", torch.float64)
    assert list(tmp_path.iterdir()) == []


# Text


def as_bytes(ids: list[int]) -> str:
    """A tokenizer whose tokens are bytes, as byte fallback has them."""
    return bytes(ids).decode("utf-8", "replace")


TEXT = "naïve 漢字 \U0001f600 e\u0301 end"


def test_only_whole_characters_are_shown():
    stream, shown = Stream(as_bytes, list("ü".encode())), []
    for byte in TEXT.encode():
        shown.append(stream.push(byte))
        assert "\ufffd" not in shown[-1]
    assert "".join(shown) == TEXT
    assert stream.finish() == ""
    assert stream.push(0xE6) == ""
    assert stream.finish() == "\ufffd"


def test_bytes_that_never_become_characters_do_not_wait_for_ever():
    """As sentencepiece decodes them, one sign for every byte."""
    one_by_one = lambda ids: bytes(ids).decode("utf-8", "surrogateescape")
    decode = lambda ids: "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in one_by_one(ids))
    stream, shown = Stream(decode), ""
    content = b"a" + b"\xe6" * 50 + "漢".encode() + b"\x80" * 9 + b"b"
    for number, byte in enumerate(content, 1):
        shown += stream.push(byte)
        assert decode(content).startswith(shown)
        assert len(shown) >= number - 10
        assert len(stream.tail()[0]) <= 20
    assert shown == decode(content)


def test_a_stream_that_is_cut_inside_a_character_goes_on():
    for cut in range(len(TEXT.encode())):
        first = Stream(as_bytes)
        text = "".join(first.push(byte) for byte in TEXT.encode()[:cut])
        second = Stream(as_bytes, *first.tail())
        assert text + "".join(second.push(byte) for byte in TEXT.encode()[cut:]) == TEXT


def test_the_first_space_is_not_lost():
    """Where a tokenizer drops the space before a text, as Llama's does."""
    pieces = {1: " Once", 2: " upon", 3: " a"}
    decode = lambda ids: "".join(pieces[number] for number in ids).removeprefix(" ")
    stream = Stream(decode, [1])
    assert stream.push(2) + stream.push(3) == " upon a"


def test_text_ends_before_a_stop_string_and_never_shows_a_part_of_it():
    writer = Writer(Stream(as_bytes), ["</end>", "##"])
    shown = [writer.push(byte) for byte in b"a < b </en# </end> more"]
    assert "".join(shown[: b"a < b </en# </end> more".index(b"/end>") + 5]) == "a < b </en# "
    assert writer.ended
    assert writer.finish() == ""
    waiting = Writer(Stream(as_bytes), ["stop"])
    assert "".join(waiting.push(byte) for byte in b"a st") == "a "
    assert waiting.finish() == "st"


def test_a_writer_ends_at_the_end_of_text():
    writer = Writer(Stream(as_bytes), [], frozenset([0]))
    assert [writer.push(65), writer.push(0)] == ["A", ""]
    assert (writer.ended, writer.tokens) == (True, 2)


def test_writing_ends_when_all_have_and_counts_tokens_and_time():
    class Scripted:
        steps = iter([[65, 66], [0, 67], [70, 68], [71, 0], [72, 72]])

        def next(self):
            return next(self.steps)

    ticks = iter(range(100))
    texts = ["", ""]

    def emit(row, text):
        texts[row] += text

    writers = [Writer(Stream(as_bytes), [], frozenset([0])) for _ in range(2)]
    speed = write(Scripted(), writers, 10, 7, emit, clock=lambda: next(ticks))
    assert texts == ["A", "BCD"]
    assert (speed.prefill_tokens, speed.prefill_s, speed.step_tokens, speed.step_s) == (7, 1, 4, 3)
    assert str(speed) == "prefill 7 tokens in 1.00 s, 7 tokens/s; steps 4 tokens in 3.00 s, 1 tokens/s"
