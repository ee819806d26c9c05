import random

import pytest
import torch
from torch import nn

from spectral_lightning.data import TextDataModule
from spectral_lightning.models import GPT
from spectral_lightning.tasks import LanguageModeling


class Bigram(nn.Module):
    """The smallest causal model: the next token from this one alone."""

    def __init__(self, vocab_size, sequence_len=16, dim=8):
        super().__init__()
        self.config = {"vocab_size": vocab_size, "sequence_len": sequence_len, "dim": dim}
        self.vocab_size = vocab_size
        self.sequence_len = sequence_len
        self.embed = nn.Embedding(vocab_size, dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens, kv_cache=None):
        return self.head(self.embed(tokens))


@pytest.fixture
def make_bigram():
    def make(vocab_size=300, **settings):
        torch.manual_seed(0)
        return Bigram(vocab_size, **settings)

    return make


@pytest.fixture
def make_gpt():
    def make(**settings):
        torch.manual_seed(0)
        return GPT(**{"depth": 1, "vocab_size": 300, "sequence_len": 16} | settings)

    return make


@pytest.fixture
def make_data(tmp_path):
    """A data module on 30 short documents."""
    generator = random.Random(0)
    words = ("matrix", "vector", "layer", "norm", "rank", "value", "step", "weight", "loss")
    documents = (
        f"Note {number}: " + " ".join(generator.choices(words, k=40)) for number in range(30)
    )
    (tmp_path / "notes.txt").write_text("\n\n\n".join(documents))

    def make(**settings):
        settings = {
            "vocab_size": 300,
            "sequence_len": 16,
            "batch_size": 8,
            "valid_fraction": 0.2,
        } | settings
        return TextDataModule(
            str(tmp_path / "notes.txt"), cache_dir=str(tmp_path / "cache"), **settings
        )

    return make


@pytest.fixture
def checkpoint(make_trainer, make_data, make_bigram, tmp_path):
    """A checkpoint of a bigram model after two steps."""
    trainer = make_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(LanguageModeling(make_bigram()), make_data())
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    return path
