import re

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError
from tiny import write_documents

from data_prep.config import DataConfig
from data_prep.manifest import TokenSetManifest


@pytest.fixture
def config(copied):
    return DataConfig(train=copied.train_prefix, heldout=copied.heldout_prefix)


def problems(config, vocab_size=1000, seq_len=64):
    return list(config.problems(vocab_size, seq_len))


def only(found, path):
    assert [p[0] for p in found] == [path], found
    return found[0][1:]


def test_good_data_has_no_problems(config):
    assert problems(config) == []
    assert problems(config, vocab_size=1024) == []


def test_unset_and_missing_sets_say_how_to_make_them(tmp_path):
    found = problems(DataConfig(heldout=str(tmp_path / "absent")))
    assert [p[0] for p in found] == ["data.train", "data.heldout"]
    assert found[0][1] == "is not set"
    assert "absent.idx: no such file" in found[1][1]
    assert all("`python -m data_prep quickstart --out data/quickstart`" in p[2] for p in found)


@pytest.mark.parametrize("suffix", ["bin", "idx", "manifest.json"])
def test_each_missing_file_is_named(config, copied, suffix):
    (copied.folder / f"heldout.{suffix}").unlink()
    what, _ = only(problems(config), "data.heldout")
    assert f"heldout.{suffix}: no such file" in what


def test_truncated_bin(config, copied):
    path = copied.folder / "train.bin"
    path.write_bytes(path.read_bytes()[:100])
    what, _ = only(problems(config), "data.train")
    assert "train.bin: 100 bytes" in what


def test_vocabulary_of_the_data_must_fit_the_model(config):
    what, fix = only(problems(config, vocab_size=999), "model.vocab_size")
    assert "999" in what
    assert fix.startswith("model.vocab_size=1000")


def test_set_shorter_than_one_window(config, copied):
    tokens = copied.train.tokens
    found = problems(config, seq_len=tokens)
    assert [p[0] for p in found] == ["data.train", "data.heldout"]
    works = int(re.search(r"at most (\d+)", found[1][2])[1])
    assert works < tokens
    assert problems(config, seq_len=works) == []
    assert len(problems(config, seq_len=works + 1)) == 1


@pytest.mark.timeout(20)
def test_set_without_documents(config, copied):
    write_documents(copied.train_prefix, 300, [])
    TokenSetManifest(0, 0, 0, 0.0, 300, 1, "", "", "", "").save(copied.train_prefix)
    what, _ = only(problems(config), "data.train")
    assert "0 documents" in what


def test_heldout_of_another_tokenizer_or_equal_to_train(config, copied):
    config.heldout = config.train
    what, _ = only(problems(config), "data.heldout")
    assert "same tokens" in what
    write_documents(copied.heldout_prefix, 300, [range(200)])
    TokenSetManifest(1, 200, 1, 1.0, 300, 1, "", "", "other", "").save(copied.heldout_prefix)
    config.heldout = copied.heldout_prefix
    what, _ = only(problems(config), "data.heldout")
    assert "tokenizer" in what


def test_values_outside_the_choices(config):
    config.documents = "mix"
    config.seed = -1
    assert [p[0] for p in problems(config)] == ["data.documents", "data.seed"]


def test_structured_config_refuses_other_document_modes():
    section = OmegaConf.structured(DataConfig)
    section.documents = "reset"
    assert OmegaConf.to_object(section).documents == "reset"
    with pytest.raises(ValidationError, match="carry"):
        section.documents = "mix"
