import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_lightning.data.documents import content_digest, is_held_out, split_documents


def split(text):
    return list(split_documents(text.splitlines(keepends=True)))


def test_two_blank_lines_end_a_document_and_one_does_not():
    assert split("one\n\nstill one\n\n\ntwo\n \n\t\nthree") == ["one\n\nstill one", "two", "three"]


def test_form_feed_ends_a_document():
    assert list(split_documents(["one\n", "\ftwo\n", "end of two\fthree\n"])) == [
        "one",
        "two\nend of two",
        "three",
    ]


def test_other_unicode_line_ends_are_text():
    assert list(split_documents(["one\x1c\x85\u2028still one\n"])) == ["one\x1c\x85\u2028still one"]


def test_long_text_is_cut_at_a_paragraph():
    paragraph = "word " * 100 + "\n"
    documents = split("\n".join([paragraph] * 100))
    assert len(documents) > 3
    assert all(8_000 < len(document) < 9_000 for document in documents[:-1])
    assert all(document.startswith("word") for document in documents)


def test_long_paragraph_is_cut_at_a_line_end():
    documents = split("word " * 20 + "\n" + ("word " * 20 + "\n") * 1_000)
    assert max(map(len, documents)) < 33_000


@given(st.text(alphabet="ab \n\f", max_size=60))
def test_nothing_but_white_space_is_left_out(text):
    assert "".join("".join(split(text)).split()) == "".join(text.split())


@pytest.mark.parametrize("copy", ["a b\nc", " a  b c\n", "a\n\nb c"])
def test_copies_that_differ_in_white_space_share_a_digest(copy):
    assert content_digest(copy) == content_digest("a b c")
    assert content_digest(copy) != content_digest("a b d")


def test_expected_share_is_held_out():
    digests = [content_digest(f"document {number}") for number in range(2_000)]
    share = sum(is_held_out(digest, 0.1) for digest in digests) / len(digests)
    assert share == pytest.approx(0.1, abs=0.02)
    assert not any(is_held_out(digest, 0.0) for digest in digests)
    assert all(is_held_out(digest, 1.0) for digest in digests)
