"""Matrices whose singular values are known because they were chosen."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_lightning.linalg import orthonormalize


def matrix_with_spectrum(
    values: Tensor,
    shape: tuple[int, int],
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Matrix with chosen singular values and random singular vectors.

    Built in float64 as ``U diag(values) V^T``, so the values are true to about 1e-15 of the
    largest; rounding to `dtype` then moves each by up to ``sqrt(m n) * eps / 2`` of it.

    Args:
        values: Singular values, shape ``(*batch, k)`` with ``k <= min(shape)``, non-negative, in
            any order; the remaining ones are zero.
        shape: Shape ``(m, n)`` of each matrix.
        generator: Source of the singular vectors, on the CPU.
        dtype: Dtype the matrix is stored in.

    Returns:
        Matrices, shape ``(*batch, m, n)``, on the CPU.

    Raises:
        ValueError: If there are more values than the shape has room for.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> weight = matrix_with_spectrum(torch.tensor([3.0, 4.0]), (5, 2), generator=generator)
        >>> torch.linalg.matrix_norm(weight).item()  # doctest: +ELLIPSIS
        5.0...
    """
    m, n = shape
    *batch, num_values = values.shape
    if num_values > min(shape):
        raise ValueError(
            f"`values` must hold at most min(shape) = {min(shape)} values, got {num_values}."
        )
    left, right = (
        orthonormalize(
            torch.randn(*batch, size, num_values, dtype=torch.float64, generator=generator)
        )
        for size in (m, n)
    )
    return ((left * values.double().unsqueeze(-2)) @ right.mT).to(dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixCase:
    """A kind of matrix that kernels are tried on."""

    shape: tuple[int, int]
    """Shape ``(m, n)`` of each matrix."""
    values: tuple[float, ...]
    """Singular values that are not zero, descending."""
    batch: tuple[int, ...] = ()
    """Batch dimensions; matrix ``i`` of the batch, counted in row-major order, is scaled by
    ``i + 1``."""

    def spectrum(self) -> Tensor:
        """All singular values, shape ``(*batch, min(m, n))``, descending, float64."""
        values = torch.zeros(min(self.shape), dtype=torch.float64)
        values[: len(self.values)] = torch.tensor(self.values, dtype=torch.float64)
        scale = torch.arange(1, math.prod(self.batch) + 1, dtype=torch.float64)
        return scale.reshape(*self.batch, 1) * values

    def build(self, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
        """Matrices, shape ``(*batch, m, n)``, with random singular vectors."""
        return matrix_with_spectrum(self.spectrum(), self.shape, generator=generator, dtype=dtype)


MATRIX_CASES = {
    "tall": MatrixCase(shape=(13, 5), values=(5.0, 3.0, 2.0, 1.0, 0.5)),
    "wide": MatrixCase(shape=(5, 13), values=(5.0, 3.0, 2.0, 1.0, 0.5)),
    "square": MatrixCase(shape=(6, 6), values=(4.0, 2.0, 1.0, 0.5, 0.25, 0.125)),
    "rank_deficient": MatrixCase(shape=(9, 6), values=(3.0, 2.0, 1.0)),
    "repeated": MatrixCase(shape=(8, 6), values=(2.0, 2.0, 2.0, 1.0, 1.0, 1.0)),
    "orthonormal": MatrixCase(shape=(7, 7), values=(1.0,) * 7),
    "decaying": MatrixCase(shape=(12, 8), values=tuple(10.0**-i for i in range(8))),
    "one_row": MatrixCase(shape=(1, 7), values=(3.0,)),
    "one_column": MatrixCase(shape=(7, 1), values=(3.0,)),
    "one_entry": MatrixCase(shape=(1, 1), values=(3.0,)),
    "zero": MatrixCase(shape=(4, 6), values=()),
    "batch": MatrixCase(shape=(7, 4), values=(4.0, 2.0, 1.0, 0.5), batch=(2, 3)),
}
"""The kinds every kernel is tried on, by name."""
