"""Leading singular triplets of many matrices of one shape, from a warm start.

Lives here: the block Golub-Kahan (Lanczos) process with Rayleigh-Ritz, the kernel behind every
per-step reading. One pass is a step of block power iteration; each further pass adds to a
Krylov space. Does not live here: who keeps the warm start, and when to measure.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_lightning.linalg.precision import full_precision
from spectral_lightning.linalg.ritz import orthonormalize_rows, rayleigh_ritz


class LeadingTriplets(NamedTuple):
    """Leading singular triplets of ``L`` matrices of shape ``(m, n)``.

    Attributes:
        values: Ritz values, shape ``(L, k)``, float64, descending, in the matrices' own units.
        residual: ``||W^T u - sigma v||_2`` of the first triplet, shape ``(L,)``, float64.
        Vh: Right Ritz vectors as rows, shape ``(L, k, n)``, compute dtype.
        next_start: ``(W^T W V)^T``, rows scaled to length 1, shape ``(L, k, n)``: the basis to
            start from when the weights have moved a little.
        frobenius_norm: ``||W||_F``, shape ``(L,)``, float64.
        num_passes: Passes over each matrix (two products each), shape ``(L,)``, int64.
    """

    values: Float[Tensor, "L k"]
    residual: Float[Tensor, " L"]
    Vh: Float[Tensor, "L k n"]
    next_start: Float[Tensor, "L k n"]
    frobenius_norm: Float[Tensor, " L"]
    num_passes: Int[Tensor, " L"]


class _Krylov(NamedTuple):
    """A basis ``Q`` of right vectors (rows), with ``W Q`` (in row blocks) and ``W^T W Q``."""

    Q: Tensor  # (L, p, n)
    A: Tensor  # (L, blocks, p, m / blocks)
    B: Tensor  # (L, p, n)

    def extended(self, other: "_Krylov") -> "_Krylov":
        return _Krylov(*(torch.cat(pair, dim=-2) for pair in zip(self, other, strict=True)))

    def rows(self, index: Tensor) -> "_Krylov":
        return _Krylov(*(part[index] for part in self))


class _Ritz(NamedTuple):
    """Leading Ritz pairs of a `_Krylov` basis."""

    values: Tensor  # (L, k) float64
    V: Tensor  # (L, k, n)
    B: Tensor  # (L, k, n): W^T W v / sigma^2, free of the weight's scale
    gradient: Tensor  # (L, k, n): W^T W v / sigma^2 - v
    residual: Tensor  # (L,) float64: ||W^T u - sigma v|| of the first pair


def leading_triplets(
    weights: Sequence[Float[Tensor, "m n"]],
    start: Float[Tensor, "L k n"],
    *,
    num_passes: int | None = None,
    rtol: float = 2e-4,
    max_residual: float = 0.05,
    max_passes: int = 8,
) -> LeadingTriplets:
    r"""Find the ``k`` leading singular triplets of each matrix from a starting subspace.

    A pass multiplies by ``W`` and by ``W^T`` and solves the projected problem
    (Rayleigh-Ritz), at ``4 k m n`` operations per matrix; with one pass this is warm-started
    block power iteration. Each further pass appends the ``k`` residual directions to the basis,
    which makes the space a Krylov space: a value whose neighbour is close converges in about
    the square root of the passes that power iteration needs.

    Values never overshoot by more than rounding: ``values[:, 0] <= ||W||_2``, and a singular
    value lies within ``residual`` of ``values[:, 0]`` (`spectral_norm_interval`).

    Args:
        weights: ``L`` matrices of one shape ``(m, n)``. Half precision is computed in float32,
            one matrix at a time; float64 stays float64. Autocast, TF32 and bfloat16 products that
            the run has switched on do not apply here.
        start: Rows that span the space to start from, shape ``(L, k, n)``,
            ``k <= min(m, n)``, in the compute dtype. They are orthonormalised here.
        num_passes: Passes over every matrix, chosen beforehand: nothing then waits for the
            device. None adds passes to each matrix until it has converged, which reads the
            residuals on the host (free on a CPU).
        rtol: With ``num_passes=None``, stop when the estimated relative error
            ``r^2 / (2 (1 - (s_2 / s_1)^2) + r)``, ``r = residual / s_1``, is at most this. Set
            by hand; `Tracker` passes the one ``scripts/choose_tracking.py`` measured.
        max_residual: With ``num_passes=None``, largest ``r`` at which a matrix counts as
            converged whatever the estimate. Set by hand; no script has varied it.
        max_passes: With ``num_passes=None``, most passes over one matrix.

    Returns:
        Triplets on the device of the weights. A matrix with a NaN or infinite entry gives a
        non-finite Frobenius norm and NaN values; it does not disturb the others.

    Raises:
        ValueError: If the shapes do not fit together or a number of passes is below 1.

    References:
        Golub and Kahan (1965), "Calculating the singular values and pseudo-inverse of a
        matrix", SIAM J. Numer. Anal. 2(2). Parlett (1998), "The Symmetric Eigenvalue
        Problem", sec. 11.7 (error from residual and gap) and 13.10 (block Lanczos).
        Halko, Martinsson and Tropp (2011), "Finding structure with randomness", SIAM Review
        53(2), Algorithm 4.4. https://arxiv.org/abs/0909.4061

    Example:
        >>> weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> found = leading_triplets([weight], torch.eye(3)[None, :2])
        >>> found.values.round(decimals=4), found.residual.item()
        (tensor([[3., 2.]], dtype=torch.float64), 0.0)
    """
    _check(weights, start, num_passes, max_passes)
    passes = torch.ones(len(weights), dtype=torch.int64, device=start.device)
    with full_precision(start.device):
        norms, space = _multiply(weights, orthonormalize_rows(start), with_norms=True)
        assert norms is not None
        ritz = _ritz(space, start.shape[1])
        if num_passes is None:
            _refine_until_converged(
                weights, space, ritz, passes, rtol=rtol, max_residual=max_residual, limit=max_passes
            )
        else:
            for _ in range(num_passes - 1):
                space, ritz = _expand(weights, space, ritz)
            passes.fill_(num_passes)
    return LeadingTriplets(
        values=ritz.values,
        residual=ritz.residual,
        Vh=ritz.V,
        next_start=ritz.B / torch.linalg.vector_norm(ritz.B, dim=-1, keepdim=True).clamp_min(1e-30),
        frobenius_norm=norms,
        num_passes=passes,
    )


def _check(
    weights: Sequence[Tensor], start: Tensor, num_passes: int | None, max_passes: int
) -> None:
    shapes = sorted({tuple(weight.shape) for weight in weights})
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise ValueError(f"`weights` must be matrices of one shape (m, n), got {shapes}.")
    m, n = shapes[0]
    k = start.shape[1] if start.ndim == 3 else 0
    if tuple(start.shape) != (len(weights), k, n) or not 1 <= k <= min(m, n):
        raise ValueError(
            f"`start` must have shape ({len(weights)}, k, {n}) with 1 <= k <= {min(m, n)} to match"
            f" {len(weights)} weights of shape {(m, n)}, got {tuple(start.shape)}."
        )
    for name, value in {"num_passes": num_passes, "max_passes": max_passes}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be >= 1, got {value}.")


def _multiply(
    weights: Sequence[Tensor], Q: Tensor, *, with_norms: bool = False
) -> tuple[Tensor | None, _Krylov]:
    """Products with every weight, each read once from memory; optionally Frobenius norms."""
    (m, n), (L, p, _) = weights[0].shape, Q.shape
    blocks = _num_row_blocks(m, Q.device)
    A, B = Q.new_empty(L, blocks, m // blocks, p), torch.empty_like(Q)
    row_norms = Q.new_empty(L, m)
    for weight, q, a, b, norms in zip(
        weights, Q.unbind(), A.unbind(), B.unbind(), row_norms.unbind(), strict=True
    ):
        dense = weight.detach().to(Q.dtype)
        W = dense.reshape(blocks, m // blocks, n)
        torch.bmm(W, q.mT.expand(blocks, n, p), out=a)
        torch.sum(torch.bmm(a.mT, W), dim=0, out=b)
        if with_norms:
            torch.linalg.vector_norm(dense, dim=1, out=norms)
    total = row_norms.double().square().sum(dim=1).sqrt() if with_norms else None
    return total, _Krylov(Q, A.mT, B)


def _num_row_blocks(m: int, device: torch.device) -> int:
    """Blocks of rows in which a weight is multiplied: on a CPU one for each thread.

    A thread then finds in its own cache the rows it read for `W V` when it needs them again for
    `W^T U` and for the norm: 8.3 against 10.4 ms for the 57 matrices of a 30 M Llama, two cores.
    In blocks `W V` is faster with the vectors as columns (on another machine, 3.6 against 7.4 ms;
    both products and norms 8.9 against 11.8), the product with `W^T` with them as rows.
    """
    blocks = torch.get_num_threads() if device.type == "cpu" else 1
    return blocks if m % blocks == 0 else 1


def _ritz(space: _Krylov, k: int) -> _Ritz:
    """Rayleigh-Ritz over the basis; the `k` leading pairs and what is left of `W^T W v`."""
    Q, A, B = space
    # Sums of equal float32 terms, as of a constant weight, would be off by sqrt(m) roundings, and
    # what is left of dependent rows then by all of the value.
    Q64, A64 = Q.double(), A.double()
    gram, projected = Q64 @ Q64.mT, (A64 @ A64.mT).sum(dim=1)
    values, coefficients = rayleigh_ritz(gram, projected, k, dtype=Q.dtype)
    V, image = coefficients @ Q, coefficients @ B
    # Divided by sigma^2 nothing overflows or vanishes, and what is below rounding stays small.
    squares = values.square()
    floor = (torch.finfo(V.dtype).eps * squares[:, :1]).clamp_min(torch.finfo(V.dtype).tiny)
    scale = squares.maximum(floor).reciprocal().to(V.dtype)
    B = scale.unsqueeze(-1) * image
    gradient = B - V
    residual = values[:, 0] * torch.linalg.vector_norm(gradient[:, 0], dim=-1).double()
    return _Ritz(values, V, B, gradient, residual)


def _expand(weights: Sequence[Tensor], space: _Krylov, ritz: _Ritz) -> tuple[_Krylov, _Ritz]:
    """One more pass: append the residual directions, made orthogonal to the basis.

    Where they do not fit into the space any more, start again from a step of power iteration.
    """
    k = ritz.V.shape[1]
    if space.Q.shape[1] + k <= weights[0].shape[1]:
        X = ritz.gradient
        for _ in range(2):  # a converged pair's residual is rounding, mostly inside the basis
            X = X / torch.linalg.vector_norm(X, dim=-1, keepdim=True).clamp_min(1e-30)
            X = X - (X @ space.Q.mT) @ space.Q
        space = space.extended(_multiply(weights, orthonormalize_rows(X))[1])
    else:
        space = _multiply(weights, orthonormalize_rows(ritz.B))[1]
    return space, _ritz(space, k)


def _refine_until_converged(
    weights: Sequence[Tensor],
    space: _Krylov,
    ritz: _Ritz,
    passes: Tensor,
    *,
    rtol: float,
    max_residual: float,
    limit: int,
) -> None:
    """Add passes to the matrices that need them; overwrites `ritz` and `passes`."""
    active = torch.arange(len(weights), device=passes.device)
    part = ritz
    for _ in range(limit - 1):
        unfinished = ~_converged(part, rtol, max_residual)
        if not bool(unfinished.any()):
            return
        active, space = active[unfinished], space.rows(unfinished)
        part = _Ritz(*(field[unfinished] for field in part))
        space, part = _expand([weights[i] for i in active.tolist()], space, part)
        for whole, rows in zip(ritz, part, strict=True):
            whole[active] = rows
        passes[active] += 1


def _converged(ritz: _Ritz, rtol: float, max_residual: float) -> Tensor:
    leading = ritz.values[:, 0]
    r = ritz.residual / leading
    ratio = ritz.values[:, 1] / leading if ritz.values.shape[1] > 1 else torch.ones_like(leading)
    error = r.square() / (2 * (1 - ratio.square()) + r)
    done = (error <= rtol) & (r <= max_residual)
    return done | ~torch.isfinite(r) | (r == 0)
