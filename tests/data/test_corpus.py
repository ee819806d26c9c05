import importlib.util
import sys
import sysconfig

import pytest

from spectral_lightning.data import train_tokenizer
from spectral_lightning.data.corpus import EmbeddedSource


@pytest.fixture
def stripped_python(monkeypatch, tmp_path):
    """An installation without the sources of its library."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def has_library_sources():
    return importlib.util.find_spec("argparse").origin.endswith(".py")


needs_sources = pytest.mark.skipif(
    not has_library_sources(), reason="this Python has no sources of its library"
)


@needs_sources
def test_corpus_is_the_documentation_of_this_python():
    documents = list(EmbeddedSource().documents())
    assert sum(map(len, documents)) > 1_000_000
    assert any('The "with" statement' in document for document in documents)
    assert any("command-line parsing library" in document for document in documents)
    assert sys.version in EmbeddedSource.description


@needs_sources
def test_reading_the_corpus_imports_nothing():
    before = set(sys.modules)
    documents = list(EmbeddedSource().documents())
    assert set(sys.modules) == before
    assert documents == list(EmbeddedSource().documents())


def test_python_without_sources_falls_back_to_the_small_text(stripped_python):
    with pytest.warns(UserWarning, match="carries no documentation of its own"):
        documents = list(EmbeddedSource().documents())
    assert len(documents) > 20
    assert "singular values" in documents[0]


def test_small_text_supports_a_vocabulary_of_a_thousand(stripped_python):
    with pytest.warns(UserWarning, match="carries no documentation"):
        tokenizer = train_tokenizer(EmbeddedSource().documents(), 1024)
    assert tokenizer.get_vocab_size() == 1024


def test_fingerprint_changes_with_the_library(stripped_python, tmp_path):
    before = EmbeddedSource().fingerprint()
    (tmp_path / "argparse.py").write_text('"""Parse."""\n')
    assert EmbeddedSource().fingerprint() != before
