"""Exports in Hugging Face's layout give our logits and our text in `transformers`, and its Llamas give theirs here."""

import json
import os
import shutil

import pytest
import torch
from models import named
from stored import store

from data_prep.tokenizing.tokenizer import Tokenizer, train_tokenizer
from hope.config import CmsConfig, ModelConfig
from hope.memory.config import MemoryConfig
from hope.memory.linear_config import LinearConfig
from hope.mixers.mamba2 import Mamba2Config
from hope.model import Model
from hope.pretrained import load, open_pretrained
from hope.stored.errors import NothingStored, UnfitWeights
from parallel.checkpoint.__main__ import main
from parallel.checkpoint.export import export

TEXT = "the cat sat on the mat and the dog sat on the log, as they do.\n\tIndented  twice </s> ▁ é漢"
PARTS = {"static": "projected", "output_gate": "sigmoid", "alpha_spread": 1.0, "erase_max": 1.9}  # off by default
SMALL = MemoryConfig(projection_chunk=4, main_chunk=8, **PARTS)


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    os.environ.update(HF_HOME=str(tmp_path_factory.mktemp("hf")), HF_HUB_OFFLINE="1")  # read when it is imported
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run with a tokenizer, exported; (folder of the export, model)."""
    root = tmp_path_factory.mktemp("exported")
    tokenizer = train_tokenizer([TEXT * 20], 290, root / "data/tokenizer.model")
    said = {"sha256_tokenizer": tokenizer.sha256, "tokenizer": "", "eos_id": tokenizer.eos_id}
    (root / "data/train.manifest.json").write_text(json.dumps(said))
    config = ModelConfig(
        ["hope", "attention"], tokenizer.vocab_size, 16, 2, 2, mixers={"hope": SMALL}, cms=CmsConfig(hidden=16)
    )
    model = Model(config).initialise(1)
    with torch.no_grad():  # far from uniform, so that greedy text is no accident of rounding
        for parameter in model.parameters():
            parameter.mul_(1.5)
    store(root / "run", model, 7, {"data": {"train": str(root / "data/train")}, "train": {"seq_len": 32}})
    assert main(["export", str(root / "run"), "--out", str(root / "out"), "--format", "hf"]) == 0
    return root / "out", model


def greedy(model: Model, ids: list[int], count: int) -> list[int]:
    """By whole calls, without any state."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor(ids).unsqueeze(1), keep_state=False)[0][-1, 0].argmax()))
    return ids


def test_transformers_give_our_logits_and_our_text(transformers, exported):
    out, model = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    own = Tokenizer.load(out / "tokenizer.model")
    assert ids[0].tolist() == own.encode(TEXT)
    assert tokenizer.decode(ids[0]) == TEXT
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (own.eos_id, own.pad_id)
    batch = torch.stack([ids[0, :20], ids[0, 5:25]])
    with torch.no_grad():
        expected = model(batch.T)[0].transpose(0, 1)
        found = theirs(batch, labels=batch)
    assert torch.equal(found.logits, expected)
    assert found.loss == pytest.approx(
        float(torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), batch[:, 1:].flatten())), abs=1e-6
    )
    wanted = torch.tensor([greedy(model, row.tolist(), 12) for row in batch])
    assert len(set(wanted[0, 20:].tolist())) > 2
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for cached in (True, False):
        assert torch.equal(theirs.generate(batch, use_cache=cached, **settings), wanted), cached
    beams = [theirs.generate(batch, use_cache=cached, num_beams=3, **settings) for cached in (True, False)]
    assert torch.equal(*beams)
    with pytest.raises(ValueError, match="padded prompts are not supported"):
        theirs(batch, attention_mask=torch.tensor([[0] + [1] * 19, [1] * 20]))


