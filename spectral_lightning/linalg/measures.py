"""Numbers that sum up a spectrum: norms and the several meanings of rank.

Every function takes singular values, in any order, and works over batch dimensions. None of the
ranks depends on the scale of the matrix. What needs the matrix itself lives in `exact`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_lightning.linalg.checks import compute_dtype, require_finite


def frobenius_norm(values: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    """Size of the matrix as one long vector: ``sqrt(sum(sigma ** 2))``.

    Args:
        values: Singular values, shape ``(*batch, k)``, in the matrix's own units.

    Returns:
        Norms, shape ``(*batch)``, in the matrix's own units, float32 for half precision; 0 for a
        zero spectrum.

    Raises:
        ValueError: If there are no values, or their dtype is not floating-point.

    Example:
        >>> frobenius_norm(torch.tensor([4.0, 3.0]))
        tensor(5.)
    """
    norm: Tensor = torch.linalg.vector_norm(_spectrum(values), dim=-1)
    return norm


def nuclear_norm(values: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    """Sum of the singular values, the convex stand-in for rank.

    Args:
        values: Singular values, shape ``(*batch, k)``, in the matrix's own units.

    Returns:
        Norms, shape ``(*batch)``, in the matrix's own units, float32 for half precision; 0 for a
        zero spectrum.

    Raises:
        ValueError: If there are no values, or their dtype is not floating-point.

    Example:
        >>> nuclear_norm(torch.tensor([4.0, 3.0]))
        tensor(7.)
    """
    return _spectrum(values).sum(-1)


def stable_rank(values: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    """How many directions as strong as the strongest would hold all the energy.

    ``||W||_F^2 / ||W||_2^2``: between 1 and the rank, and hardly moved by small values.

    Args:
        values: Singular values, shape ``(*batch, k)``, non-negative.

    Returns:
        Stable ranks, shape ``(*batch)``, dimensionless, in ``[1, k]``, float32 for half
        precision. NaN for a zero spectrum, which has no strongest direction, and for one that is
        not finite.

    Raises:
        ValueError: If there are no values, or their dtype is not floating-point.

    References:
        Rudelson and Vershynin (2007), "Sampling from large matrices: an approach through
        geometric functional analysis", J. ACM 54(4), sec. 1.1 ("numerical rank" there).
        https://arxiv.org/abs/math/0503442

    Example:
        >>> stable_rank(torch.tensor([2.0, 1.0, 1.0]))
        tensor(1.5000)
    """
    values = _spectrum(values)
    return (values / values.amax(-1, keepdim=True)).square().sum(-1)


def effective_rank(values: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    """How many directions the spectrum is spread over, as the exponential of an entropy.

    ``exp(-sum(p log p))`` with ``p = sigma / sum(sigma)``: 1 for rank one, ``k`` for equal
    values. The values themselves are weighted, not their squares, so that small values count
    for more than in `participation_ratio`.

    Args:
        values: Singular values, shape ``(*batch, k)``, non-negative.

    Returns:
        Effective ranks, shape ``(*batch)``, dimensionless, in ``[1, k]``, float32 for half
        precision. NaN for a zero spectrum, and for one that is not finite.

    Raises:
        ValueError: If there are no values, or their dtype is not floating-point.

    References:
        Roy and Vetterli (2007), "The effective rank: a measure of effective dimensionality",
        EUSIPCO, definition 1. https://ieeexplore.ieee.org/document/7098875

    Example:
        >>> effective_rank(torch.tensor([1.0, 1.0, 1.0, 0.0]))
        tensor(3.)
    """
    values = _spectrum(values)
    # The largest value first: the sum alone could overflow.
    values = values / values.amax(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1)
    return entropy.exp()


def participation_ratio(values: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    """How many directions take part in the energy.

    ``(sum sigma^2)^2 / sum sigma^4``: the inverse of the probability that two quanta of energy
    drawn at random share a direction.

    Args:
        values: Singular values, shape ``(*batch, k)``, non-negative.

    Returns:
        Participation ratios, shape ``(*batch)``, dimensionless, in ``[1, k]``, float32 for half
        precision. NaN for a zero spectrum, and for one that is not finite.

    Raises:
        ValueError: If there are no values, or their dtype is not floating-point.

    References:
        Gao et al. (2017), "A theory of multineuronal dimensionality, dynamics and measurement",
        for the eigenvalues ``sigma^2`` of a covariance. https://doi.org/10.1101/214262

    Example:
        >>> participation_ratio(torch.tensor([1.0, 1.0, 0.0]))
        tensor(2.)
    """
    values = _spectrum(values)
    energy = (values / values.amax(-1, keepdim=True)).square()
    return energy.sum(-1).square() / energy.square().sum(-1)


def numerical_rank(values: Float[Tensor, "*batch k"], rtol: float) -> Int[Tensor, "*batch"]:
    """How many values stand above a tolerance relative to the largest.

    Waits for the device, to refuse a spectrum that is not finite.

    Args:
        values: Singular values, shape ``(*batch, k)``, non-negative, finite.
        rtol: Values up to ``rtol`` times the largest count as zero; in ``[0, 1)``. Rounding alone
            leaves about ``eps * max(m, n)`` for the dtype the matrix is stored in.

    Returns:
        Counts, shape ``(*batch)``, int64, in ``[0, k]``; 0 for a zero spectrum.

    Raises:
        ValueError: If there are no values, they are not finite or not floating-point, or `rtol`
            is outside its range.

    References:
        Golub and Van Loan (2013), "Matrix computations", 4th ed., sec. 5.4.1.

    Example:
        >>> numerical_rank(torch.tensor([1.0, 0.5, 1e-8]), rtol=1e-6)
        tensor(2)
    """
    if not 0 <= rtol < 1:
        raise ValueError(f"`rtol` must be in [0, 1), got {rtol}.")
    values = _spectrum(values)
    require_finite(values.unsqueeze(-2), "values")
    return (values > rtol * values.amax(-1, keepdim=True)).sum(-1)


def energy_rank(values: Float[Tensor, "*batch k"], energy: float = 0.95) -> Int[Tensor, "*batch"]:
    """How many leading directions hold a given share of the energy.

    The smallest ``r`` with ``sigma_1^2 + ... + sigma_r^2 >= energy * ||W||_F^2``. Cutting a matrix
    at that rank leaves a relative Frobenius error of at most ``sqrt(1 - energy)``. Divided by
    ``k`` it says how concentrated the spectrum is. Waits for the device, to refuse a spectrum
    that is not finite.

    Args:
        values: Singular values, shape ``(*batch, k)``, non-negative, finite.
        energy: Share of the squared Frobenius norm to hold, in ``(0, 1]``. The default keeps all
            but 5 % of it, as is common for explained variance (Jolliffe 2002, sec. 6.1.1).

    Returns:
        Counts, shape ``(*batch)``, int64, in ``[0, k]``; 0 for a zero spectrum.

    Raises:
        ValueError: If there are no values, they are not finite or not floating-point, or
            `energy` is outside its range.

    References:
        Jolliffe (2002), "Principal component analysis", 2nd ed., sec. 6.1.1 (cumulative
        percentage of total variation).

    Example:
        >>> energy_rank(torch.tensor([3.0, 1.0, 0.1]), energy=0.99)
        tensor(2)
    """
    if not 0 < energy <= 1:
        raise ValueError(f"`energy` must be in (0, 1], got {energy}.")
    values = _spectrum(values)
    largest = require_finite(values.unsqueeze(-2), "values").squeeze(-1)
    scaled = values / torch.where(largest > 0, largest, 1.0)
    held = scaled.sort(-1, descending=True).values.square().cumsum(-1)
    total = held[..., -1:]
    return (held < energy * total).sum(-1) + (total > 0).squeeze(-1)


def _spectrum(values: Tensor) -> Tensor:
    """Values in the compute dtype, or the user's mistake in a sentence."""
    if values.ndim < 1 or values.numel() == 0:
        raise ValueError(
            f"`values` must have shape (*batch, k) with k >= 1, got {tuple(values.shape)}."
        )
    if not values.is_floating_point():
        raise ValueError(
            f"`values` must have a floating-point dtype, got {values.dtype}; cast them first."
        )
    return values.to(compute_dtype(values))
