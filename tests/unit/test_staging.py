"""Host memory of a save: reserved once, then only written."""

import torch

from parallel.checkpoint.staging import HostMemory
from parallel.optimizer.checkpoint_views import StatePiece


def pieces(value: float) -> list[StatePiece]:
    return [
        StatePiece("master", "a", 0, torch.full((3,), value)),
        StatePiece("master", "b", 4, torch.full((2,), -value)),
        StatePiece("count", "a", 0, torch.full((5,), 7, dtype=torch.int64)),
    ]


def test_what_was_reserved_is_what_a_copy_takes():
    memory = HostMemory(torch.device("cpu"))
    assert memory.reserve(pieces(1.0)) == {torch.float32: 5, torch.int64: 5}
    reserved = {dtype: buffer.data_ptr() for dtype, buffer in memory._buffers.items()}
    for value in (2.0, 3.0):
        copies = memory.copy(pieces(value))
        assert copies[0].values.data_ptr() == reserved[torch.float32]
        assert copies[2].values.data_ptr() == reserved[torch.int64]
        assert [piece.values.tolist() for piece in copies] == [[value] * 3, [-value] * 2, [7] * 5]
        assert [(piece.key, piece.name, piece.offset) for piece in copies[:2]] == [
            ("master", "a", 0),
            ("master", "b", 4),
        ]


def test_more_than_was_reserved_gets_memory_of_its_own():
    memory = HostMemory(torch.device("cpu"))
    memory.reserve(pieces(1.0)[:1])
    assert [len(piece.values) for piece in memory.copy(pieces(2.0))] == [3, 2, 5]
