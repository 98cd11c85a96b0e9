import json
import shutil

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.errors import DataError
from data_prep.indexed import memmap_tokens, read_header
from data_prep.inspection.tokens import checked_tokenizer, show_document, show_ids, show_window
from data_prep.tokenizing.tokenizer import train_tokenizer
from data_prep.training.index_store import open_store


def test_a_document_is_its_text_and_its_place(tiny):
    texts = [json.loads(line)["text"] for line in (tiny.folder / "train.jsonl").read_bytes().splitlines()]
    lengths = read_header(tiny.train_prefix).document_lengths
    shown = show_document(tiny.train_prefix, 2)
    start = int(lengths[:2].sum())
    assert shown.startswith(
        f"document 2 of {len(texts)}: {lengths[2]} tokens ({start}..{start + lengths[2] - 1} of {tiny.train_prefix})\n"
    )
    assert shown.endswith(texts[2] + " <EOS>")
    for outside in (-1, len(texts)):
        with pytest.raises(DataError, match=rf"document {outside} is outside the set; 0 to {len(texts) - 1} works"):
            show_document(tiny.train_prefix, outside)


def test_resets_stand_where_training_resets(tiny):
    """The places that say RESET are those of the batch's own `starts`."""
    import torch  # noqa: F401 (batches needs it)

    encode = tiny.tokenizer.encode
    ids = np.array([*encode("end of one"), 1, *encode("whole"), 1, 1, *encode("begun"), 1, 5])
    shown = show_ids(ids, "reset", tiny.tokenizer)
    marked = [int(line.split()[1].split("..")[0]) for line in shown.splitlines() if "RESET" in line]
    from data_prep.training.batches import batch_of_windows

    batch = batch_of_windows([ids], "reset", 1)
    assert marked == batch.starts_TB[:, 0].nonzero().flatten().tolist()
    assert shown.splitlines()[1] == "end of one <EOS>"
    assert "target only" in shown
    carried = show_ids(ids, "carry", tiny.tokenizer)
    assert carried.count("RESET") == 1
    assert carried.count("state carried over") == 3


def test_the_recorded_tokenizer_is_found_and_a_missing_one_asked_for(copied, tmp_path, capsys):
    """Advice to train one would give a model with other ids."""
    (tmp_path / "models").mkdir()
    model = (tmp_path / "tokenizer.model").rename(tmp_path / "models" / "mine.model")
    command = ["tokenize", "--input", f"{tmp_path}/heldout.jsonl", "--tokenizer", str(model)]
    assert main([*command, "--out", f"{tmp_path}/new", "--workers", "1"]) == 0
    recorded = json.loads((tmp_path / "new.manifest.json").read_bytes())
    assert (recorded["tokenizer"], recorded["sha256_tokenizer"]) == (str(model), copied.tokenizer.sha256)
    look = ["inspect", f"{tmp_path}/new", "--document", "0"]
    assert main(look) == 0
    model.rename(tmp_path / "moved.model")
    capsys.readouterr()
    assert main(look) == 2
    message = capsys.readouterr().err
    assert f"its tokenizer, sha256 {copied.tokenizer.sha256[:12]} is not there ({model}, " in message
    assert "--tokenizer FILE names it" in message
    assert "train" not in message
    assert main([*look, "--tokenizer", f"{tmp_path}/moved.model"]) == 0
    assert main([*command, "--out", f"{tmp_path}/new"]) == 2
    assert f"{model}: no such file; --tokenizer FILE names the model" in capsys.readouterr().err


def test_a_window_is_the_tokens_in_file_order(tiny):
    tokens = memmap_tokens(tiny.train_prefix, read_header(tiny.train_prefix))
    shown = show_window(tiny.train_prefix, 3, 50, "reset")
    assert shown.startswith("window 3 of ")
    assert show_ids(tokens[150:201].astype(np.int64), "reset", tiny.tokenizer) in shown
    with pytest.raises(DataError, match=r"windows 0 to \d+ work"):
        show_window(tiny.train_prefix, 10**9, 50, "reset")
    with pytest.raises(DataError, match="--seq-len 0; 1 or more works"):
        show_window(tiny.train_prefix, 0, 0, "reset")


