"""A tokenizer of this project as one of Hugging Face's `transformers`: the same ids by the same code.

Exports in that layout name it in tokenization_hope.py. Nothing else imports this file, which needs the extra `hf`.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from data_prep.tokenizing.tokenizer import Tokenizer


class HopeTokenizer(PreTrainedTokenizer):
    """No token is added before or after a text, and special tokens in a text are text."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 (as the base class has it)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **more: Any) -> None:
        self._own = Tokenizer.load(vocab_file)
        self.vocab_file = vocab_file
        self._pieces = self._own.pieces()
        self._ids = {piece: number for number, piece in enumerate(self._pieces)}
        own = {"eos_token": self._pieces[self._own.eos_id]}
        if self._own.pad_id >= 0:
            own["pad_token"] = self._pieces[self._own.pad_id]
        super().__init__(**{**own, **more})

    @property
    def vocab_size(self) -> int:
        return self._own.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **more: Any) -> list[str]:
        """The names of the tokens. The base class would strip and cut the text first."""
        return [self._pieces[number] for number in self._own.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._own.decode([self._ids[token] for token in tokens])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the model file."""
        name = f"{filename_prefix}-tokenizer.model" if filename_prefix else "tokenizer.model"
        return (str(shutil.copyfile(self.vocab_file, Path(save_directory) / name)),)
