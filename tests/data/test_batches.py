import itertools
import threading

import numpy as np
import pytest
import torch
from models import named
from tiny import token_set

from data_prep.errors import DataError
from data_prep.training.batches import batch_of_windows
from data_prep.training.reading import BatchLoader, HeldoutSet, TrainingSet, global_batch_slice, heldout_batches
from hope.memory.config import MemoryConfig
from hope.model import Model, next_token_loss

T = 32
GLOBAL_BATCH = 12


@pytest.fixture(scope="module")
def dataset(tiny, tmp_path_factory):
    return TrainingSet(tiny.train_prefix, T, 1234, str(tmp_path_factory.mktemp("cache")))


def rows(batches):
    """Windows [samples, T + 1] of micro-batches, in order."""
    windows = [torch.cat([b.tokens_TB, b.targets_TB[-1:]]).T for b in batches]
    return torch.cat(windows).tolist()


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 3), (12, 1), (6, 2)])
@pytest.mark.parametrize("epochs_before", [0, 1])
def test_the_global_batch_is_the_same_for_every_layout(dataset, dp_size, micro_batch, epochs_before):
    consumed = epochs_before * len(dataset) - 5 * epochs_before + 24  # with 1 it runs over the epoch's end
    found = []
    for rank in range(dp_size):
        loader = BatchLoader(dataset, GLOBAL_BATCH, micro_batch, rank, dp_size, prefetch=False)
        batches = loader.batches(consumed)
        assert [b.tokens_TB.shape for b in batches] == [(T, micro_batch)] * (12 // dp_size // micro_batch)
        found += rows(batches)
    assert found == [dataset.sample(consumed + i).tolist() for i in range(GLOBAL_BATCH)]


def test_prefetching_changes_nothing(dataset):
    plain = BatchLoader(dataset, GLOBAL_BATCH, 4, 1, 3, prefetch=False)
    ahead = BatchLoader(dataset, GLOBAL_BATCH, 4, 1, 3, prefetch=True)
    for consumed in (0, 12, 24, 240, 252, 0, 12):  # also jumps, as after a reload
        assert rows(ahead.batches(consumed)) == rows(plain.batches(consumed))
    ahead.close()
    assert rows(ahead.batches(36)) == rows(plain.batches(36))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


class FailsAt:
    eos_id = 1

    def __init__(self, number):
        self.number = number

    def sample(self, number):
        if number >= self.number:
            raise OSError(f"cannot read sample {number}")
        return np.arange(T + 1) + number


class Recording:
    eos_id = 1

    def __init__(self):
        self.read = []
        self.seventh = threading.Event()

    def sample(self, number):
        self.read.append(number)
        if number == 7:
            self.seventh.set()
        return np.arange(T + 1) + number


def test_the_following_batch_is_read_once_and_ahead():
    dataset = Recording()
    loader = BatchLoader(dataset, 4, 2)
    loader.batches(0)
    assert dataset.seventh.wait(10)
    assert dataset.read == list(range(8))
    loader.batches(4)
    loader.close()
    assert dataset.read[:8] == list(range(8))
    assert not set(range(8)) & set(dataset.read[8:])


def test_an_error_in_the_background_reaches_the_caller():
    loader = BatchLoader(FailsAt(8), 4, 4)
    loader.batches(0)
    loader.batches(4)
    for _ in range(2):
        with pytest.raises(OSError, match="cannot read sample 8"):
            loader.batches(8)
    loader.close()


def test_starts_mark_first_tokens_of_documents():
    eos = 1
    windows = [np.array([5, 6, eos, 7, eos, eos, 8, 9]), np.array([eos, 5, 6, 7, 8, 9, 10, eos])]
    batch = batch_of_windows(windows, "reset", eos)
    assert batch.tokens_TB.T.tolist() == [window[:-1].tolist() for window in windows]
    assert batch.targets_TB.T.tolist() == [window[1:].tolist() for window in windows]
    assert batch.tokens_TB.dtype == batch.targets_TB.dtype == torch.int64
    assert batch.tokens_TB.is_contiguous()
    expected = [[1, 0, 0, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0]]
    assert batch.starts_TB.T.int().tolist() == expected
    assert batch_of_windows(windows, "carry", eos).starts_TB is None


def test_starts_in_real_data_follow_eos(dataset):
    (batch,) = BatchLoader(dataset, 48, 48, documents="reset", prefetch=False).batches(0)
    assert batch.starts_TB[0].all()
    assert torch.equal(batch.starts_TB[1:], batch.tokens_TB[:-1] == dataset.eos_id)


def test_to_moves_every_tensor():
    batch = batch_of_windows([np.arange(5)], "reset", 1).to("meta")
    assert {t.device.type for t in (batch.tokens_TB, batch.targets_TB, batch.starts_TB)} == {"meta"}
    assert batch_of_windows([np.arange(5)], "carry", 1).to("meta").starts_TB is None


def test_with_gpus_batches_are_pinned_on_the_device_of_the_process(monkeypatch):
    """Also by the reading thread, which would otherwise be on GPU 0. (CUDA's calls are replaced: no GPU is needed.)"""
    devices, pinned = {threading.get_ident(): 3}, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices.get(threading.get_ident(), 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.update({threading.get_ident(): device}))
    pin = lambda tensor: pinned.append((torch.cuda.current_device(), threading.get_ident())) or tensor
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    loader = BatchLoader(Recording(), 4, 2, documents="reset")
    loader.batches(0)
    loader.batches(4)
    loader.close()
    assert len(pinned) in (12, 18)  # 2 batches and perhaps the one read ahead, of 2 micro-batches of 3 tensors
    assert {device for device, _ in pinned} == {3}
    assert len({thread for _, thread in pinned}) == 2


def test_slices_are_contiguous_and_disjoint():
    slices = [global_batch_slice(100, 12, rank, 4) for rank in range(4)]
    assert [i for part in slices for i in part] == list(range(100, 112))


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "dp_size", "works"),
    [(12, 5, 1, "10 or 15"), (12, 4, 2, "8 or 16"), (2, 4, 1, "4 works"), (0, 1, 1, "1 works"), (4, 0, 1, "1 or more")],
)
def test_sizes_that_do_not_divide_name_those_that_do(dataset, global_batch, micro_batch, dp_size, works):
    with pytest.raises(DataError, match=rf"train\.global_batch {global_batch} .*{works}"):
        BatchLoader(dataset, global_batch, micro_batch, 0, dp_size)


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 4), (2, 2), (4, 1)])
def test_heldout_windows_are_the_same_for_every_layout(tiny, dp_size, micro_batch):
    heldout = HeldoutSet(tiny.heldout_prefix, T)
    found = []
    for rank in range(dp_size):
        found += rows(heldout_batches(heldout, 8, micro_batch, rank, dp_size))
    assert found == [heldout.window(k).tolist() for k in range(8)]


