import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from spectral_lightning.data import train_tokenizer
from spectral_lightning.data.vocabulary import (
    build_vocabulary,
    ids_of_types,
    parse_vocabulary,
    type_bytes,
)

# No byte order mark, which only the start of a file may hold.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\ufeff"))
WORDS = ["the", "cat", "<unk>", "The", "caf\u00e9"]


def vocab(tokenizer):
    return sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)


def test_ids_are_ranks_in_sorted_order():
    assert vocab(build_vocabulary(WORDS, "word")) == ["<unk>", "The", "caf\u00e9", "cat", "the"]
    assert vocab(build_vocabulary("hello <unk", "char")) == sorted(set("hello <unk"))
    assert vocab(build_vocabulary(["2", "10"], "int")) == [str(number) for number in range(11)]


def test_repeated_types_have_one_id():
    assert build_vocabulary([*WORDS, "<unk>", "cat"], "word").get_vocab_size() == len(WORDS)


@given(text=TEXTS)
def test_text_is_cut_as_python_cuts_it(text):
    words = build_vocabulary([*text.split(), "<unk>"], "word")
    assert words.encode(text).tokens == text.split()
    assert words.decode(words.encode(text).ids) == " ".join(text.split())
    characters = build_vocabulary([*text, "<unk>"], "char")
    assert characters.encode(text).tokens == list(text)
    assert characters.decode(characters.encode(text).ids) == text


def test_unknown_words_are_unk_also_in_prompts():
    tokenizer = build_vocabulary(WORDS, "word")
    assert tokenizer.encode("the dog <unk>").tokens == ["the", "<unk>", "<unk>"]
    tokenizer = build_vocabulary([*"<abc>", "<unk>"], "char")
    assert tokenizer.encode("<unk>").tokens == ["<", "<unk>", "<unk>", "<unk>", ">"]


def test_integers_are_their_own_ids():
    tokenizer = build_vocabulary(["300", "5"], "int")
    assert tokenizer.encode("5 0 299").ids == [5, 0, 299]
    assert tokenizer.decode([5, 0, 299]) == "5 0 299"


@pytest.mark.parametrize("unit", ["word", "char"])
def test_bytes_of_all_tokens_are_the_bytes_of_the_text(unit):
    text = "na\u00efve caf\u00e9 \U0001f600 a"
    tokenizer = build_vocabulary(text.split() if unit == "word" else text, unit)
    counted = type_bytes(tokenizer, unit)[tokenizer.encode(text).ids].sum()
    assert counted == len(text.encode()) + (unit == "word")  # the last word has its space, too


def test_unk_stands_for_no_bytes_and_integers_have_none():
    tokenizer = build_vocabulary(["a", "<unk>"], "word")
    assert type_bytes(tokenizer, "word")[tokenizer.token_to_id("<unk>")] == 0
    assert type_bytes(build_vocabulary(["3"], "int"), "int") is None


@pytest.mark.parametrize(("types", "unit"), [(WORDS, "word"), ("ab \n", "char"), (["7"], "int")])
def test_vocabulary_survives_json(types, unit):
    tokenizer = build_vocabulary(types, unit)
    content = tokenizer.to_str()
    assert parse_vocabulary(content, unit, "it").to_str() == content
    assert parse_vocabulary(tokenizer.to_str(pretty=True), unit, "it").to_str() == content
    assert Tokenizer.from_str(content).to_str() == content
    assert build_vocabulary(reversed(types), unit).to_str() == content


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {"vocab": 3}}', '"model"', "null"])
def test_what_is_no_vocabulary_is_refused(content):
    with pytest.raises(
        ValueError, match=r"`tokenizer` must be a vocabulary in JSON, .* but a.json"
    ):
        parse_vocabulary(content, "word", "a.json")


def test_vocabulary_of_another_unit_is_refused():
    words, numbers = build_vocabulary(WORDS, "word"), build_vocabulary(["3"], "int")
    gaps = json.loads(words.to_str())
    gaps["model"]["vocab"]["cat"] = 17
    bytes_ = train_tokenizer(iter(["aab aab"]), vocab_size=259)
    for content, unit in (
        (words.to_str(), "char"),
        (words.to_str(), "int"),
        (build_vocabulary("ab", "char").to_str(), "word"),
        (bytes_.to_str(), "word"),
        (json.dumps(gaps), "word"),
    ):
        message = f"`tokenizer` must be a vocabulary of unit '{unit}', but a.json is not"
        with pytest.raises(ValueError, match=message):
            parse_vocabulary(content, unit, "a.json")
    assert parse_vocabulary(numbers.to_str(), "int", "a.json").get_vocab_size() == 4


def test_type_without_an_id_is_named_unless_unk_stands_for_it():
    with pytest.raises(
        ValueError,
        match=r"`tokenizer` must know every token of b.txt or have <unk>"
        r", but it lacks 'dog'",
    ):
        ids_of_types(build_vocabulary(["cat"], "word"), ("cat", "dog"), "b.txt")
    tokenizer = build_vocabulary(["cat", "<unk>"], "word")
    assert ids_of_types(tokenizer, ("cat", "dog", "cow"), "b.txt").tolist() == [1, 0, 0]
