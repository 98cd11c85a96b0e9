"""Text from a model that is cut over two tensor-parallel ranks equals the text of one device."""

import contextlib
import io
import json
import os
from pathlib import Path

import pytest
import torch
from models import named
from multirank import run_ranks
from stored import store

from data_prep.tokenizing.tokenizer import train_tokenizer
from hope.config import CmsConfig, ModelConfig
from hope.generate import __main__ as program
from hope.generate.errors import GenerationError
from hope.generate.options import check, parser_of
from hope.memory.config import MemoryConfig
from hope.memory.linear_config import LinearConfig
from hope.mixers.mamba2 import Mamba2Config
from hope.mixers.titans_attention import GateConfig
from hope.mixers.titans_context import ContextConfig
from hope.model import Model
from hope.pretrained import open_pretrained
from parallel.compute.generation import on_tensor_ranks
from parallel.start import groups

TEXT = "The state of a memory is a matrix. It is read, and then it is written again.\n"
PROMPTS = ["The state of", "It", "a matrix. It is read, and"]


def run(args: list[str]) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    torch.set_num_threads(1)
    if os.environ.get("RANK") == "1":  # it looks before the newest checkpoint is there
        early = lambda path: Path(path) / "checkpoints/step_00000002" if Path(path).name == "run" else path
        program.open_pretrained = lambda path: open_pretrained(early(path))  # the process ends with this call
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program.main(args)
    return code, out.getvalue(), err.getvalue()


def test_text_of_two_tensor_ranks_is_that_of_one_device(tmp_path):
    tokenizer = train_tokenizer([TEXT] * 20, 300, tmp_path / "tokenizer.model")
    (tmp_path / "train.manifest.json").write_text(json.dumps({"sha256_tokenizer": tokenizer.sha256}))
    mixers = {
        "hope": MemoryConfig(projection_chunk=2, main_chunk=4),
        "linear": LinearConfig(rule="retnet"),
        "mamba2": Mamba2Config(state=12, chunk=4),
        "titans_mag": GateConfig(chunk=4, window=5, persistent=2, theta_max=0.1),
        "titans_mac": ContextConfig(chunk=2, segment=4, persistent=2, theta_max=0.1),
    }
    cms = CmsConfig(periods=[1, 2], hidden=16)
    pattern = ["hope", "attention", "linear", "mamba2", "titans_mag", "titans_mac"]
    config = ModelConfig(pattern, 304, 32, 6, 4, True, mixers=mixers, cms=cms)
    model = Model(config).initialise(1)
    with torch.no_grad():
        model.embedding.weight.mul_(5)  # neither uniform nor certain
    data = {"data": {"train": str(tmp_path / "train")}}
    store(tmp_path / "run", Model(config).initialise(2), 2, data)
    store(tmp_path / "run", model, 3, data)
    (tmp_path / "prompts").write_text("\n".join(PROMPTS))
    args = [str(tmp_path / "run"), "--batch", str(tmp_path / "prompts"), "--dtype", "float64"]
    args += ["--tokens", "24", "--prefill-chunk", "3"]
    code, wanted, _ = run(args)
    assert code == 0
    assert len({json.loads(line)["text"] for line in wanted.splitlines()}) == len(PROMPTS)
    first, second = run_ranks(run, 2, args, timeout=120)
    assert first[:2] == (0, wanted)
    assert second[:2] == (0, "")  # one rank speaks
    assert "float64 on 2 x cpu" in first[2]


def test_what_cannot_be_cut_is_refused():
    args = parser_of("").parse_args(["run", "--prompt", "a", "--state-out", "s", "--device", "cpu"])
    with pytest.raises(GenerationError, match=r"(?s)--state-out holds a state.*2 were started.*--device goes with one"):
        check(args, 2)
    check(args, 1)
    odd = Model(named(vocab_size=300, width=9, layers=1, heads=3))
    ranks = groups.Ranks(0, 2, 0, 0, 1, torch.device("cpu"), tp_size=2)
    with pytest.raises(GenerationError, match=r"over 2 processes: heads 3 is not a multiple of tensor 2; start 1$"):
        on_tensor_ranks(odd, ranks)
