"""What untrained random factors would measure: the null beside readings of low-rank layers."""

from functools import lru_cache

import torch

from spectral_lightning.linalg.products import product_singular_values


@lru_cache(maxsize=256)
def null_product_values(shape: tuple[int, int], rank: int) -> tuple[float, ...]:
    """Singular values of a product of Gaussian factors, one draw with a seed of its own.

    Any initialisation with independent entries gives these up to a factor.

    Args:
        shape: ``(m, n)``.
        rank: Components.

    Returns:
        Values, descending, scaled to a Frobenius norm of 1.
    """
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator) for size in ((m, rank), (rank, n)))
    values = product_singular_values(left, right)
    return tuple((values / torch.linalg.vector_norm(values)).tolist())
