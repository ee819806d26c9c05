import random

import pytest

from spectral_lightning.data import TextDataModule

WORDS = ("matrix", "vector", "layer", "norm", "rank", "value", "step", "weight", "loss", "token")


def prose(num_documents, seed=0, num_words=40):
    """Different documents of random words, separated by two blank lines."""
    generator = random.Random(seed)
    documents = (
        f"Note {seed}.{number}: " + " ".join(generator.choices(WORDS, k=num_words))
        for number in range(num_documents)
    )
    return "\n\n\n".join(documents) + "\n"


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(prose(30))
    return path


@pytest.fixture
def make_data(text_file, tmp_path):
    """A data module on 30 short documents that is ready for its loaders."""

    def make(source=None, *, ready=True, **settings):
        settings = {
            "vocab_size": 300,
            "sequence_len": 16,
            "batch_size": 4,
            "valid_fraction": 0.2,
            "cache_dir": str(tmp_path / "cache"),
        } | settings
        data = TextDataModule(str(text_file) if source is None else source, **settings)
        if ready:
            data.prepare_data()
            data.setup("fit")
        return data

    return make
