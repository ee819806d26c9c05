"""How a set of embeddings fills its space: angles, spread, and several ranks.

Lives here: what is read off unit rows or off their Gram matrix, which is small enough to be sent to
the host. Does not live here: which rows are measured, and when.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_lightning.linalg.measures import effective_rank

# Below the rounding of float32 rows and of the squares in a Gram matrix.
_NOISE = 2e-7


class EmbeddingSpread(NamedTuple):
    """How unit rows fill their space; all dimensionless.

    Attributes:
        mean_cosine: Mean cosine of two different rows: 1 where all are equal, about 0 at random.
        uniformity: Log of the mean Gaussian potential of two different rows, with ``t = 2``: 0
            where all are equal, lower the more evenly they cover the sphere, at least -8.
        effective_rank: Effective rank of the rows about their mean (Roy and Vetterli): how many
            directions the differences between rows are spread over; 1 where all are equal.
        rankme: Effective rank of the rows themselves (RankMe), in which a common mean counts.
        spectral_entropy: Entropy of the energy over directions, in nats, the mean included.
    """

    mean_cosine: float
    uniformity: float
    effective_rank: float
    rankme: float
    spectral_entropy: float


def unit_gram(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Cosines of all pairs of rows, in float64; never waits for the device.

    Args:
        rows: Embeddings, shape ``(n, d)``, of any length; zero rows stay zero.

    Returns:
        Gram matrix of the unit rows, shape ``(n, n)``.

    Example:
        >>> unit_gram(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    unit = torch.nn.functional.normalize(rows.double(), dim=-1)
    return unit @ unit.mT


def embedding_spread(gram: Float[Tensor, "n n"]) -> EmbeddingSpread:
    """Read off a Gram matrix of unit rows how they fill their space.

    Two eigendecompositions, ``O(n^3)``: 10 ms for 256 rows on one core of an AMD EPYC.

    Args:
        gram: Gram matrix of the unit rows, shape ``(n, n)``, on the host, in float64.

    Returns:
        Measures; all NaN if an entry is not finite.

    Raises:
        ValueError: If there are fewer than two rows.

    References:
        Wang and Isola (2020), "Understanding contrastive representation learning through alignment
        and uniformity", sec. 4.1. https://arxiv.org/abs/2005.10242. Roy and Vetterli (2007), "The
        effective rank", definition 1. Garrido et al. (2023), "RankMe", equation 1.
        https://arxiv.org/abs/2210.02885

    Example:
        >>> spread = embedding_spread(torch.eye(4, dtype=torch.float64))
        >>> [round(value, 3) for value in spread]
        [0.0, -4.0, 3.0, 4.0, 1.386]
    """
    n = len(gram)
    if n < 2:
        raise ValueError(f"`gram` must be of at least 2 rows, got {n}.")
    if not bool(gram.isfinite().all()):
        return EmbeddingSpread(*[math.nan] * 5)
    off_diagonal = ~torch.eye(n, dtype=torch.bool)
    cosines = gram[off_diagonal]
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    values = _singular_values(gram)
    spread = _singular_values(centred)
    spread = torch.where(spread > _NOISE * values[-1], spread, 0.0)
    energy = values.square() / values.square().sum()
    return EmbeddingSpread(
        mean_cosine=cosines.mean().item(),
        uniformity=torch.exp(4 * (cosines - 1)).mean().log().item(),
        effective_rank=effective_rank(spread).item() if bool(spread.any()) else 1.0,
        rankme=effective_rank(values).item() if bool(values.any()) else 1.0,
        spectral_entropy=-torch.xlogy(energy, energy).sum().item(),
    )


def alignment(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean squared distance of the unit embeddings of texts that mean the same.

    Args:
        first: Embeddings, shape ``(n, d)``.
        second: Those of their positives, in the same order.

    Returns:
        Scalar in ``[0, 4]``, dimensionless, in the dtype of the rows.

    References:
        Wang and Isola (2020), sec. 4.1, with exponent 2. https://arxiv.org/abs/2005.10242

    Example:
        >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]]))
        tensor(2.)
    """
    units = [torch.nn.functional.normalize(rows, dim=-1) for rows in (first, second)]
    return (units[0] - units[1]).square().sum(-1).mean()


def _singular_values(gram: Tensor) -> Tensor:
    """Singular values of the rows, ascending, from their Gram matrix."""
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp_min(0).sqrt()
