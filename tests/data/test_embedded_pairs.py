import pytest

from spectral_lightning.data import PairsDataModule, corpus
from spectral_lightning.data.embedded_pairs import EmbeddedPairs


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of one file in place of CPython's."""
    path = tmp_path / "lib" / "tools.py"
    path.parent.mkdir()
    path.write_text(
        '"""Tools."""\n'
        "class Saw(Tool):\n"
        '    """Cut wood. Never cut metal."""\n'
        "    def cut(self, wood, *, depth=1):\n"
        '        """Cut.\n\n        Return what is left.\n        """\n'
        "    def undocumented(self): ...\n"
    )
    monkeypatch.setattr("spectral_lightning.data.embedded_pairs.library_files", lambda: (path,))
    monkeypatch.setattr("spectral_lightning.data.embedded_pairs._MIN_PAIRS", 1)


def test_pairs_are_signatures_with_paragraphs_and_summaries_with_the_rest(library):
    assert [row.texts for row in EmbeddedPairs().rows()] == [
        ("module lib.tools", "Tools."),
        ("lib.tools: class Saw(Tool)", "Cut wood. Never cut metal."),
        ("Cut wood.", "Never cut metal."),
        ("lib.tools: def cut(self, wood, *, depth=1)", "Cut."),
        ("Cut.", "Return what is left."),
    ]


@pytest.mark.skipif(
    len(corpus.library_files()) < 100, reason="this Python has no sources of its library"
)
def test_data_module_trains_with_no_data_at_hand(tmp_path, monkeypatch):
    some = corpus.library_files()[:150]  # all take seconds to parse
    monkeypatch.setattr("spectral_lightning.data.embedded_pairs.library_files", lambda: some)
    data = PairsDataModule(cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    assert data.counts.train > 1_000
    assert next(iter(data.train_dataloader()))["text_ids"].shape == (32, 2)


def test_python_without_sources_gives_a_small_sample_with_a_warning(monkeypatch):
    monkeypatch.setattr("spectral_lightning.data.embedded_pairs.library_files", tuple)
    monkeypatch.setattr(corpus, "library_files", tuple)
    monkeypatch.setattr(corpus, "_topic_files", tuple)
    with (
        pytest.warns(UserWarning, match="embedded pairs are a small sample"),
        pytest.warns(UserWarning, match="embedded corpus is a 9 kB sample"),
    ):
        assert len(list(EmbeddedPairs().rows())) >= 20