def test_the_tokenizer_must_be_the_sets_own(tiny, tmp_path):
    store = open_store(tiny.train_prefix)
    assert checked_tokenizer(store, "").sha256 == tiny.tokenizer.sha256
    train_tokenizer(["another text altogether"] * 3, 280, tmp_path / "other.model")
    with pytest.raises(DataError, match=r"other\.model: sha256 .* give that model with --tokenizer"):
        checked_tokenizer(store, str(tmp_path / "other.model"))


def test_commands(tiny, copied, capsys):
    assert main(["inspect", tiny.train_prefix, "--document", "0"]) == 0
    assert main(["inspect", tiny.heldout_prefix, "--window", "0", "--seq-len", "32", "--documents", "reset"]) == 0
    assert "<EOS>" in capsys.readouterr().out
    assert main(["inspect", copied.train_prefix, "--sample", "5", "--seq-len", "32"]) == 0
    shown = capsys.readouterr().out
    from data_prep.training.reading import TrainingSet

    ids = TrainingSet(copied.train_prefix, 32, 1234).sample(5)
    assert show_ids(ids, "carry", tiny.tokenizer) in shown
    assert main(["inspect", tiny.train_prefix, "--document", "99999"]) == 2


def blend_file(copied):
    """A blend of the set and of a raw folder with the same ids; returns the YAML file."""
    folder = copied.folder
    (folder / "raw").mkdir()
    shutil.copy(folder / "heldout.bin", folder / "raw/a.bin")
    (folder / "raw/raw.json").write_text(json.dumps({"eos_id": copied.tokenizer.eos_id, "vocab_size": 1000}))
    sources = [f"{{name: {name}, train: {folder}/{name}, heldout: {folder}/heldout}}" for name in ("train", "raw")]
    (folder / "run.yaml").write_text(f"data: {{sources: [{', '.join(sources)}]}}\ntrain: {{seq_len: 32}}\n")
    return str(folder / "run.yaml")


@pytest.mark.parametrize("documents", ["carry", "reset", "doc"])
def test_a_sample_of_a_run_is_what_training_reads(copied, capsys, documents):
    from data_prep.training.blend import open_blend
    from data_prep.training.index_build import read_config

    path, override = blend_file(copied), f"data.documents={documents}"
    blend = open_blend(*read_config(path, [override]))
    n = 2 * len(blend.sources[0])  # equal weights: sample n is the first of the first source's second epoch
    for number, place in ((0, "train, epoch 0, 0 of"), (1, "raw, epoch 0, 0 of"), (n, "train, epoch 1, 0 of")):
        assert main(["inspect", path, override, "--sample", str(number)]) == 0
        title, _, text = capsys.readouterr().out.partition("\n")
        assert f"/{place}" in title
        assert f"{blend.real_targets(number)} targets" in title
        ids = blend.sample(number)
        assert text.rstrip("\n") == show_ids(ids[ids >= 0], documents, copied.tokenizer).rstrip("\n")


def test_raw_folders_are_shown_too(copied, capsys):
    blend_file(copied)
    assert main(["inspect", f"{copied.folder}/raw", "--document", "0"]) == 0
    raw = capsys.readouterr().out.partition("\n")[2]
    assert main(["inspect", copied.heldout_prefix, "--document", "0"]) == 0
    assert capsys.readouterr().out.partition("\n")[2] == raw


def test_overrides_need_a_file(tiny, capsys):
    assert main(["inspect", tiny.train_prefix, "data.seed=3", "--sample", "0"]) == 2
    assert "data.seed=3 goes with a YAML file" in capsys.readouterr().err
