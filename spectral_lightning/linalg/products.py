"""Spectra and truncations of a product of thin factors ``W = U V``, which is never formed."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_lightning.linalg.checks import compute_dtype, require_finite, require_matrix
from spectral_lightning.linalg.precision import full_precision
from spectral_lightning.linalg.triplets import SingularTriplets


class Regauge(NamedTuple):
    """How to write a product of factors with other factors: ``U' = U T`` and ``V' = P^T V``.

    ``P^T T`` is the identity, so that gradients, and with them an optimizer's first moments, go the
    same way the other way round: ``G_U' = G_U P`` and ``G_V' = T^T G_V`` (chain rule).

    Attributes:
        of_left: ``T``, shape ``(r, k)``.
        of_right: ``P``, shape ``(r, k)``.
        values: Square roots of what each component adds to the output's energy, shape ``(k,)``,
            descending: singular values of the product, or with the inputs' moment those of
            ``W C_x^{1/2}``.
        discarded: Root of the energy of what is left out, 0-d.
    """

    of_left: Float[Tensor, "r k"]
    of_right: Float[Tensor, "r k"]
    values: Float[Tensor, " k"]
    discarded: Float[Tensor, ""]


def product_triplets(left: Float[Tensor, "m r"], right: Float[Tensor, "r n"]) -> SingularTriplets:
    """All singular triplets of a product of two factors.

    Two thin QR decompositions and one SVD of size ``r``, cost ``O((m + n) r^2 + r^3)``; waits for
    the device. Values are right to a few roundings of the compute dtype, relative to the largest.

    Args:
        left: ``U``, shape ``(m, r)``, finite.
        right: ``V``, shape ``(r, n)``, finite.

    Returns:
        The ``min(m, n, r)`` triplets, descending, in the compute dtype.

    Raises:
        ValueError: If the shapes do not fit together, or a factor is empty or not finite.

    References:
        Golub and Van Loan (2013), "Matrix computations", 4th ed., sec. 5.4 (R-SVD).

    Example:
        >>> product_triplets(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0]])).values
        tensor([10.])
    """
    (Q, A), S, (B, Y) = _decompose(left, right)
    with full_precision(Q.device):
        return SingularTriplets(Q @ A, S, Y @ B)


def product_singular_values(
    left: Float[Tensor, "m r"], right: Float[Tensor, "r n"]
) -> Float[Tensor, " k"]:
    """All singular values of a product of two factors, as of `product_triplets`.

    Args:
        left: ``U``, shape ``(m, r)``, finite.
        right: ``V``, shape ``(r, n)``, finite.

    Returns:
        The ``min(m, n, r)`` values, descending, in the compute dtype.

    Raises:
        ValueError: If the shapes do not fit together, or a factor is empty or not finite.

    Example:
        >>> product_singular_values(torch.eye(3)[:, :2], torch.eye(2, 4) * 5)
        tensor([5., 5.])
    """
    values: Tensor = torch.linalg.svdvals(product_core(left, right))
    return values


def product_core(left: Float[Tensor, "m r"], right: Float[Tensor, "r n"]) -> Float[Tensor, "p q"]:
    """A small matrix with the singular values of a product of two factors.

    ``R_U R_V^T`` of the thin QR decompositions ``U = Q_U R_U`` and ``V^T = Q_V R_V``; never waits
    for the device.

    Args:
        left: ``U``, shape ``(m, r)``.
        right: ``V``, shape ``(r, n)``.

    Returns:
        The core, shape ``(min(m, r), min(n, r))``, in the compute dtype.

    Raises:
        ValueError: If the shapes do not fit together, or a factor is empty.
    """
    first, second = _factors(left, right)
    with full_precision(first.device):
        R_U, R_V = (torch.linalg.qr(X, mode="r").R for X in (first, second.mT))
        return R_U @ R_V.mT


def truncation_values(
    left: Float[Tensor, "m r"],
    right: Float[Tensor, "r n"],
    moment: Float[Tensor, "r r"] | None = None,
) -> Float[Tensor, " k"]:
    """The values of all components that `truncation` would find; nothing is asked of the host.

    Args:
        left: ``U``, shape ``(m, r)``.
        right: ``V``, shape ``(r, n)``.
        moment: As of `truncation`.

    Returns:
        Values, shape ``(k,)``, descending, in the compute dtype; all NaN if an entry is not finite.

    Raises:
        ValueError: If the shapes do not fit together, or a factor is empty.

    Example:
        >>> truncation_values(torch.eye(2), torch.diag(torch.tensor([1.0, 4.0])))
        tensor([4., 1.])
    """
    first, second = _factors(left, right)
    given = [first, second, *_moments(moment, left.shape[1])]
    is_finite = torch.stack([torch.isfinite(part).all() for part in given]).all()
    first, second, *rest = (torch.where(is_finite, part, 0.0) for part in given)
    with full_precision(first.device):
        core = _output_core(first, rest[0])[0] if rest else product_core(first, second)
        values = torch.linalg.svdvals(core).to(first.dtype)
        return torch.where(is_finite, values, torch.nan)


def truncation(
    left: Float[Tensor, "m r"],
    right: Float[Tensor, "r n"],
    k: int,
    moment: Float[Tensor, "r r"] | None = None,
    *,
    is_balanced: bool = True,
) -> Regauge:
    r"""The best ``k`` components of a product of factors, in balanced form.

    Without `moment` the truncated singular value decomposition, the nearest matrix of rank ``k``
    (Eckart and Young 1936). With it the ``k`` components that keep most of the layer's output:
    ``E ||W x - W_k x||^2`` is smallest, for which it is enough to know ``C = E[h h^T]`` of
    ``h = V x``. Either way ``U'^T U' = V' V'^T``. Cost ``O((m + n) r^2 + r^3)``; waits for the
    device.

    Args:
        left: ``U``, shape ``(m, r)``, finite.
        right: ``V``, shape ``(r, n)``, finite.
        k: Components to keep, in ``[1, min(m, n, r)]``. Those whose value is zero to rounding get
            columns of zeros.
        moment: ``C``, shape ``(r, r)``, symmetric positive semidefinite, any scale.
        is_balanced: With `moment`, whether the kept components are mixed once more into the
            product's singular ones, which is the balanced form. If not they are ordered by what
            they add to the output, so that further ones can be cut off the end.

    Returns:
        How to get the kept factors.

    Raises:
        ValueError: If the shapes do not fit together, `k` is out of its range, or something is
            not finite.

    References:
        Wang et al. (2024), "SVD-LLM", sec. 3.1, whose whitening this does in ``r`` dimensions.
        https://arxiv.org/abs/2403.07378

    Example:
        >>> found = truncation(torch.eye(2), torch.diag(torch.tensor([1.0, 4.0])), 1)
        >>> (found.of_left @ found.of_right.mT).round(decimals=4) + 0.0
        tensor([[0., 0.],
                [0., 1.]])
    """
    first, second = _factors(left, right)
    most = min(*first.shape, second.shape[1])
    if not 1 <= k <= most:
        raise ValueError(f"`k` must be in [1, {most}], got {k}.")
    require_finite(first, "left")
    require_finite(second, "right")
    with full_precision(first.device):
        given = _moments(moment, left.shape[1])
        if not given:
            return _plain(first, second, k)
        kept = _weighted(first, second, given[0], k)
        if not is_balanced:
            return kept
        inner = _plain(first @ kept.of_left, kept.of_right.mT @ second, k)
        return Regauge(
            kept.of_left @ inner.of_left,
            kept.of_right @ inner.of_right,
            kept.values,
            kept.discarded,
        )


def _plain(left: Tensor, right: Tensor, k: int) -> Regauge:
    """Singular components: ``T = R_V^T B S^{-1/2}``, ``P = R_U^T A S^{-1/2}``."""
    R_U, R_V = (torch.linalg.qr(X, mode="r").R for X in (left, right.mT))
    A, S, Bh = torch.linalg.svd(R_U @ R_V.mT, full_matrices=False)
    root = _inverse(S[:k], S[0]).sqrt()
    of_left, of_right = R_V.mT @ Bh[:k].mT * root, R_U.mT @ A[:, :k] * root
    return Regauge(of_left, of_right, S[:k], torch.linalg.vector_norm(S[k:]))


def _weighted(left: Tensor, right: Tensor, moment: Tensor, k: int) -> Regauge:
    """Components of the output: with ``C = L L^T``, those of ``U L``."""
    require_finite(moment, "moment")
    core, L, of_inverse = _output_core(left, moment)
    _, S, Bh = torch.linalg.svd(core, full_matrices=False)
    of_left, of_right = L @ Bh[:k].mT, of_inverse @ Bh[:k].mT
    sizes = [
        torch.linalg.vector_norm(factor.double() @ by, dim=0)
        for factor, by in ((left, of_left), (right.mT, of_right))
    ]
    scale = (sizes[1] / sizes[0]).sqrt()  # equal columns and rows; the product stays
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
    parts = (of_left * scale, of_right / scale, S[:k], torch.linalg.vector_norm(S[k:]))
    return Regauge(*(part.to(left.dtype) for part in parts))


def _output_core(left: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``R_U L``, whose values are those of the output; ``L``; and ``L^{-T}``; in float64."""
    C = moment.double()
    values, vectors = torch.linalg.eigh((C + C.mT) / 2)
    # Directions in which the inputs never went count a little, so that the roots have inverses.
    floor = 1e-12 * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    roots = values.clamp_min(floor).sqrt()
    L = vectors * roots
    return torch.linalg.qr(left.double(), mode="r").R @ L, L, vectors / roots


