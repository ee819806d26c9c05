import pytest
import torch

from spectral_lightning.models import GPT


@pytest.fixture
def tiny_gpt():
    """Build a GPT whose every weight is random: no zero projection hides a fault."""

    def build(seed=0, **settings):
        model = GPT(
            **{"depth": 2, "vocab_size": 13, "sequence_len": 16, "model_dim": 24, **settings}
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3, generator=generator)
        return model

    return build


@pytest.fixture
def tokens():
    """Draw token ids of a given shape."""

    def draw(*shape, seed=0, vocab_size=13):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocab_size, shape, generator=generator)

    return draw
