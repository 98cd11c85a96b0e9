"""A small real corpus, its tokenizer and its token files, made once."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from data_prep.corpora.corpus import topic_documents, write_corpus
from data_prep.jsonl import read_texts
from data_prep.manifest import TokenSetManifest
from data_prep.tokenizing.tokenize import tokenize
from data_prep.tokenizing.tokenizer import Tokenizer, train_tokenizer

VOCAB = 1000


@dataclass(frozen=True)
class TinyData:
    """Read-only files shared by the tests of this folder."""

    folder: Path
    tokenizer: Tokenizer
    train: TokenSetManifest

    @property
    def train_prefix(self) -> str:
        return str(self.folder / "train")

    @property
    def heldout_prefix(self) -> str:
        return str(self.folder / "heldout")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    folder = tmp_path_factory.mktemp("tiny")
    write_corpus(folder, list(topic_documents())[:40])
    tokenizer = train_tokenizer(read_texts(folder / "train.jsonl"), VOCAB, folder / "tokenizer.model")
    manifest = tokenize(folder / "train.jsonl", tokenizer, folder / "train")
    tokenize(folder / "heldout.jsonl", tokenizer, folder / "heldout")
    return TinyData(folder, tokenizer, manifest)


@pytest.fixture
def copied(tiny: TinyData, tmp_path: Path) -> TinyData:
    """The same files in a folder of the test's own, to be damaged."""
    for path in tiny.folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return TinyData(tmp_path, tiny.tokenizer, tiny.train)


@pytest.fixture
def existing_model(tiny: TinyData) -> Callable[..., Tokenizer]:
    """Makes a model of somebody else, with sentencepiece's own defaults but for what is given."""

    def train(**settings: Any) -> Tokenizer:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter((tiny.folder / "train.jsonl").read_text().splitlines()),
            model_writer=model,
            vocab_size=600,
            model_type="bpe",
            max_sentence_length=100_000,
            minloglevel=2,
            **settings,
        )
        return Tokenizer(model.getvalue())

    return train
