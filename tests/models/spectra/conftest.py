import pytest
import torch

from spectral_lightning.models.spectra import SpectraConfig, SpectraModel


@pytest.fixture
def build():
    """Build a tiny model in evaluation mode, every branch of which has a visible effect."""

    def make(seed=0, **settings):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 50, "initializer_range": 0.2}
        return SpectraModel(SpectraConfig.preset("tiny", **sizes | settings)).eval()

    return make


@pytest.fixture
def texts():
    """Draw token ids of shape (batch, tokens)."""

    def draw(batch, tokens, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(50, (batch, tokens), generator=generator)

    return draw
