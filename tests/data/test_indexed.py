import numpy as np
import pytest
import torch
from tiny import write_documents

from data_prep.errors import DataError
from data_prep.indexed import IndexedWriter, check_bin, dtype_for, memmap_tokens, read_header

DOCUMENTS = [[1, 2, 3], [7], [], list(range(200)), [0, 255, 256, 299]]


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500, 100_000])
@pytest.mark.parametrize("documents", [DOCUMENTS, []], ids=["documents", "none"])
def test_bytes_are_those_of_megatrons_builder(tmp_path, vocab_size, documents):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    write_documents(tmp_path / "ours", vocab_size, documents)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for ids in documents:
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        ours, theirs = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("ours", "theirs"))
        assert ours == theirs, suffix


def test_what_is_written_is_read(tmp_path):
    write_documents(tmp_path / "a", 300, DOCUMENTS)
    header = read_header(tmp_path / "a")
    check_bin(tmp_path / "a", header)
    assert header.dtype == dtype_for(300) == np.uint16
    assert header.document_lengths.tolist() == [len(ids) for ids in DOCUMENTS]
    assert header.tokens == 208
    assert memmap_tokens(tmp_path / "a", header).tolist() == [i for ids in DOCUMENTS for i in ids]


def write_a_broken_second_document(prefix):
    with IndexedWriter(prefix, 300) as writer:
        writer.add_encoded(b"\0\0", np.array([1]))
        writer.add_encoded(b"\0\0\0", np.array([2]))


def test_an_error_leaves_nothing_and_keeps_what_was_there(tmp_path):
    write_documents(tmp_path / "a", 300, [[1, 2]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=r"a\.bin: 3 bytes for 2 tokens of 2 bytes"):
        write_a_broken_second_document(tmp_path / "a")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("change", [-1, -100, 2], ids=["odd", "short", "long"])
def test_a_bin_of_the_wrong_size_is_detected(tmp_path, change):
    write_documents(tmp_path / "a", 300, DOCUMENTS)
    data = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes((data + b"\0" * 2)[: len(data) + change])
    with pytest.raises(DataError, match=rf"a\.bin: {416 + change} bytes, .* = 416 bytes"):
        check_bin(tmp_path / "a", read_header(tmp_path / "a"))


@pytest.mark.parametrize("size", [0, 20, 40])
def test_a_truncated_idx_is_detected(tmp_path, size):
    write_documents(tmp_path / "a", 300, DOCUMENTS)
    (tmp_path / "a.idx").write_bytes((tmp_path / "a.idx").read_bytes()[:size])
    with pytest.raises(DataError, match=rf"a\.idx: {size} bytes"):
        read_header(tmp_path / "a")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.idx").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="not a Megatron index"):
        read_header(tmp_path / "a")
    with pytest.raises(DataError, match=r"b\.idx: no such file"):
        read_header(tmp_path / "b")
