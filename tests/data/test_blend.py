"""Blends: shares, orders, held-out losses, previews, and the same batches for every layout."""

import hashlib
from pathlib import Path

import pytest
from multirank import run_ranks
from tiny import token_set

from data_prep.config import DataConfig, SourceConfig
from data_prep.training.batches import BatchLoader
from data_prep.training.blend import Blend, open_blend, open_heldout
from data_prep.training.blend_order import BlendOrder
from data_prep.training.blend_preview import preview
from data_prep.training.reading import TrainingSet
from hope.batch import Batch
from parallel.layout.topology import ParallelConfig
from parallel.start import groups

T, GLOBAL_BATCH, STEPS = 16, 16, 200
WEIGHTS = {"web": 0.7, "code": 0.2, "books": 0.1}
LAYOUTS = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4)]  # (dp_size, micro_batch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blend")
    for seed, name in enumerate(WEIGHTS):
        token_set(folder / f"{name}-train", 30 + 5 * seed, seed)
        token_set(folder / f"{name}-heldout", 12, 50 + seed)
    return folder


def config(folder: Path, documents: str = "carry", weights: dict[str, float] = WEIGHTS) -> DataConfig:
    sources = [
        SourceConfig(name=name, train=f"{folder}/{name}-train", heldout=f"{folder}/{name}-heldout", weight=weight)
        for name, weight in weights.items()
    ]
    return DataConfig(sources=sources, documents=documents, cache=f"{folder}/cache")


def hashes(blend: Blend, documents: str, dp_size: int, micro_batch: int, start: int, steps: int) -> list[str]:
    """Hash of every global batch, put together from what the data-parallel ranks read."""
    sizes = (GLOBAL_BATCH, micro_batch)
    loaders = [
        BatchLoader(blend, *sizes, rank, dp_size, documents=documents, prefetch=False) for rank in range(dp_size)
    ]
    found = []
    for step in range(start, start + steps):
        digest = hashlib.sha256()
        for loader in loaders:
            for batch in loader.batches(step * GLOBAL_BATCH):
                digest.update(rows(batch))
        found.append(digest.hexdigest())
    return found


def rows(batch: Batch) -> bytes:
    parts = [batch.tokens_TB, batch.targets_TB]
    parts += [part for part in (batch.starts_TB, batch.weights_TB) if part is not None]
    columns = (part[:, row].contiguous() for row in range(batch.tokens_TB.shape[1]) for part in parts)
    return b"".join(column.numpy().tobytes() for column in columns)


@pytest.fixture(scope="module", params=["reset", "doc"])
def expected(request, folder) -> tuple[str, list[str]]:
    return request.param, hashes(open_blend(config(folder, request.param), T), request.param, 1, 8, 0, STEPS)


