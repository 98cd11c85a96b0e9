import json

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.errors import DataError
from data_prep.indexed import memmap_tokens, read_header
from data_prep.inspect_tokens import checked_tokenizer, show_document, show_ids, show_window
from data_prep.tokenizer import train_tokenizer


def test_a_document_is_its_text_and_its_place(tiny):
    texts = [json.loads(line)["text"] for line in (tiny.folder / "train.jsonl").read_bytes().splitlines()]
    lengths = read_header(tiny.train_prefix).document_lengths
    shown = show_document(tiny.train_prefix, 2, tiny.tokenizer)
    start = int(lengths[:2].sum())
    assert shown.startswith(
        f"document 2 of {len(texts)}: {lengths[2]} tokens (tokens {start}..{start + lengths[2] - 1},"
        f" byte offset {2 * start} of .bin)\n"
    )
    assert shown.endswith(texts[2] + " <EOS>")
    for outside in (-1, len(texts)):
        with pytest.raises(DataError, match=rf"document {outside} is outside the set; 0 to {len(texts) - 1} works"):
            show_document(tiny.train_prefix, outside, tiny.tokenizer)


def test_resets_stand_where_training_resets(tiny):
    """The places that say RESET are those of the batch's own `starts`."""
    import torch  # noqa: F401 (batches needs it)

    from data_prep.batches import Batch

    encode = tiny.tokenizer.encode
    ids = np.array([*encode("end of one"), 1, *encode("whole"), 1, 1, *encode("begun"), 1, 5])
    shown = show_ids(ids, "reset", tiny.tokenizer)
    marked = [int(line.split()[1].split("..")[0]) for line in shown.splitlines() if "RESET" in line]
    batch = Batch.from_windows([ids], "reset", 1)
    assert marked == batch.starts_TB[:, 0].nonzero().flatten().tolist()
    assert shown.splitlines()[1] == "end of one <EOS>"
    assert "target only" in shown
    carried = show_ids(ids, "carry", tiny.tokenizer)
    assert carried.count("RESET") == 1
    assert carried.count("state carried over") == 3


def test_a_window_is_the_tokens_in_file_order(tiny):
    tokens = memmap_tokens(tiny.train_prefix, read_header(tiny.train_prefix))
    shown = show_window(tiny.train_prefix, 3, 50, "reset", tiny.tokenizer)
    assert shown.startswith("window 3 of ")
    assert show_ids(tokens[150:201].astype(np.int64), "reset", tiny.tokenizer) in shown
    with pytest.raises(DataError, match=r"windows 0 to \d+ work"):
        show_window(tiny.train_prefix, 10**9, 50, "reset", tiny.tokenizer)


def test_the_tokenizer_must_be_the_sets_own(tiny, tmp_path):
    assert checked_tokenizer(tiny.train_prefix, "").sha256 == tiny.tokenizer.sha256
    train_tokenizer(["another text altogether"] * 3, 280, tmp_path / "other.model")
    with pytest.raises(DataError, match=r"other\.model: sha256 .* give that model with --tokenizer"):
        checked_tokenizer(tiny.train_prefix, str(tmp_path / "other.model"))


def test_commands(tiny, copied, capsys):
    assert main(["inspect", tiny.train_prefix, "--document", "0"]) == 0
    assert main(["inspect", tiny.heldout_prefix, "--window", "0", "--seq-len", "32", "--documents", "reset"]) == 0
    assert "<EOS>" in capsys.readouterr().out
    assert main(["inspect", copied.train_prefix, "--sample", "5", "--seq-len", "32"]) == 0
    shown = capsys.readouterr().out
    from data_prep.reading import TrainingSet

    ids = TrainingSet(copied.train_prefix, 32, 1234).sample(5)
    assert show_ids(ids, "carry", tiny.tokenizer) in shown
    assert main(["inspect", tiny.train_prefix, "--document", "99999"]) == 2
