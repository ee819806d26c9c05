"""Both singular vectors of a few singular values of one matrix, for those who change it.

Lives here: the leading triplets from a warm start, the smallest ones exactly. Does not live here:
following only the values of many matrices at every step, which is cheaper (`lanczos`).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_lightning.linalg.checks import compute_dtype, require_finite, require_matrix
from spectral_lightning.linalg.lanczos import leading_triplets
from spectral_lightning.linalg.precision import full_precision


class SingularTriplets(NamedTuple):
    """Some singular triplets of a matrix ``W`` of shape ``(m, n)``.

    Attributes:
        left: Left singular vectors, shape ``(m, k)``, orthonormal columns but for those of values
            that are 0 up to rounding (see each function).
        values: Singular values, shape ``(k,)``, descending, in the matrix's own units.
        right: Right singular vectors, shape ``(n, k)``, orthonormal columns.
    """

    left: Float[Tensor, "m k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "n k"]


def leading_singular_triplets(
    weight: Float[Tensor, "m n"], start: Float[Tensor, "k n"], *, num_passes: int
) -> tuple[SingularTriplets, Float[Tensor, "k n"]]:
    """Leading triplets of a matrix, refined from a starting subspace by a fixed number of passes.

    As `leading_triplets`, for one matrix and with left vectors: ``W v`` divided by the value, so 0
    for a value of 0. Needs ``2 num_passes + 1`` products with ``k`` vectors, and does not wait
    for the device if ``k <= 32``. Autocast and reduced matmul precision that the run has switched
    on do not apply.

    Args:
        weight: Matrix ``W``, shape ``(m, n)``. Half precision is computed in float32.
        start: Rows that span the space to start from, shape ``(k, n)``, ``k <= min(m, n)``, in the
            compute dtype.
        num_passes: Passes over the matrix, at least 1.

    Returns:
        The triplets, in the compute dtype; and the rows to start from when the weight has moved a
        little. A matrix with a NaN or infinite entry gives NaN.

    Raises:
        ValueError: If the shapes do not fit together, `start` is not in the compute dtype, or
            `num_passes` is below 1.

    References:
        Golub and Van Loan (2013), "Matrix computations", 4th ed., sec. 10.4.

    Example:
        >>> weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> found, _ = leading_singular_triplets(weight, torch.eye(3)[:2], num_passes=1)
        >>> found.values
        tensor([3., 2.])
    """
    _require_matrix(weight)
    m, n = weight.shape
    if start.ndim != 2 or start.shape[1] != n or not 1 <= len(start) <= min(m, n):
        raise ValueError(
            f"`start` must have shape (k, {n}) with 1 <= k <= {min(m, n)} to match a weight of"
            f" shape {(m, n)}, got {tuple(start.shape)}."
        )
    if start.dtype != compute_dtype(weight):
        raise ValueError(
            f"`start` must be {compute_dtype(weight)} for a weight of {weight.dtype}, got"
            f" {start.dtype}; cast it first."
        )
    found = leading_triplets([weight], start.unsqueeze(0), num_passes=num_passes)
    right, dense = found.Vh[0], weight.detach().to(start.dtype)
    with full_precision(start.device):
        image = dense @ right.mT
    values = torch.linalg.vector_norm(image, dim=0)
    left = image / values.clamp_min(torch.finfo(values.dtype).tiny)
    return SingularTriplets(left, values, right.mT), found.next_start[0]


def singular_triplets(weight: Float[Tensor, "m n"]) -> SingularTriplets:
    """All triplets of a matrix, by a full decomposition.

    Cost ``O(m n min(m, n))``; waits for the device. Relative to the largest, values and the
    orthonormality of the vectors are right to a few units of rounding of the compute dtype.
    Decomposed on the CPU where the device has no such kernel (Apple GPUs).

    Args:
        weight: Matrix ``W``, shape ``(m, n)``, finite, non-empty. Half precision is computed in
            float32.

    Returns:
        The ``min(m, n)`` triplets, descending, in the compute dtype, on the device of `weight`.

    Raises:
        ValueError: If `weight` is not a non-empty finite matrix.

    Example:
        >>> singular_triplets(torch.diag(torch.tensor([3.0, 2.0, 1.0]))).values
        tensor([3., 2., 1.])
    """
    _require_matrix(weight)
    require_finite(weight)
    dense = weight.detach().to(compute_dtype(weight))
    with full_precision(dense.device):
        try:
            U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        except NotImplementedError:  # as on Apple GPUs
            U, S, Vh = torch.linalg.svd(dense.cpu(), full_matrices=False)
    return SingularTriplets(*(part.to(dense.device) for part in (U, S, Vh.mT)))


def smallest_singular_triplets(weight: Float[Tensor, "m n"], k: int) -> SingularTriplets:
    """The ``k`` smallest triplets of a matrix, from a full decomposition in float64.

    Cost ``O(m n min(m, n))``; waits for the device. Vectors of a singular value of 0 are some
    orthonormal basis of the null space.

    Args:
        weight: Matrix ``W``, shape ``(m, n)``, finite, non-empty.
        k: Number of triplets, ``1 <= k <= min(m, n)``.

    Returns:
        Triplets, descending, in the compute dtype of the weight (float32 for half precision).

    Raises:
        ValueError: If `weight` is not a non-empty finite matrix, or `k` is out of its range.

    Example:
        >>> smallest_singular_triplets(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2).values
        tensor([2., 1.])
    """
    _require_matrix(weight)
    if not 1 <= k <= min(weight.shape):
        raise ValueError(f"`k` must be in [1, {min(weight.shape)}], got {k}.")
    require_finite(weight)
    U, S, Vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    dtype = compute_dtype(weight)
    return SingularTriplets(U[:, -k:].to(dtype), S[-k:].to(dtype), Vh[-k:].mT.to(dtype))


def _require_matrix(weight: Tensor) -> None:
    """Refuse what is not one non-empty floating-point matrix."""
    require_matrix(weight)
    if weight.ndim != 2:
        raise ValueError(
            f"`weight` must be one matrix (m, n), got shape {tuple(weight.shape)}; take the"
            " matrices of a batch one by one."
        )
