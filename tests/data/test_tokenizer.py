import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from spectral_lightning.data import BOS, count_token_bytes, train_tokenizer
from spectral_lightning.data.tokenizer import parse_tokenizer

TEXT = ["the singular values of the weights", "the weights of the layer, 1234 of them"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXT), 290)


@given(text=st.text())
def test_any_text_survives_and_its_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert count_token_bytes(tokenizer)[ids].sum() == len(text.encode())


def test_special_token_comes_last_and_has_no_bytes(tokenizer):
    assert tokenizer.get_vocab_size() == 290
    assert tokenizer.token_to_id(BOS) == 289
    assert count_token_bytes(tokenizer)[289] == 0
    assert (count_token_bytes(tokenizer)[:289] > 0).all()


def test_every_text_opens_with_the_special_token(tokenizer):
    assert tokenizer.encode("the layer").tokens[0] == BOS
    assert tokenizer.encode("").tokens == [BOS]


def test_text_cannot_spell_the_special_token(tokenizer):
    text = f"a {BOS} b"
    for subject in (tokenizer, parse_tokenizer(tokenizer.to_str(), "x")):
        assert subject.encode(text).ids.count(289) == 1
        assert subject.decode(subject.encode(text).ids) == text


def test_digits_are_grouped_in_pairs(tokenizer):
    assert all(sum(c.isdigit() for c in token) <= 2 for token in tokenizer.get_vocab())


def test_training_is_deterministic(tokenizer):
    assert train_tokenizer(iter(TEXT), 290).to_str() == tokenizer.to_str()


def test_vocabulary_larger_than_the_text_names_the_largest_possible():
    with pytest.raises(ValueError, match=r"`vocab_size` must be at most (\d+) for this") as caught:
        train_tokenizer(iter(TEXT), 4096)
    largest = int(str(caught.value).split("at most ")[1].split(" ")[0])
    assert train_tokenizer(iter(TEXT), largest).get_vocab_size() == largest


def test_vocabulary_must_hold_all_bytes():
    assert train_tokenizer(iter(TEXT), 257).decode([65]) != ""
    with pytest.raises(ValueError, match="`vocab_size` must be >= 257"):
        train_tokenizer(iter(TEXT), 256)


def test_tokens_that_are_no_valid_text_count_their_raw_bytes():
    tokenizer = train_tokenizer(iter(["\u20ac\u20ac \u20ad\u20ad"] * 3), 259)
    counts = count_token_bytes(tokenizer)
    half = tokenizer.get_vocab()["\u00e2\u0124"]  # the first two bytes of both characters
    assert counts[half] == 2
    assert tokenizer.decode([half]) == "\ufffd"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "`tokenizer` must be a JSON file, but here is not"),
        ("[1]", "must be a file of the `tokenizers` library .* here has no `model`"),
        (Tokenizer(models.BPE()).to_str(), "`tokenizer` must be byte-level, .* of here is None"),
    ],
)
def test_tokenizer_that_cannot_be_used_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        parse_tokenizer(content, "here")


def test_tokenizer_without_the_special_token_is_refused():
    plain = Tokenizer(models.BPE())
    plain.decoder = decoders.ByteLevel()
    with pytest.raises(ValueError, match=r"must know the token <\|bos\|>, but here does not"):
        parse_tokenizer(plain.to_str(), "here")


def test_added_tokens_that_are_text_count_their_bytes(tokenizer):
    fields = json.loads(tokenizer.to_str())
    fields["added_tokens"].append(
        fields["added_tokens"][0] | {"id": 290, "content": "\u20ac", "special": False}
    )
    counts = count_token_bytes(parse_tokenizer(json.dumps(fields), "here"))
    assert counts[289:].tolist() == [0, 3]
