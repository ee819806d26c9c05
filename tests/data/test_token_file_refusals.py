"""What `TokenFileDataModule` refuses, in a sentence."""

import pytest

from spectral_lightning.data import TokenFileDataModule
from tests.data.token_file_cases import RHYME, ids


def test_whole_vocabulary_has_no_effect_beside_a_tokenizer(make_words, tmp_path):
    data = make_words()
    data.tokenizer.save(str(tmp_path / "words.json"))
    with pytest.warns(UserWarning, match="`vocabulary` has no effect when a `tokenizer` is given"):
        other = make_words(tokenizer=str(tmp_path / "words.json"), vocabulary="all")
    assert ids(other, "valid") == ids(data, "valid")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": "byte"}, "`unit` must be 'auto', 'word', 'int' or 'char', got 'byte'"),
        ({"vocabulary": "valid"}, "`vocabulary` must be 'train' or 'all', got 'valid'"),
        ({"sequence_len": 0}, "`sequence_len` must be >= 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be >= 1, got 0"),
        ({"seed": -1}, "`seed` must be >= 0, got -1"),
        ({"num_workers": -1}, "`num_workers` must be >= 0, got -1"),
        ({"valid_fraction": 0.0}, r"`valid_fraction` must be in \(0, 1\), got 0.0"),
        ({"valid_fraction": 1}, r"`valid_fraction` must be in \(0, 1\), got 1"),
    ],
)
def test_setting_outside_its_range_is_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenFileDataModule("text.txt", **settings)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("", {}, "`source` must hold text, but .*rhyme.txt is empty"),
        ("a a\na " * 20, {}, "`source` must hold at least two different tokens, .* only 'a'"),
        ("3 -1 4 " * 20, {}, "`source` must hold non-negative integers, but field 2 of"),
        ("3 1 4 " * 20 + "x", {}, "`source` must hold non-negative integers, but field 61 of"),
        ("a b c d", {}, "`sequence_len` must be at most 2 for this text of 3 tokens, got 8"),
        (
            RHYME,
            {"valid_fraction": 0.01},
            r"`valid_fraction` must leave at least 9 tokens \(`sequence_len` \+ 1\) of the 98 for"
            r" validation, got 0.01, which leaves 1. Raise it",
        ),
    ],
    ids=["empty", "one-type", "negative", "word-among-integers", "short", "no-validation"],
)
def test_text_that_cannot_be_used_is_refused_in_one_sentence(make_words, text, settings, message):
    with pytest.raises(ValueError, match=message):
        make_words(text, **settings)


def test_held_out_part_of_one_window_is_enough(make_words):
    data = make_words("a b " * 45, valid_fraction=0.1)
    assert [batch.tolist() for batch in data.val_dataloader()] == [[ids(data, "valid")]]
    with pytest.raises(
        ValueError, match=r"`valid_fraction` must leave at least 10 tokens .* 9\. R"
    ):
        make_words("a b " * 45, valid_fraction=0.1, sequence_len=9)


def test_validation_text_is_checked_like_the_training_text(make_words, tmp_path):
    path = tmp_path / "valid.txt"
    for text, message in (
        ("", "`valid_source` must hold text, but .*valid.txt is empty"),
        ("the cat", r"`valid_source` must hold at least 9 tokens \(`sequence_len` \+ 1\), got 2"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            make_words(valid_source=str(path))


def test_path_that_is_no_file_is_named_with_its_argument(make_words, tmp_path):
    make_words()
    for argument in ("valid_source", "tokenizer"):
        with pytest.raises(FileNotFoundError, match=f"`{argument}` must be an existing file, got"):
            make_words(**{argument: "./no/such/file"})
    data = TokenFileDataModule(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="`source` must be an existing file, got"):
        data.prepare_data()


def test_data_must_be_prepared_before_use(make_words):
    data = make_words(ready=False)
    with pytest.raises(RuntimeError, match="`prepare_data` must be called before `setup`"):
        data.setup("fit")
    with pytest.raises(RuntimeError, match="`setup` must be called before the data are used"):
        data.train_dataloader()
