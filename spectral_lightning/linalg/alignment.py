"""How much of one matrix lies in the singular subspaces of another.

`principal` here means: of the ``k`` leading singular directions of a weight, whose orthonormal
bases ``U_k`` (left) and ``V_k`` (right) are given.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_lightning.linalg.checks import compute_dtype
from spectral_lightning.linalg.precision import full_precision

Side = Literal["two_sided", "left", "right", "block"]
"""A part of a matrix ``X``: what touches a principal direction on either side, ``U U^T X``,
``X V V^T``, or ``U U^T X V V^T``."""


class PrincipalEnergy(NamedTuple):
    """What of a matrix ``X`` is in principal subspaces: squared norms, 0-d, and coordinates.

    Attributes:
        total: ``||X||_F^2``.
        left: ``||U_k^T X||_F^2``, what reaches the principal outputs.
        right: ``||X V_k||_F^2``, what reads the principal inputs.
        block: ``||U_k^T X V_k||_F^2``, what does both.
        columns: ``X V_k``, shape ``(m, k)``.
        changes: ``u_i^T X v_i``, shape ``(k,)``, in the units of ``X``. If the bases are singular
            vectors of a weight to which ``X`` is added, the changes of its singular values to first
            order: negative where a direction is eroded, positive where it is strengthened (Stewart
            and Sun 1990, "Matrix perturbation theory", sec. IV.2).
    """

    total: Float[Tensor, ""]
    left: Float[Tensor, ""]
    right: Float[Tensor, ""]
    block: Float[Tensor, ""]
    columns: Float[Tensor, "m k"]
    changes: Float[Tensor, " k"]

    def of(self, side: Side) -> Tensor:
        """Share of the energy in a part, dimensionless, in [0, 1]; NaN for a matrix of zeros."""
        parts = {
            "left": self.left,
            "right": self.right,
            "block": self.block,
            "two_sided": self.left + self.right - self.block,
        }
        return parts[side] / self.total


def principal_energy(
    matrix: Float[Tensor, "m n"], left: Float[Tensor, "m k"], right: Float[Tensor, "n k"]
) -> PrincipalEnergy:
    """Energy of a matrix in the principal subspaces of another.

    Two products of cost ``O(m n k)``; never waits for the device.

    Args:
        matrix: Matrix ``X``, shape ``(m, n)``: a gradient or an update.
        left: Basis ``U_k``, shape ``(m, k)``, orthonormal columns.
        right: Basis ``V_k``, shape ``(n, k)``, orthonormal columns.

    Returns:
        Energies in the compute dtype (float32 for half precision).

    Raises:
        ValueError: If the shapes do not fit together.

    Example:
        >>> U = torch.eye(3)[:, :1]
        >>> principal_energy(torch.ones(3, 3), U, U).of("two_sided")
        tensor(0.5556)
    """
    require_bases(matrix, left, right)
    dtype = compute_dtype(matrix)
    X = matrix.detach().to(dtype)
    with full_precision(X.device):
        rows, columns = left.to(dtype).mT @ X, X @ right.to(dtype)
        block = rows @ right.to(dtype)
    total, first, second, both = (_energy(part) for part in (X, rows, columns, block))
    return PrincipalEnergy(total, first, second, both, columns, block.diagonal())


def chance_share(shape: tuple[int, int], k: int, side: Side) -> float:
    """Share of the energy of a Gaussian matrix in a part, whatever the subspaces.

    Args:
        shape: Shape ``(m, n)``.
        k: Principal directions.
        side: Part.

    Returns:
        Expected share, dimensionless, in [0, 1].

    Example:
        >>> chance_share((256, 256), 64, "left")
        0.25
    """
    m, n = shape
    left, right = k / m, k / n
    shares = {
        "left": left,
        "right": right,
        "block": left * right,
        "two_sided": 1 - (1 - left) * (1 - right),
    }
    return shares[side]


class PrincipalPart(NamedTuple):
    """The part of a matrix in a principal subspace: ``U_k rows + columns V_k^T``.

    The two terms are orthogonal, so that their squared norms add up to the part's.

    Attributes:
        rows: Coordinates of the first term, shape ``(k, n)``; None if there is no such term.
        columns: Those of the second, shape ``(m, k)``, or None.
    """

    rows: Float[Tensor, "k n"] | None
    columns: Float[Tensor, "m k"] | None

    def norm(self) -> Tensor:
        """Frobenius norm of the part, 0-d."""
        parts = [torch.linalg.vector_norm(part) for part in self if part is not None]
        return torch.linalg.vector_norm(torch.stack(parts))

    def minus(self, other: "PrincipalPart") -> "PrincipalPart":
        """Difference from the same part of another matrix."""
        pairs = zip(self, other, strict=True)
        return PrincipalPart(*(None if a is None or b is None else a - b for a, b in pairs))

    def matrix(self, left: Float[Tensor, "m k"], right: Float[Tensor, "n k"]) -> Tensor:
        """The part as a matrix ``(m, n)``, by the bases that it was taken with."""
        with full_precision(left.device):
            terms = [
                *([] if self.rows is None else [left @ self.rows]),
                *([] if self.columns is None else [self.columns @ right.mT]),
            ]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def principal_part(
    matrix: Float[Tensor, "m n"],
    left: Float[Tensor, "m k"],
    right: Float[Tensor, "n k"],
    side: Side,
) -> PrincipalPart:
    """The part of a matrix that lies in a principal subspace: its orthogonal projection.

    Args:
        matrix: Matrix ``X``, shape ``(m, n)``.
        left: Basis ``U_k``, shape ``(m, k)``, orthonormal columns.
        right: Basis ``V_k``, shape ``(n, k)``, orthonormal columns.
        side: Which part.

    Returns:
        The part by its coordinates, in the compute dtype.

    Raises:
        ValueError: If the shapes do not fit together.

    Example:
        >>> e = torch.eye(2)[:, :1]
        >>> principal_part(torch.ones(2, 2), e, e, "two_sided").matrix(e, e)
        tensor([[1., 1.],
                [1., 0.]])
    """
    require_bases(matrix, left, right)
    dtype = compute_dtype(matrix)
    X, U, V = matrix.detach().to(dtype), left.to(dtype), right.to(dtype)
    with full_precision(X.device):
        if side == "right":
            return PrincipalPart(None, X @ V)
        rows = U.mT @ X
        if side == "left":
            return PrincipalPart(rows, None)
        if side == "block":
            return PrincipalPart((rows @ V) @ V.mT, None)
        return PrincipalPart(rows, X @ V - U @ (rows @ V))


def require_bases(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """Refuse bases that do not belong to a matrix."""
    m, n = matrix.shape
    k = left.shape[-1]
    if left.shape != (m, k) or right.shape != (n, k):
        raise ValueError(
            f"`left` and `right` must have shapes ({m}, k) and ({n}, k) for a matrix of shape"
            f" {(m, n)}, got {tuple(left.shape)} and {tuple(right.shape)}."
        )


def _energy(part: Tensor) -> Tensor:
    return torch.linalg.vector_norm(part).square()