@pytest.mark.parametrize("documents", ["carry", "reset", "doc"])
@pytest.mark.parametrize(("windows", "dp_size", "micro_batch"), [(7, 1, 4), (7, 2, 3), (5, 4, 3), (1, 2, 4), (3, 2, 4)])
def test_heldout_windows_that_do_not_divide_are_padded(tmp_path, windows, dp_size, micro_batch, documents):
    """Also a set smaller than one batch; ranks that have nothing but padding do as many batches as the others."""
    token_set(tmp_path / "short", 40, 3)
    heldout = HeldoutSet(str(tmp_path / "short"), T, documents)
    batches = [list(heldout_batches(heldout, windows, micro_batch, r, dp_size, documents)) for r in range(dp_size)]
    shapes = [[batch.targets_TB.shape for batch in of_rank] for of_rank in batches]
    assert shapes == [[(T, micro_batch)] * len(shapes[0])] * dp_size
    means = [(b.weights_TB * b.targets_TB).double().mean() for of_rank in batches for b in of_rank]
    targets = np.concatenate([heldout.window(k)[1:] for k in range(windows)])
    assert torch.stack(means).mean().item() == pytest.approx(targets[targets >= 0].mean(), rel=1e-6)


def test_more_heldout_windows_than_there_are_are_refused(tiny):
    heldout = HeldoutSet(tiny.heldout_prefix, T)
    with pytest.raises(DataError, match=f"10000 held-out windows of a set of {len(heldout)}; 1 to {len(heldout)}"):
        list(heldout_batches(heldout, 10_000, 2))


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    token_set(folder / "short", 40, 3)
    return TrainingSet(str(folder / "short"), T, 1, documents="doc")


