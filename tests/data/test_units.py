import gzip
import lzma

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_lightning.data import units
from spectral_lightning.data.units import MAX_INT, detect_unit, read_types


@pytest.fixture
def write(tmp_path):
    def written(text, name="text.txt"):
        path = tmp_path / name
        opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
        with opener(path, "wt", encoding="utf-8", newline="") as file:
            file.write(text)
        return path

    return written


def tokens(stream):
    return [stream.types[index] for index in stream.indices]


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("12 7\n0 12", "int"),
        ("12 -7 0", "int"),
        ("the cat 12", "word"),
        ("1 2 three", "word"),
        ("1.5 2", "word"),
        ("1 \u0663", "word"),
        ("a\nb", "word"),
        ("ACGTTA\n", "char"),
        ("314159", "char"),
        ("1 " * 50 + "word", "int"),
        ("1 " * 49 + "word", "word"),
    ],
)
def test_unit_follows_from_the_first_fifty_words(write, text, unit):
    assert detect_unit(write(text), "source") == unit


@pytest.mark.parametrize("chunk", [1, 2, 5, 1_000])
@given(text=st.text(st.sampled_from("ab \n\t\f\x1c\x85\u3000\u00e9"), min_size=1))
def test_words_and_characters_are_those_of_python(tmp_path_factory, chunk, text):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "_CHUNK_CHARS", chunk)
        assert tokens(read_types(path, "char", "source")) == list(text)
        if text.split():
            assert tokens(read_types(path, "word", "source")) == text.split()


@pytest.mark.parametrize("name", ["a.txt", "a.tokens", "a", "a.txt.xz", "a.tokens.gz"])
def test_packed_files_hold_the_same_text(write, name):
    stream = read_types(write("b a\n b c", name), "word", "source")
    assert stream.types == ("b", "a", "c")
    assert stream.indices.tolist() == [0, 1, 0, 2]


def test_integers_lose_leading_zeros_only(write):
    stream = read_types(write(f"007 7 0 00 {MAX_INT}"), "int", "source")
    assert tokens(stream) == ["7", "7", "0", "0", str(MAX_INT)]
    assert stream.types == ("7", "0", str(MAX_INT))


def test_first_part_of_a_split_knows_only_its_own_types(write):
    stream = read_types(write("b a b c a d"), "word", "source")
    first, rest = stream.split(3)
    assert (first.types, tokens(first)) == (("b", "a"), ["b", "a", "b"])
    assert tokens(rest) == ["c", "a", "d"]
    first, rest = stream.split(0)
    assert (first.types, len(first), len(rest)) == ((), 0, 6)
    assert stream.indices.dtype == np.uint32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "4 2 -1 3 -1",
            "`source` must hold non-negative integers, but field 3 of .* is '-1'. Give",
        ),
        (
            "4 2\n2 two",
            "`source` must hold non-negative integers, but field 4 of .* is 'two'. Give",
        ),
        ("4 1048576", "`source` must hold integers of at most 1048575, but field 2 of .* is '1048"),
        ("4 " + "9" * 5_000, "`source` must hold integers of at most 1048575, but field 2"),
    ],
)
def test_field_that_is_no_id_is_named(write, text, message):
    with pytest.raises(ValueError, match=message):
        read_types(write(text), "int", "source")


@pytest.mark.parametrize(("text", "unit"), [("", "char"), ("", "word"), (" \n\n", "word")])
def test_empty_text_is_refused(write, text, unit):
    with pytest.raises(ValueError, match=r"`valid_source` must hold text, but .*text.txt is empty"):
        read_types(write(text), unit, "valid_source")


def test_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"caf\xe9 ole")
    with pytest.raises(ValueError, match=r"`source` must be UTF-8 text, but .* is not \(invalid"):
        detect_unit(path, "source")


@pytest.mark.parametrize("name", ["a.xz", "a.gz"])
@pytest.mark.parametrize("damage", ["cut", "overwrite", "unpacked"])
def test_damaged_file_is_refused(write, name, damage):
    path = write("one two three " * 1_000, name)
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "overwrite": content[:40] + b"\xff" * 20 + content[60:],
            "unpacked": b"one two three",
        }[damage]
    )
    with pytest.raises(ValueError, match=r"`source` must be a whole file, but .* is damaged: "):
        read_types(path, "word", "source")
