"""Polar factor of a matrix by Newton-Schulz iteration: matrix products only, no decomposition."""

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_lightning.linalg.checks import compute_dtype, require_matrix

# Jordan (2024) chose these for the steepest slope at zero that keeps singular values near one.
MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(
    matrix: Float[Tensor, "*batch m n"],
    *,
    num_steps: int = 5,
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch m n"]:
    r"""Push every singular value of a matrix towards one and keep its singular vectors.

    Scales the matrix to Frobenius norm one, then applies the odd polynomial
    ``p(x) = a x + b x^3 + c x^5`` to the singular values ``num_steps`` times. The result is
    ``U p(...p(S / ||S||)...) Vh`` in exact arithmetic, so it approximates the polar factor
    ``U Vh``. With the default coefficients the values do not converge: after 5 steps, those that
    started at 2e-3 or more of the Frobenius norm lie in ``[0.68, 1.21]`` (computed from ``p``).
    With ``(1.875, -1.25, 0.375)`` they converge to one, with third order.

    Costs about ``4 k^2 l + 2 k^3`` multiply-adds per step for ``k = min(m, n)``,
    ``l = max(m, n)``; a batch is one batched product. A non-finite entry makes its whole matrix
    NaN; a zero matrix stays zero.

    Args:
        matrix: Matrices, shape ``(..., m, n)``, floating point. Half precision is computed in
            float32 unless `dtype` says otherwise.
        num_steps: Number of iterations, at least 1. Default from Jordan 2024.
        coefficients: ``(a, b, c)`` of the polynomial. Default from Jordan 2024.
        eps: Smallest Frobenius norm divided by; a smaller matrix gives smaller values. Default
            from Jordan 2024.
        dtype: Compute and result dtype, e.g. ``torch.bfloat16`` (errors of a few per cent).

    Returns:
        Matrices of the same shape, in the compute dtype, on the device of `matrix`.

    Raises:
        ValueError: If `matrix` is empty or no floating-point matrix, or `num_steps` is below 1.

    References:
        Jordan et al. (2024), "Muon: an optimizer for hidden layers in neural networks",
        https://kellerjordan.github.io/posts/muon/.
        Higham (2008), "Functions of Matrices", ch. 8 (convergent iterations).

    Example:
        >>> swap = torch.tensor([[0.0, 3.0], [3.0, 0.0]])
        >>> newton_schulz(swap, coefficients=(1.875, -1.25, 0.375)).round(decimals=3)
        tensor([[0., 1.],
                [1., 0.]])
    """
    require_matrix(matrix, "matrix")
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be >= 1, got {num_steps}.")
    a, b, c = coefficients
    num_rows, num_cols = matrix.shape[-2:]
    # The wide orientation makes the Gram matrix the smaller one.
    wide = matrix.to(dtype or compute_dtype(matrix)).reshape(-1, num_rows, num_cols)
    wide = wide.mT if num_rows > num_cols else wide
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=eps)
    for _ in range(num_steps):
        gram = wide @ wide.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.baddbmm(wide, polynomial, wide, beta=a)
    return (wide.mT if num_rows > num_cols else wide).reshape(matrix.shape)