def mean_over_layout(dataset, table, dp_size, micro_batch, consumed):
    """Loss of a global batch as training averages it: over micro-batches, then over ranks."""
    ranks = []
    for rank in range(dp_size):
        loader = BatchLoader(dataset, GLOBAL_BATCH, micro_batch, rank, dp_size, documents="doc", prefetch=False)
        losses = [next_token_loss(table[b.tokens_TB], b.targets_TB, b.weights_TB) for b in loader.batches(consumed)]
        ranks.append(torch.stack(losses).mean())
    return torch.stack(ranks).mean()


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 1), (1, 4), (1, 12), (2, 1), (2, 6), (4, 1), (4, 3), (12, 1)])
def test_padded_rows_give_the_mean_over_real_tokens_for_every_layout(short_documents, dp_size, micro_batch):
    table = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for consumed in (0, 36):
        rows_of_documents = [short_documents.sample(consumed + i) for i in range(GLOBAL_BATCH)]
        pairs = [(a, b) for row in rows_of_documents for a, b in itertools.pairwise(row) if b >= 0]
        assert len(pairs) < 0.9 * GLOBAL_BATCH * T, "hardly any padding: the test would show nothing"
        inputs, targets = (torch.tensor(np.array(ids)) for ids in zip(*pairs, strict=True))
        expected = torch.nn.functional.cross_entropy(table[inputs], targets)
        found = mean_over_layout(short_documents, table, dp_size, micro_batch, consumed)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # weights are fp32
        gradients = [torch.autograd.grad(loss, table)[0] for loss in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 4), (2, 2), (4, 1)])
def test_heldout_rows_of_documents_give_the_same_mean_for_every_layout(tmp_path, dp_size, micro_batch):
    token_set(tmp_path / "short", 40, 3)
    heldout = HeldoutSet(str(tmp_path / "short"), T, "doc")
    found = []
    for rank in range(dp_size):
        batches = heldout_batches(heldout, 16, micro_batch, rank, dp_size, "doc")
        found += [(b.weights_TB * b.targets_TB).double().mean() for b in batches]
    targets = np.concatenate([heldout.window(k)[1:] for k in range(16)])
    assert (targets < 0).mean() > 0.1
    assert torch.stack(found).mean().item() == pytest.approx(targets[targets >= 0].mean(), rel=1e-6)


def test_padding_is_never_a_token_or_a_target():
    eos, pad = 1, -1
    windows = [np.array([5, 6, 7, eos, pad, pad]), np.array([5, 6, 7, 8, 9, eos])]
    batch = batch_of_windows(windows, "doc", eos, real_weight=1.25)
    assert batch.tokens_TB.T.tolist() == [[5, 6, 7, eos, eos], [5, 6, 7, 8, 9]]
    assert batch.targets_TB.T.tolist() == [[6, 7, eos, eos, eos], [6, 7, 8, 9, eos]]
    assert batch.weights_TB.T.tolist() == [[1.25, 1.25, 1.25, 0, 0], [1.25] * 5]
    assert batch.starts_TB is None
    assert batch.to("meta").weights_TB.device.type == "meta"


@pytest.mark.parametrize("kind", ["hope", "hope_attention", "transformer"])
@pytest.mark.parametrize("documents", ["reset", "carry"])
def test_a_packed_document_is_what_it_is_alone(tmp_path, kind, documents):
    """From the files through the loader and the model: memory, convolution and attention forget at document starts."""
    token_set(tmp_path / "set", 40, 3)
    dataset = TrainingSet(str(tmp_path / "set"), T, 1)
    (batch,) = BatchLoader(dataset, 3, 3, documents=documents, prefetch=False).batches(0)
    memory = MemoryConfig(projection_chunk=4, main_chunk=8)
    config = named(kind, vocab_size=64, width=16, layers=2, heads=2, memory=memory)
    model = Model(config).initialise(1).double()
    packed = model(batch.tokens_TB, starts=batch.starts_TB)[0]
    later = []
    for row in range(3):
        tokens = batch.tokens_TB[:, row]
        starts = [0, *(i + 1 for i in range(T - 1) if tokens[i] == dataset.eos_id), T]
        for begin, end in itertools.pairwise(starts):
            alone = model(tokens[begin:end, None])[0]
            same = torch.allclose(packed[begin:end, row], alone[:, 0], rtol=0, atol=1e-9)
            if begin > 0:
                later.append(same)
            else:
                assert same
    assert len(later) >= 2
    assert all(later) if documents == "reset" else not any(later)
