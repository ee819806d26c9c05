"""Models of others at their smallest, and a way to harm one layer."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spectral_lightning.linalg.null import gaussian_stable_rank

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


def tiny_gpt2(seed: int = 0) -> "GPT2LMHeadModel":
    """Return Hugging Face's GPT-2 with 2 blocks of width 32 and 40 tokens, without dropout.

    Args:
        seed: Seed of the initial weights; the global random state is left as it was.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=40,
        n_positions=8,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def plant_spike_(weight: Tensor, size: float = 8.0, seed: int = 0) -> None:
    """Add a random rank-one matrix of `size` times the spectral norm to a weight.

    Args:
        weight: Matrix, or a convolution's weight, of shape ``(m, ...)``; changed in place.
        size: Spectral norm of what is added, over that of the weight.
        seed: Seed of the private generator.
    """
    matrix = weight.detach().flatten(1)
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, generator=generator, dtype=weight.dtype) for n in matrix.shape)
    spike = torch.outer(left / left.norm(), right / right.norm())
    spike *= size * torch.linalg.matrix_norm(matrix, 2)
    weight.detach().add_(spike.reshape(weight.shape))


def relative_stable_rank(weight: Tensor) -> float:
    """Stable rank of a weight, flattened to a matrix, over that of a Gaussian of its shape."""
    matrix = weight.detach().double().flatten(1)
    ratio = torch.linalg.matrix_norm(matrix) / torch.linalg.matrix_norm(matrix, 2)
    return ratio.item() ** 2 / gaussian_stable_rank(*matrix.shape)
