"""All singular values of a matrix, by the cheapest route that is accurate enough.

Estimates of the leading values only, which are far cheaper, live in `lanczos`.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_lightning.linalg.checks import compute_dtype, require_finite, require_matrix

Route = Literal["auto", "gram", "qr", "svd"]

# Bounds the float64 copy of a tall weight; summing over blocks of rows costs no time.
_ROWS_PER_BLOCK = 1024

# Chosen here by scripts/choose_exact_route.py: below it LAPACK's own QR step is as fast.
_MIN_ASPECT_FOR_QR = 4


def singular_values(
    weight: Float[Tensor, "*batch m n"], *, method: Route = "auto"
) -> Float[Tensor, "*batch min(m,n)"]:
    r"""All singular values of a matrix, largest first.

    Three routes, for ``k = min(m, n)``, ``l = max(m, n)``, ``eps = 2.2e-16``:

    * ``"gram"``: eigenvalues of the smaller Gram matrix in float64, ``O(k^2 l)`` in matrix
      products. Its rounding moves each *squared* value by up to ``c * eps * sigma_max^2`` (``c``
      below 70 up to 1376 x 512), hence a value ``sigma`` by the factor
      ``c eps / 2 * (sigma_max / sigma)^2``: measured 0.07 % at a condition number of 1e6 and 6 %
      at 1e7. Values below ``sqrt(c eps)``, 1e-7 of the largest, are noise, or exactly 0.
    * ``"qr"``: R of a QR, then the values of the small square R, in the compute dtype.
    * ``"svd"``: the values of the matrix itself, in the compute dtype. Both are wrong by about
      ``k`` roundings of the *largest* value, so that float32 loses the small ones first.

    ``"auto"`` takes ``"gram"`` for half precision and float32, where it is the most accurate
    (errors below 6e-8 of the largest value, against up to 5e-6 of float32 ``"svd"``) and as fast
    as any, and ``"qr"`` (``l >= 4 k``) or ``"svd"`` for float64, which it keeps to float64
    accuracy. Chosen here by scripts/choose_exact_route.py; milliseconds on two cores of an AMD
    EPYC, in float32 for gram / qr / svd: 256 x 256 5 / 5 / 4, 512 x 512 25 / 31 / 28, 1376 x 512
    34 / 35 / 33, 4096 x 512 76 / 74 / 82, 64 x 1024 0.6 / 0.6 / 0.7, 768 x 3072 90 / 97 / 106; in
    float64: 512 x 512 28 / 44 / 37, 64 x 1024 0.7 / 0.8 / 0.9, 768 x 3072 91 / 142 / 153.

    Needs ``k^2 + 2048 k`` float64 numbers (``"gram"``) or a copy of the weight. All routes wait
    for the device. Not differentiable: a measurement keeps no graph.

    Args:
        weight: Matrix ``W``, shape ``(*batch, m, n)``, finite, non-empty.
        method: ``"auto"``, ``"gram"``, ``"qr"`` or ``"svd"``.

    Returns:
        Values, shape ``(*batch, min(m, n))``, descending, non-negative, in the weight's own
        units, float32 (float64 for a float64 weight), on the device of `weight`.

    Raises:
        ValueError: If `weight` is empty, not a floating-point matrix or not finite, or `method`
            is unknown.

    References:
        Golub and Van Loan (2013), "Matrix computations", 4th ed., sec. 8.6.3 (squaring loses half
        the digits). Chan (1982), "An improved algorithm for computing the singular value
        decomposition", ACM TOMS 8(1) (QR first). https://doi.org/10.1145/355984.355990

    Example:
        >>> singular_values(torch.tensor([[0.0, 3.0], [4.0, 0.0], [0.0, 0.0]]))
        tensor([4., 3.])
    """
    require_matrix(weight)
    if method not in get_args(Route):
        raise ValueError(
            f"`method` must be one of {', '.join(map(repr, get_args(Route)))}, got {method!r}."
        )
    tall = (weight if weight.shape[-2] >= weight.shape[-1] else weight.mT).detach()
    largest = require_finite(tall)
    dtype = compute_dtype(weight)
    if method == "auto":
        method = cheapest_route(tall.shape[-2], tall.shape[-1], dtype)
    if method == "gram":
        scale = power_of_two_below(largest)
        squares: Tensor = torch.linalg.eigvalsh(scaled_gram(tall, scale))
        # A zero eigenvalue comes out as rounding of either sign.
        return (squares.clamp_min(0).sqrt().flip(-1) * scale.squeeze(-1)).to(dtype)
    matrix = tall.to(dtype)
    if method == "qr":
        matrix = torch.linalg.qr(matrix, mode="r").R
    values: Tensor = torch.linalg.svdvals(matrix)
    return values


def cheapest_route(num_rows: int, num_cols: int, dtype: torch.dtype) -> Route:
    """Route that ``method="auto"`` takes for a tall matrix computed in `dtype`."""
    if dtype == torch.float32:
        return "gram"
    return "qr" if num_rows >= _MIN_ASPECT_FOR_QR * num_cols else "svd"


def power_of_two_below(largest: Float[Tensor, "*batch 1 1"]) -> Float[Tensor, "*batch 1 1"]:
    """Power of two in ``(largest / 2, largest]`` as float64; ``1/2`` for a zero.

    Dividing by it is exact, and keeps squares from overflowing.
    """
    return torch.exp2(torch.frexp(largest.double()).exponent.double() - 1)


def scaled_gram(
    tall: Float[Tensor, "*batch m n"], scale: Float[Tensor, "*batch 1 1"]
) -> Float[Tensor, "*batch n n"]:
    """Gram matrix ``(W / scale)^T (W / scale)`` in float64, summed over blocks of rows."""
    num_cols = tall.shape[-1]
    gram = scale.new_zeros(*tall.shape[:-2], num_cols, num_cols)
    for rows in torch.split(tall, _ROWS_PER_BLOCK, dim=-2):
        block = rows.double() / scale
        gram += block.mT @ block
    return gram