@pytest.mark.parametrize(("dp_size", "micro_batch"), LAYOUTS)
def test_the_first_200_batches_are_the_same_for_every_layout_and_resume(folder, expected, dp_size, micro_batch):
    documents, whole = expected
    assert len(set(whole)) == STEPS
    blend = open_blend(config(folder, documents), T)
    cut = 77
    found = hashes(blend, documents, dp_size, micro_batch, 0, cut)
    other = open_blend(config(folder, documents), T)  # a new process, on another layout, starts in the middle
    found += hashes(other, documents, 4 // dp_size, 2 if micro_batch == 1 else 1, cut, STEPS - cut)
    assert found == whole


# (ranks, tensor, pipeline, micro_batch); what tensor and pipeline leave over is data parallel
RANK_LAYOUTS = [(1, 1, 1, 2), (2, 1, 1, 4), (4, 1, 1, 1), (4, 2, 1, 2), (4, 1, 2, 4), (4, 2, 2, 1)]
CUT = 77


def read_on_rank(
    folder: Path, tensor: int, pipeline: int, micro_batch: int, start: int, steps: int
) -> tuple[tuple[int, int, int], list[bytes]]:
    """(data, tensor, pipeline) rank and the rows of every step, read as training reads them."""
    with groups.start(ParallelConfig(tensor=tensor, pipeline=pipeline)) as ranks:
        blend = open_blend(config(folder, "reset"), T)
        loader = BatchLoader(blend, GLOBAL_BATCH, micro_batch, ranks.dp_rank, ranks.dp_size, documents="reset")
        numbers = range(start * GLOBAL_BATCH, (start + steps) * GLOBAL_BATCH, GLOBAL_BATCH)
        found = [b"".join(rows(batch) for batch in loader.batches(consumed)) for consumed in numbers]
        loader.close()
        return (ranks.dp_rank, ranks.tp_rank, ranks.pp_rank), found


def hashes_of_ranks(folder: Path, layout: tuple[int, int, int, int], start: int, steps: int) -> list[str]:
    """Hash of every global batch as the ranks of a real job read it; all ranks of a replica must read the same."""
    world, *degrees = layout
    answers = run_ranks(read_on_rank, world, folder, *degrees, start, steps, timeout=90)
    places = [place for place, _ in answers]
    dp_size = world // (degrees[0] * degrees[1])
    assert sorted(places) == [
        (dp, tp, pp) for dp in range(dp_size) for tp in range(degrees[0]) for pp in range(degrees[1])
    ]
    by_data_rank = {place[0]: found for place, found in answers}
    assert all(found == by_data_rank[place[0]] for place, found in answers)
    return [
        hashlib.sha256(b"".join(by_data_rank[dp][step] for dp in range(dp_size))).hexdigest() for step in range(steps)
    ]


@pytest.fixture(scope="module")
def whole(folder) -> list[str]:
    return hashes(open_blend(config(folder, "reset"), T), "reset", 1, GLOBAL_BATCH, 0, STEPS)


@pytest.mark.parametrize("layout", RANK_LAYOUTS, ids=str)
def test_the_first_200_batches_are_the_same_on_real_ranks(folder, whole, layout):
    """Data, tensor and pipeline ranks as megatron-core numbers them."""
    assert hashes_of_ranks(folder, layout, 0, STEPS) == whole


@pytest.mark.parametrize("layout", [(2, 2, 1, 1), (2, 1, 2, 4)], ids=str)
def test_a_job_that_goes_on_with_another_layout_reads_what_follows(folder, whole, layout):
    assert hashes_of_ranks(folder, layout, CUT, STEPS - CUT) == whole[CUT:]


def test_every_source_is_read_once_per_epoch_in_two_orders(folder):
    blend = open_blend(config(folder), T)
    longest = max(round(2 * len(source) / share) for source, share in zip(blend.sources, WEIGHTS.values(), strict=True))
    seen: dict[str, list[int]] = {name: [] for name in WEIGHTS}
    for number in range(longest + 20):
        source, own = blend.shares.locate(number)
        assert own == len(seen[blend.sources[source].name]), "a number of a source was left out or came twice"
        seen[blend.sources[source].name].append(blend.sources[source].window_of(own))
    for source in blend.sources:
        n = len(source)
        first, second = seen[source.name][:n], seen[source.name][n : 2 * n]
        assert sorted(first) == sorted(second) == list(range(n))
        assert first != second


def test_sources_with_equal_sizes_have_orders_of_their_own(folder):
    one, two = (TrainingSet(f"{folder}/web-train", T, 1, f"{folder}/cache", name=name) for name in ("a", "b"))
    assert [one.window_of(i) for i in range(20)] != [two.window_of(i) for i in range(20)]


def test_one_source_is_the_training_set_as_it_always_was(folder):
    data = DataConfig(train=f"{folder}/web-train", heldout=f"{folder}/web-heldout", cache=f"{folder}/cache")
    blend, alone = open_blend(data, T), TrainingSet(f"{folder}/web-train", T, 1234, f"{folder}/cache")
    numbers = [0, 1, 2, len(alone) - 1, len(alone), 5 * len(alone) + 3]
    assert [blend.sample(n).tobytes() for n in numbers] == [alone.sample(n).tobytes() for n in numbers]
    assert blend.identity() == {"data.train": alone.fingerprint_of_data}
    assert blend.consumed_by_source(37) == {"train": 37}


def test_consumed_samples_per_source_and_identity(folder):
    blend = open_blend(config(folder), T)
    assert blend.consumed_by_source(1000) == {"web": 700, "code": 200, "books": 100}
    other = open_blend(config(folder, weights={**WEIGHTS, "web": 0.6}), T)
    assert blend.identity().keys() == {"data.sources"}
    assert blend.identity() != other.identity()
    same = open_blend(config(folder, weights={name: 10 * weight for name, weight in WEIGHTS.items()}), T)
    assert blend.identity() == same.identity()
    assert open_blend(config(folder, "doc"), T).identity() != blend.identity()


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -2.0], [float("nan")], [float("inf"), 1.0]])
def test_weights_that_are_no_shares_are_refused(weights):
    with pytest.raises(ValueError, match="positive numbers"):
        BlendOrder(weights)


def test_the_blend_order_is_frozen():
    """Runs resume in this order: a change here breaks every checkpoint in use."""
    order = BlendOrder([0.7, 0.2, 0.1])
    assert "".join("abc"[order.locate(k)[0]] for k in range(20)) == FROZEN


FROZEN = "aabaacabaa" * 2  # ideal positions a 1 3 5 7 9 11 13 (/7), b 1 3 (/2), c 1 (/1); a before c at 1


def test_heldout_summary_is_weighted_by_share(folder):
    heldout = open_heldout(config(folder), T, 8)
    assert heldout.windows == dict.fromkeys(WEIGHTS, 8)
    summary = heldout.summary({"web": 1.0, "code": 2.0, "books": 4.0})
    assert summary.pop("heldout_loss") == pytest.approx(0.7 + 0.4 + 0.4)
    assert summary == {"heldout_loss.web": 1.0, "heldout_loss.code": 2.0, "heldout_loss.books": 4.0}
    single = DataConfig(train=f"{folder}/web-train", heldout=f"{folder}/web-heldout")
    assert open_heldout(single, T, 0).summary({"": 3.0}) == {"heldout_loss": 3.0}


@pytest.mark.parametrize("documents", ["carry", "doc"])
def test_preview_says_what_training_then_does(folder, documents):
    data = config(folder, documents)
    lines = list(preview(data, T, 1000 * T))
    blend = open_blend(data, T)
    for line, source, count in zip(lines[2:5], blend.sources, (700, 200, 100), strict=True):
        cells = line.replace(",", "").split()
        targets = sum(source.real_targets(k) for k in range(len(source))) / len(source)
        assert cells[0] == source.name
        assert [int(cells[3]), int(cells[4])] == [len(source), count]
        assert int(cells[5]) == pytest.approx(count * targets, abs=1)
        assert float(cells[6]) == pytest.approx(count / len(source), abs=1e-3)
    first = lines[5].partition(": ")[2].split()
    assert first == [blend.sources[blend.shares.locate(k)[0]].name for k in range(24)]
    for line, source in zip(lines[6:], blend.sources, strict=True):
        assert line == f"first windows of {source.name}: {' '.join(str(source.window_of(k)) for k in range(8))}"
