"""The small projected problem of subspace methods, batched and without a host sync."""

import torch
from jaxtyping import Float
from torch import Tensor

# Repeated squaring raises a Gram matrix to the power 2**14: values closer than 1e-4 (relative)
# are not told apart, which then costs less than 1e-4 / 2e of the value itself.
_NUM_SQUARINGS = 14

# Each pair costs about 80 small kernels by squaring, so that of many pairs `eigh` is faster even
# though the host waits for it. Set by hand.
_MOST_SQUARED = 32

# Roundings by which a Gram matrix is shifted to be definite.
_SHIFT = 64


def orthonormalize_rows(rows: Float[Tensor, "L k n"]) -> Float[Tensor, "L k n"]:
    """Turn the rows of each block into an orthonormal basis of (nearly) their span.

    Cholesky of the Gram matrix in float64, with rows scaled to length 1 first: only matrix
    products and triangular solves of size ``k``, so that it never waits for a GPU. The error of
    orthogonality is up to 64 ``eps`` times the squared condition number of the scaled rows;
    (nearly) dependent rows give short rows rather than a failure. `rayleigh_ritz` takes the Gram
    matrix into account, so that values stay right in either case. For an exactly orthonormal
    basis whatever the input, as columns, see `orthonormalize`.

    Args:
        rows: Blocks of ``k`` rows, shape ``(L, k, n)``, ``k <= n``.

    Returns:
        Blocks with orthonormal rows, shape ``(L, k, n)``.

    References:
        Yamamoto et al. (2015), "Roundoff error analysis of the CholeskyQR2 algorithm",
        ETNA 44, sec. 2.

    Example:
        >>> orthonormalize_rows(torch.tensor([[[2.0, 0.0], [3.0, 4.0]]])).round(decimals=4) + 0.0
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    tiny = torch.finfo(rows.dtype).tiny
    Q = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(tiny)
    return _whitening((Q @ Q.mT).double(), torch.finfo(Q.dtype).eps).to(Q.dtype) @ Q


def rayleigh_ritz(
    gram: Float[Tensor, "L p p"], projected: Float[Tensor, "L p p"], k: int, *, dtype: torch.dtype
) -> tuple[Float[Tensor, "L k"], Float[Tensor, "L k p"]]:
    """Leading singular values of matrices seen through a basis, and how to combine the basis.

    Solves ``(A A^T) c = s^2 (Q Q^T) c`` for the rows ``Q`` of a basis and ``A = Q W^T`` in float64.
    On a CPU, and for more than 32 pairs, by `torch.linalg.eigh`; else by repeated squaring, since
    on other devices `eigh` makes the host wait for its error code. Directions in which the rows are
    dependent up to rounding are left out (their values come out too small), so that no value
    overshoots by more than rounding.

    Args:
        gram: ``Q Q^T``, shape ``(L, p, p)``, float64.
        projected: ``A A^T``, shape ``(L, p, p)``, float64.
        k: Number of pairs wanted, ``1 <= k <= p``.
        dtype: Dtype that ``Q`` and ``A`` were computed in, whose epsilon is meant by rounding.

    Returns:
        Ritz values, shape ``(L, k)``, float64, descending; and coefficients, shape ``(L, k, p)``,
        in ``dtype``, whose product with the basis gives unit Ritz vectors. NaN where
        the input is not finite.

    References:
        Parlett (1998), "The Symmetric Eigenvalue Problem", sec. 11.3 and 15.9.

    Example:
        >>> values, coefficients = rayleigh_ritz(
        ...     torch.eye(2).double()[None],
        ...     torch.diag(torch.tensor([4.0, 9.0])).double()[None],
        ...     1,
        ...     dtype=torch.float32,
        ... )
        >>> round(values.item(), 4), coefficients.abs().round(decimals=4)
        (3.0, tensor([[[0., 1.]]]))
    """
    finite = torch.isfinite(gram + projected).all(dim=(-2, -1))
    identity = torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    shown = finite[:, None, None]
    whitening = _whitening(torch.where(shown, gram, identity), torch.finfo(dtype).eps)
    inner = whitening @ torch.where(shown, projected, identity) @ whitening.mT
    if inner.device.type == "cpu" or k > _MOST_SQUARED:
        squares, vectors = torch.linalg.eigh(inner)
        squares, vectors = squares.flip(-1)[:, :k], vectors.flip(-1)[:, :, :k].mT
    else:
        squares, vectors = leading_eigenpairs(inner, k)
    coefficients = vectors @ whitening
    # Not 1, since the Gram matrix was shifted; near 0 for what is only rounding of dependent rows.
    length = ((coefficients @ gram) * coefficients).sum(dim=-1).clamp_min(0.5)
    values = (squares.clamp_min(0) / length).sqrt().cummin(dim=-1).values
    values = torch.where(finite[:, None], values, torch.nan)
    return values, (coefficients / length.sqrt().unsqueeze(-1)).to(dtype)


def leading_eigenpairs(
    matrix: Float[Tensor, "L p p"], k: int
) -> tuple[Float[Tensor, "L k"], Float[Tensor, "L k p"]]:
    """Leading eigenpairs of small symmetric positive semidefinite matrices by matrix products.

    Squares the matrix 14 times, takes the longest column as eigenvector, removes it, repeats. A
    value is below the true one by at most about 2e-5 of it (two values that close to each other
    are not told apart), and never above. Never waits for a GPU.

    Args:
        matrix: Symmetric positive semidefinite matrices, shape ``(L, p, p)``, float64.
        k: Number of pairs wanted.

    Returns:
        Values, shape ``(L, k)``, descending, and unit eigenvectors as rows, shape ``(L, k, p)``.

    Example:
        >>> values, vectors = leading_eigenpairs(torch.diag(torch.tensor([4.0, 9.0]))[None], 1)
        >>> values, vectors
        (tensor([[9.]]), tensor([[[0., 1.]]]))
    """
    tiny = torch.finfo(matrix.dtype).tiny
    rest, values, vectors = matrix, [], []
    for _ in range(k):
        power = rest
        for _ in range(_NUM_SQUARINGS):
            power = power / power.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
            power = power @ power
        longest = torch.linalg.vector_norm(power, dim=-2).argmax(dim=-1)
        v = torch.take_along_dim(power, longest[:, None, None], dim=-1)
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(tiny)
        value = v.mT @ rest @ v
        values.append(value[:, 0, 0])
        vectors.append(v[:, :, 0])
        rest = rest - value * (v @ v.mT)
    # Values that are not told apart may come in either order.
    ordered, order = torch.stack(values, dim=-1).sort(dim=-1, descending=True)
    rows = torch.stack(vectors, dim=-2)
    return ordered, torch.take_along_dim(rows, order.unsqueeze(-1), dim=-2)


def _whitening(gram: Tensor, eps: float) -> Tensor:
    """Inverse Cholesky factor of float64 Gram matrices of rows computed to a precision of `eps`.

    A touch of identity makes them definite and keeps rounding of dependent rows from being blown
    up: without it, 20 equal rows gave values 1e6 times too large. The division leaves orthonormal
    rows as they are.
    """
    identity = torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    scale = gram.diagonal(dim1=-2, dim2=-1).amax(dim=-1)[:, None, None]
    shift = _SHIFT * eps
    definite = gram + shift * torch.where(scale > 0, scale, 1.0) * identity
    factor, _ = torch.linalg.cholesky_ex(definite / (1 + shift))
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