def test_a_cached_step_sees_one_token(transformers, exported):
    """The constant cost of a step is what the cache is for."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported[0], trust_remote_code=True)
    seen = []
    theirs.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    theirs.generate(torch.arange(3, 12).unsqueeze(0), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert seen == [9, 1, 1, 1]


FAMILY = {
    "kda": ("linear", LinearConfig(rule="kda", chunk=4)),
    "retnet": ("linear", LinearConfig(rule="retnet", chunk=4)),
    "mamba2": ("mamba2", Mamba2Config(state=12, chunk=4)),
}


@pytest.mark.parametrize("kind", list(FAMILY))
def test_the_family_too(transformers, tmp_path, kind):
    name, section = FAMILY[kind]
    model = Model(ModelConfig([name, "attention"], 40, 16, 2, 2, mixers={name: section})).initialise(1)
    store(tmp_path / "run", model, 7, {"train": {"seq_len": 32}})
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--format", "hf"]) == 0
    assert open_pretrained(tmp_path / "out").model.config == model.config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    batch = torch.arange(26).view(2, 13) * 7 % 40
    with torch.no_grad():
        assert torch.equal(theirs(batch).logits, model(batch.T)[0].transpose(0, 1))
    wanted = torch.tensor([greedy(model, row.tolist(), 8) for row in batch])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for cached in (True, False):
        assert torch.equal(theirs.generate(batch, use_cache=cached, **settings), wanted), cached


def test_our_own_reader_reads_that_export_too(exported):
    out, model = exported
    found = open_pretrained(out)
    others = dict(found.model.named_parameters())
    assert all(torch.equal(parameter, others[name]) for name, parameter in model.named_parameters())
    assert (found.step, found.seq_len, found.tokenizer_path) == (7, 32, out / "tokenizer.model")


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_an_imported_llama_has_the_originals_logits(transformers, tmp_path, capsys, groups, tied):
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=groups, rms_norm_eps=1e-4, rope_parameters={"rope_theta": 500.0, "rope_type": "default"},
        tie_word_embeddings=tied, initializer_range=0.1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(1)  # theirs are drawn from torch's own generator
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").is_file()
    with pytest.raises(NothingStored, match=r"parallel\.checkpoint import"):
        load(tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    ours = open_pretrained(tmp_path / "ours")
    assert ours.seq_len == 64
    ids = torch.arange(60).view(2, 30) * 7 % 40
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours.model(ids.T)[0].transpose(0, 1)
    # theirs takes norms and rotations in fp32, whatever the weights are; epsilon 1e-6 would be 1e-3 away
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
    assert expected.std() > 0.1
    capsys.readouterr()


def test_what_our_model_cannot_compute_is_refused_by_name(transformers, tmp_path, capsys):
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/config.json"
    good = json.loads(path.read_text())
    with pytest.raises(UnfitWeights, match="holds a llama of another program"):
        load(tmp_path / "theirs")
    for change, said in (
        (
            {"attention_bias": True, "hidden_act": "gelu"},
            "attention_bias is true: linear maps have no bias here; hidden",
        ),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; only llama"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope scaling of type llama3"),
        ({"head_dim": 16}, "head_dim 16 times 4 heads is not hidden_size 32"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"intermediate_size": 47}, "do not fit: blocks.0.cms"),
    ):
        path.write_text(json.dumps({**good, **change}))
        assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 2
        assert said in capsys.readouterr().err
    path.write_text(json.dumps(good))
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "theirs")]) == 2
    (tmp_path / "theirs/model.safetensors").unlink()
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 2
    assert "lacks model.safetensors; only safetensors are read" in capsys.readouterr().err


def test_a_tokenizer_json_comes_along_in_both_layouts(transformers, exported, tmp_path):
    from json_tokenizer import byte_level

    (tmp_path / "data").mkdir()
    path = byte_level(tmp_path / "data/tokenizer.json", [TEXT * 9])
    own = Tokenizer.load(path)
    said = {"sha256_tokenizer": own.sha256, "tokenizer": str(path), "eos_id": own.eos_id}
    (tmp_path / "data/train.manifest.json").write_text(json.dumps(said))
    source = store(tmp_path / "run", Model(named(vocab_size=own.vocab_size, width=16, layers=1, heads=2)), 1,
                   {"data": {"train": str(tmp_path / "data/train")}})  # fmt: skip
    shutil.copytree(exported[0], tmp_path / "out")  # an earlier export, with another tokenizer
    for layout in ("hope", "hf"):
        export(source, tmp_path / "out", layout=layout)
        assert open_pretrained(tmp_path / "out").tokenizer_path == tmp_path / "out/tokenizer.json"
        assert not (tmp_path / "out/tokenizer.model").exists()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert theirs(TEXT).input_ids == own.encode(TEXT)
    assert theirs.eos_token_id == own.eos_id
