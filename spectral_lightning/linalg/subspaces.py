"""Bases of subspaces and the angles between them."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_lightning.linalg.checks import compute_dtype, require_finite, require_matrix


def orthonormalize(basis: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch n k"]:
    """Orthonormal basis of the span of some columns.

    The Q of a Householder QR, cost ``O(n k^2)``. Columns are orthonormal to rounding whatever
    the input; columns that depend on earlier ones are replaced by arbitrary directions outside
    the span. `orthonormalize_rows` is faster for many small blocks and never waits for a GPU, but
    only for rows that are far from dependent.

    Args:
        basis: Columns, shape ``(*batch, n, k)`` with ``k <= n``, finite.

    Returns:
        Basis, shape ``(*batch, n, k)``, float32 for half precision, on the device of `basis`.

    Raises:
        ValueError: If `basis` is not a non-empty floating-point matrix, or has more columns than
            rows.

    References:
        Golub and Van Loan (2013), "Matrix computations", 4th ed., sec. 5.2.

    Example:
        >>> orthonormalize(torch.tensor([[0.0], [-2.0]])).abs()
        tensor([[0.],
                [1.]])
    """
    require_matrix(basis, "basis")
    if basis.shape[-1] > basis.shape[-2]:
        raise ValueError(
            f"`basis` must not have more columns than rows, got shape {tuple(basis.shape)}."
        )
    Q: Tensor = torch.linalg.qr(basis.to(compute_dtype(basis))).Q
    return Q


def principal_angles(
    first: Float[Tensor, "*batch n j"],
    second: Float[Tensor, "*batch n k"],
    *,
    are_orthonormal: bool = False,
) -> Float[Tensor, "*batch min(j,k)"]:
    r"""Angles between two subspaces, smallest first.

    Angles below 45 degrees come from their sines, the singular values of the part of one basis
    outside the other subspace, and larger ones from their cosines, the singular values of
    ``Q1^T Q2``. A cosine alone cannot tell angles below ``sqrt(eps)`` from zero (3e-4 radians in
    float32); here the absolute error stays at a few ``eps`` throughout.

    An angle says nothing about a single vector where singular values cluster: between the
    leading ``k`` singular directions of two nearby matrices the largest angle is of the order of
    ``||change||_2 / (sigma_k - sigma_{k+1})``.

    Args:
        first: Basis of one subspace, shape ``(*batch, n, j)`` with ``j <= n``, full column rank;
            orthonormalised here unless `are_orthonormal`.
        second: Basis of the other, shape ``(*batch, n, k)`` with ``k <= n``, full column rank.
        are_orthonormal: Whether both bases have orthonormal columns already.

    Returns:
        Angles, shape ``(*batch, min(j, k))``, radians, ascending, in ``[0, pi / 2]``, float32
        unless a basis is float64.

    Raises:
        ValueError: If the bases do not live in the same space, are not finite, or are not
            non-empty floating-point matrices with at least as many rows as columns.

    References:
        Knyazev and Argentati (2002), "Principal angles between subspaces in an A-based scalar
        product", SIAM J. Sci. Comput. 23(6), Algorithm 3.1.
        https://doi.org/10.1137/S1064827500377332

    Example:
        >>> plane = torch.eye(3)[:, :2]
        >>> line = torch.tensor([[0.0], [3.0], [3.0]])
        >>> principal_angles(plane, line) / torch.pi
        tensor([0.2500])
    """
    if first.shape[:-1] != second.shape[:-1]:
        raise ValueError(
            "`first` and `second` must have the same batch dimensions and number of rows, got"
            f" shapes {tuple(first.shape)} and {tuple(second.shape)}."
        )
    if first.shape[-1] < second.shape[-1]:
        first, second = second, first
    dtype = torch.promote_types(compute_dtype(first), compute_dtype(second))
    wide, narrow = first.to(dtype), second.to(dtype)
    if not are_orthonormal:
        wide, narrow = orthonormalize(wide), orthonormalize(narrow)
    require_finite(wide, "first")
    require_finite(narrow, "second")

    overlap = wide.mT @ narrow
    cosines = torch.linalg.svdvals(overlap)
    sines = torch.linalg.svdvals(narrow - wide @ overlap).flip(-1)
    from_cosine = torch.acos(cosines.clamp(max=1))
    return torch.where(sines < math.sqrt(0.5), torch.asin(sines.clamp(max=1)), from_cosine)