def _moments(moment: Tensor | None, r: int) -> list[Tensor]:
    """The moment if there is one, refused if it does not fit."""
    if moment is None:
        return []
    require_matrix(moment, "moment")
    if tuple(moment.shape) != (r, r):
        raise ValueError(f"`moment` must have shape ({r}, {r}), got {tuple(moment.shape)}.")
    return [moment]


def _inverse(values: Tensor, largest: Tensor) -> Tensor:
    """Reciprocals; 0 for what is only rounding."""
    floor = torch.finfo(values.dtype).eps * largest
    return torch.where(values > floor, values.reciprocal(), 0.0)


def _decompose(
    left: Tensor, right: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor]]:
    first, second = _factors(left, right)
    require_finite(first, "left")
    require_finite(second, "right")
    with full_precision(first.device):
        (Q, R_U), (Y, R_V) = (torch.linalg.qr(X) for X in (first, second.mT))
        A, S, Bh = torch.linalg.svd(R_U @ R_V.mT, full_matrices=False)
    return (Q, A), S, (Bh.mT, Y)


def _factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors in the compute dtype."""
    require_matrix(left, "left")
    require_matrix(right, "right")
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(
            "`left` and `right` must be matrices (m, r) and (r, n), got shapes"
            f" {tuple(left.shape)} and {tuple(right.shape)}."
        )
    dtype = torch.promote_types(compute_dtype(left), compute_dtype(right))
    return left.detach().to(dtype), right.detach().to(dtype)
