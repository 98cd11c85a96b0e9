import pytest

from data_prep.errors import DataError
from data_prep.tokenizer import Tokenizer, train_tokenizer

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
