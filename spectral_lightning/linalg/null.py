"""What a Gaussian matrix of the same shape would measure: the null that readings are divided by.

For independent entries of mean 0 and standard deviation `std`. Values are those of the limit of
large matrices (Marchenko and Pastur 1967) at the given shape; how far a finite matrix is from it
is said with each. Nothing here looks at a weight, so shapes are plain integers and results plain
floats.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Midpoints of the angle in `_angles`: the effective rank then is right to 1e-6 of itself.
_NUM_POINTS = 4096

# Median of sqrt(n) sigma_min of a square Gaussian matrix: the root of x^2 / 2 + x = log 2.
_MEDIAN_SQUARE_EDGE = math.sqrt(1 + 2 * math.log(2)) - 1


def gaussian_spectral_norm(m: int, n: int, std: float = 1.0) -> float:
    """Largest singular value of a Gaussian matrix: ``std * (sqrt(m) + sqrt(n))``.

    An upper bound of the mean at every size: a 16 x 16 matrix lies 7 % below it, 64 x 64 3 %,
    512 x 512 1 % (measured in the tests).

    Args:
        m: Number of rows, at least 1.
        n: Number of columns, at least 1.
        std: Standard deviation of the entries, positive.

    Returns:
        Spectral norm, in the units of `std`.

    Raises:
        ValueError: If a size is below 1 or `std` is not positive and finite.

    References:
        Davidson and Szarek (2001), "Local operator theory, random matrices and Banach spaces",
        theorem II.13; Vershynin (2010), theorem 5.32. https://arxiv.org/abs/1011.3027

    Example:
        >>> gaussian_spectral_norm(16, 9)
        7.0
    """
    _require_shape(m, n, std)
    return std * (math.sqrt(m) + math.sqrt(n))


def gaussian_smallest_value(m: int, n: int, std: float = 1.0) -> float:
    """Smallest singular value of a Gaussian matrix: ``std * |sqrt(m) - sqrt(n)|``.

    A lower bound of the mean: a 64 x 32 matrix lies 10 % above it, but 68 x 64 47 %, for the
    formula needs ``|m - n|`` to be large. The limit is 0 for a square matrix, whose smallest value
    is of order ``std / sqrt(n)`` and spread out by a factor of several; its median,
    ``0.545 * std / sqrt(n)``, is returned there.

    Args:
        m: Number of rows, at least 1.
        n: Number of columns, at least 1.
        std: Standard deviation of the entries, positive.

    Returns:
        Smallest of the ``min(m, n)`` singular values, in the units of `std`.

    Raises:
        ValueError: If a size is below 1 or `std` is not positive and finite.

    References:
        Vershynin (2010), theorem 5.32. https://arxiv.org/abs/1011.3027
        Square: Edelman (1988), "Eigenvalues and condition numbers of random matrices", SIAM J.
        Matrix Anal. Appl. 9(4), corollary 3.1. https://doi.org/10.1137/0609045

    Example:
        >>> gaussian_smallest_value(16, 9)
        1.0
    """
    _require_shape(m, n, std)
    if m == n:
        return std * _MEDIAN_SQUARE_EDGE / math.sqrt(n)
    return std * abs(math.sqrt(m) - math.sqrt(n))


def gaussian_condition_number(m: int, n: int) -> float:
    """Condition number of a Gaussian matrix: ``(sqrt(m) + sqrt(n)) / |sqrt(m) - sqrt(n)|``.

    A 64 x 32 matrix lies 13 % below it, 1024 x 512 3 % (measured in the tests), 68 x 64 34 %. The
    limit is infinite for a square matrix. At size ``n`` its condition number is of order ``n``
    with a heavy tail, ``P(kappa > x n)`` about ``2 / x``, and has no mean; the median,
    ``3.67 n``, is returned there.

    Args:
        m: Number of rows, at least 1.
        n: Number of columns, at least 1.

    Returns:
        Condition number, dimensionless; exactly 1 for a single row or column.

    Raises:
        ValueError: If a size is below 1.

    References:
        Edelman (1988), "Eigenvalues and condition numbers of random matrices", SIAM J. Matrix
        Anal. Appl. 9(4), sec. 6. https://doi.org/10.1137/0609045

    Example:
        >>> gaussian_condition_number(16, 9)
        7.0
    """
    norm, smallest = gaussian_spectral_norm(m, n), gaussian_smallest_value(m, n)
    return 1.0 if min(m, n) == 1 else norm / smallest


def gaussian_stable_rank(m: int, n: int) -> float:
    """Stable rank of a Gaussian matrix: ``m n / (sqrt(m) + sqrt(n))^2``.

    A quarter of the size for a square matrix. A 16 x 16 matrix lies 18 % above it, 64 x 64 6 %,
    512 x 512 1 % (measured in the tests).

    Args:
        m: Number of rows, at least 1.
        n: Number of columns, at least 1.

    Returns:
        Stable rank, dimensionless, never below 1, where the formula falls for tiny shapes.

    Raises:
        ValueError: If a size is below 1.

    References:
        ``E ||W||_F^2 = m n std^2`` over the square of `gaussian_spectral_norm`; the bound that
        makes it safe is in Vershynin (2010), theorem 5.32. https://arxiv.org/abs/1011.3027

    Example:
        >>> gaussian_stable_rank(100, 100)
        25.0
    """
    return max(1.0, m * n / gaussian_spectral_norm(m, n) ** 2)


def gaussian_participation_ratio(m: int, n: int) -> float:
    """Participation ratio of a Gaussian matrix: ``(m n + 2) / (m + n + 1)``.

    The ratio of the exact means ``E (tr W^T W)^2 = m n (m n + 2)`` and
    ``E tr (W^T W)^2 = m n (m + n + 1)``; within 1 % of the mean from 16 x 16 on.

    Args:
        m: Number of rows, at least 1.
        n: Number of columns, at least 1.

    Returns:
        Participation ratio, dimensionless, in ``[1, min(m, n)]``.

    Raises:
        ValueError: If a size is below 1.

    References:
        Moments of the Wishart law: Muirhead (1982), "Aspects of multivariate statistical
        theory", sec. 3.2.

    Example:
        >>> gaussian_participation_ratio(1, 8)
        1.0
    """
    _require_shape(m, n)
    return (m * n + 2) / (m + n + 1)


def gaussian_effective_rank(m: int, n: int) -> float:
    """Effective rank of a Gaussian matrix: the entropy of the Marchenko-Pastur values.

    ``min(m, n) * E[s] * exp(-E[s log s] / E[s])`` for singular values ``s`` of that law, by
    quadrature. 0.805 of the size for a square matrix; a 16 x 16 matrix lies 1 % below it.

    Args:
        m: Number of rows, at least 1.
        n: Number of columns, at least 1.

    Returns:
        Effective rank, dimensionless, in ``[1, min(m, n)]``.

    Raises:
        ValueError: If a size is below 1.

    References:
        Roy and Vetterli (2007), "The effective rank: a measure of effective dimensionality",
        EUSIPCO. https://ieeexplore.ieee.org/document/7098875

    Example:
        >>> round(gaussian_effective_rank(100, 100), 1)
        80.5
    """
    _require_shape(m, n)
    squares, mass = _quadrature(min(m, n) / max(m, n))
    values = squares.sqrt()
    mean = (mass * values).sum().item()
    entropy = (mass * torch.special.entr(values)).sum().item()
    return max(1.0, min(m, n) * mean * math.exp(entropy / mean))


def marchenko_pastur_density(x: Float[Tensor, "*x"], ratio: float) -> Float[Tensor, "*x"]:
    """Density of the squared singular values of a large Gaussian matrix.

    In units of ``max(m, n) * std^2``: ``x = sigma^2 / (max(m, n) std^2)``, whose mean is 1. The
    density is ``sqrt((b - x) (x - a)) / (2 pi ratio x)`` between ``a = (1 - sqrt(ratio))^2`` and
    ``b = (1 + sqrt(ratio))^2`` and zero elsewhere; its integral is 1, as only the ``min(m, n)``
    values that are not zero by shape are counted. At ``ratio = 1`` it grows like
    ``1 / (pi sqrt(x))`` towards 0.

    Args:
        x: Points, any shape, dimensionless.
        ratio: ``min(m, n) / max(m, n)``, in ``(0, 1]``.

    Returns:
        Density per unit of `x`, shape and dtype of `x`.

    Raises:
        ValueError: If `ratio` is outside its range.

    References:
        Marchenko and Pastur (1967), "Distribution of eigenvalues for some sets of random
        matrices", Math. USSR-Sbornik 1(4).
        https://doi.org/10.1070/SM1967v001n04ABEH001994

    Example:
        >>> marchenko_pastur_density(torch.tensor([0.0, 1.0, 5.0]), ratio=1.0)
        tensor([0.0000, 0.2757, 0.0000])
    """
    low, high = _support(ratio)
    inside = (x > low) & (x < high)
    shown = torch.where(inside, x, 1.0)
    density = ((high - shown) * (shown - low)).clamp_min(0).sqrt() / (2 * math.pi * ratio * shown)
    return torch.where(inside, density, 0.0)


def marchenko_pastur_quantile(
    probability: Float[Tensor, "*p"], ratio: float
) -> Float[Tensor, "*p"]:
    """Squared singular value below which a given share of a large Gaussian spectrum lies.

    The inverse of the integral of `marchenko_pastur_density`, right to 1e-5. The singular values
    that a Gaussian matrix would have, in order, are about
    ``std * sqrt(max(m, n) * quantile((i + 0.5) / min(m, n)))``.

    Args:
        probability: Shares, any shape, in ``[0, 1]``.
        ratio: ``min(m, n) / max(m, n)``, in ``(0, 1]``.

    Returns:
        Quantiles in units of ``max(m, n) * std^2``, shape and dtype of `probability`. NaN for a
        share outside ``[0, 1]``.

    Raises:
        ValueError: If `ratio` is outside its range.

    References:
        Marchenko and Pastur (1967), see `marchenko_pastur_density`.

    Example:
        >>> marchenko_pastur_quantile(torch.tensor([0.0, 1.0]), ratio=0.25)
        tensor([0.2500, 2.2500])
    """
    _, mass = _quadrature(ratio)
    cumulative = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    wanted = probability.double().cpu().contiguous()
    cell = (torch.searchsorted(cumulative, wanted) - 1).clamp(0, _NUM_POINTS - 1)
    inside = (wanted - cumulative[cell]) / mass[cell]
    angle = (cell + inside.clamp(0, 1)) * (math.pi / _NUM_POINTS)
    squares = 1 + ratio - 2 * math.sqrt(ratio) * torch.cos(angle)
    valid = (wanted >= 0) & (wanted <= 1)
    return torch.where(valid, squares, torch.nan).to(probability)


def _support(ratio: float) -> tuple[float, float]:
    if not 0 < ratio <= 1:
        raise ValueError(f"`ratio` must be in (0, 1], got {ratio}; it is min(m, n) / max(m, n).")
    return (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2


def _quadrature(ratio: float) -> tuple[Tensor, Tensor]:
    """Points ``x`` of the Marchenko-Pastur law, ascending, and the mass around each.

    With ``x = 1 + ratio - 2 sqrt(ratio) cos(angle)`` the mass per angle is
    ``2 sin(angle)^2 / (pi x)``: no singular edges. Midpoints avoid its 0 / 0 at ``ratio = 1``.
    """
    _support(ratio)
    step = math.pi / _NUM_POINTS
    angle = (torch.arange(_NUM_POINTS, dtype=torch.float64) + 0.5) * step
    squares = 1 + ratio - 2 * math.sqrt(ratio) * torch.cos(angle)
    return squares, 2 * torch.sin(angle).square() / (math.pi * squares) * step


def _require_shape(m: int, n: int, std: float = 1.0) -> None:
    if m < 1 or n < 1:
        raise ValueError(f"`m` and `n` must be >= 1, got {m} and {n}.")
    if not (std > 0 and math.isfinite(std)):
        raise ValueError(f"`std` must be positive and finite, got {std}.")
