import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.jsonl import read_texts
from data_prep.tokenizing.tokenizer import Tokenizer, train_tokenizer

HOSTILE = [
    "",
    " ",
    "\n",
    "\r\n and \r alone",
    "tab\t\ttwice\t",
    "  double  spaces   at the ends  ",
    "emoji \U0001f600\U0001f468\u200d\U0001f469 and CJK 漢字かな한글",
    "</s><s><unk><pad><0x41> are plain text",
    "a literal \u2581 and \u2581\u2581 in words\u2581",
    "\u2047 \ufeff bom \x00 nul \x7f \u0085 \u2028 \u00a0 \u00ad \u0301",
    "e\u0301 stays decomposed, \u00e9 composed, \ufb01 a ligature",
    "\n\n\n    indented\n\tcode()\n",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_round_trip_is_exact(tiny, text):
    assert tiny.tokenizer.decode(tiny.tokenizer.encode(text)) == text


def test_round_trip_of_every_plane(tiny):
    codes = [c for c in range(0, 0x110000, 17) if not 0xD800 <= c < 0xE000]
    texts = ["".join(f"a{chr(c)} {chr(c)}" for c in codes[i : i + 100]) for i in range(0, len(codes), 100)]
    assert [tiny.tokenizer.decode(ids) for ids in tiny.tokenizer.encode_batch(texts, 2)] == texts


def test_lone_surrogates_are_replaced_and_pairs_joined(tiny):
    ids = tiny.tokenizer.encode("a\ud800b \ud83d\ude00 \udc00")
    assert tiny.tokenizer.decode(ids) == "a\ufffdb \U0001f600 \ufffd"


def test_special_tokens_are_distinct_and_never_come_from_text(tiny):
    tokenizer = tiny.tokenizer
    assert len({tokenizer.eos_id, tokenizer.pad_id, 0}) == 3
    ids = {i for text in HOSTILE for i in tokenizer.encode(text)}
    assert not ids & {tokenizer.eos_id, tokenizer.pad_id, 0}


def test_newline_is_one_token_of_its_own(tiny):
    first_byte = tiny.tokenizer.encode("\x00")[0]
    for text in ("a\nb", "a\tb"):
        ids = tiny.tokenizer.encode(text)
        assert len(ids) == 3
        assert ids[1] < first_byte  # as a byte it would stand among the 256 byte pieces


def test_training_is_deterministic_and_loading_gives_the_same_model(tmp_path):
    texts = ["The quick brown fox jumps over the lazy dog.\n" * 20, "x" * 5000 + "qz" * 5000]
    trained = [train_tokenizer(texts, 300, tmp_path / f"{i}.model") for i in range(2)]
    assert trained[0].sha256 == trained[1].sha256 == Tokenizer.load(tmp_path / "0.model").sha256
    assert trained[0].vocab_size == 300
    assert len(trained[0].encode("qz" * 500)) < 100  # all of the long line was seen, not dropped or cut off


def test_too_large_a_vocabulary_names_the_largest_that_works(tmp_path):
    texts = ["the quick brown fox jumps"] * 3
    with pytest.raises(DataError, match=r"8192 is too large .* largest that works is \d+") as caught:
        train_tokenizer(texts, 8192, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []
    largest = int(str(caught.value).split()[-1])
    assert train_tokenizer(texts, largest, tmp_path / "t.model").vocab_size == largest
    with pytest.raises(DataError):
        train_tokenizer(texts, largest + 1, tmp_path / "u.model")


def test_too_small_a_vocabulary_names_the_smallest_that_works(tmp_path):
    texts = ["the quick brown fox jumps"] * 3
    with pytest.raises(DataError, match=r"smallest that works is \d+") as caught:
        train_tokenizer(texts, 262, tmp_path / "t.model")
    smallest = int(str(caught.value).split()[-1])
    assert train_tokenizer(texts, smallest, tmp_path / "t.model").vocab_size == smallest
    with pytest.raises(DataError):
        train_tokenizer(texts, smallest - 1, tmp_path / "u.model")


def test_empty_text_is_an_error(tmp_path):
    with pytest.raises(DataError):
        train_tokenizer([], 300, tmp_path / "t.model")


def test_missing_and_broken_model_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.model: no such file"):
        Tokenizer.load(tmp_path / "absent.model")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"broken\.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path / "broken.model")


@pytest.fixture(scope="module")
def unigram(tiny, tmp_path_factory):
    texts = list(read_texts(tiny.folder / "train.jsonl"))
    return train_tokenizer(texts, 600, tmp_path_factory.mktemp("unigram") / "u.model", "unigram")


def test_unigram_round_trip_is_exact(unigram):
    assert unigram.failures(HOSTILE) == []
    assert unigram.vocab_size == 600


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("ab the\n\t\r.\u00e9\u6f22")))
def test_cutting_at_newlines_changes_no_token(tiny, unigram, kind, text):
    tokenizer = tiny.tokenizer if kind == "bpe" else unigram
    whole = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    assert tokenizer.encode(text) == whole.encode(text)


def test_real_text_is_encoded_as_a_whole_would_be(tiny, unigram):
    texts = list(read_texts(tiny.folder / "train.jsonl"))
    assert any(text.count("\n") > 100 for text in texts)
    for tokenizer in (tiny.tokenizer, unigram):
        whole = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
        assert tokenizer.encode_batch(texts) == whole.encode(texts)


def test_a_llama_style_model_is_accepted(existing_model):
    """Byte fallback, no normalisation, a space before every text, no padding token."""
    llama = existing_model(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
    assert (llama.eos_id, llama.pad_id) == (2, -1)
    with_mark = [text for text in HOSTILE if "\u2581" in text]
    assert llama.failures(HOSTILE) == with_mark  # its U+2581 is a space; nothing can be done from outside
    assert llama.decode(llama.encode("a\u2581b")) == "a b"
    whole = sentencepiece.SentencePieceProcessor(model_proto=llama.model_bytes)
    assert llama.encode_batch(HOSTILE) == whole.encode(HOSTILE)


def test_what_another_model_changes_is_told(existing_model):
    changing = existing_model()
    assert changing.failures(["two  spaces", "plain words"]) == ["two  spaces"]


def test_an_empty_file_is_called_so(capfd):
    with pytest.raises(DataError, match=r"tokenizer\.model: is empty; `tokenizer train` makes a model"):
        Tokenizer(b"", "tokenizer.model")
    assert capfd.readouterr().err == ""  # sentencepiece had complained there
