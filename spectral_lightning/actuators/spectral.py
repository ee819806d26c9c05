"""Updates of a weight along its own singular vectors, as functions of triplets.

Lives here: the direction and the full length of each update. Does not live here: how much of it is
taken, and writing it (`apply`). All is computed on the device of the weight; nothing waits for it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spectral_lightning.linalg import SingularTriplets

RANK_ONE = 1e-6
"""Share of ``||W||_F^2`` outside the leading values below which a float32 weight has no others:
what is left is rounding, and no step along singular vectors can revive it."""


class SpectralUpdate(NamedTuple):
    """The update ``shrink * W + left @ diag(coefficients) @ right.T`` of a weight ``W``.

    Attributes:
        left: Left singular vectors, shape ``(m, k)``, orthonormal columns.
        coefficients: Change of each of these singular values, shape ``(k,)``, weight's own units.
        right: Right singular vectors, shape ``(n, k)``, orthonormal columns.
        values: Singular values of the ``k`` directions before the update, shape ``(k,)``.
        shrink: Relative change of the whole weight, dimensionless, 0-d; None for no change.
    """

    left: Tensor
    coefficients: Tensor
    right: Tensor
    values: Tensor
    shrink: Tensor | None = None


def spectral_cap_update(
    triplets: SingularTriplets, frobenius_norm: Tensor, floor: float
) -> SpectralUpdate:
    r"""Bring the leading singular values down to where the stable rank is at its floor.

    Moves the *stable rank* up and the *spectral norm* and *condition number* down; leaves all other
    singular values, and so the bulk, as they are. The cap ``tau`` solves
    ``(sum_{i > j} sigma_i^2 + j tau^2) / tau^2 = floor`` for the number ``j`` of capped values, so
    that the whole update lands on the floor if the ``k`` given values include all above the cap;
    otherwise it goes part of the way, never past it (`cap_of`), and close values take turns: one
    that is not given may stay the largest while others are lowered.

    Args:
        triplets: Leading ``k`` triplets, descending.
        frobenius_norm: ``||W||_F``, 0-d tensor.
        floor: Stable rank to reach, dimensionless, at least 1.

    Returns:
        The update that removes the whole excess; none for a weight of (numerically) rank one, or
        of any rank below the floor, which no cap can bring there.

    References:
        Block form of the spectral hinge ``1/2 (sigma - tau)_+^2``, whose gradient is
        ``(sigma - tau)_+ u v^T``; Yoshida and Miyato (2017), "Spectral norm regularization",
        sec. 3, https://arxiv.org/abs/1705.10941.
    """
    tau = cap_of(triplets.values, frobenius_norm, floor)
    excess = (triplets.values - tau).clamp_min(0)
    coefficients = torch.where(_reachable(triplets.values, frobenius_norm, floor), -excess, 0.0)
    return SpectralUpdate(triplets.left, coefficients, triplets.right, triplets.values)


def log_stable_rank_update(
    triplets: SingularTriplets, frobenius_norm: Tensor, floor: float, *, keeps_norm: bool
) -> SpectralUpdate:
    r"""Step up the gradient of ``log(stable rank)``, to first order as far as the floor.

    Moves the *stable rank* up. The gradient of ``log ||W||_F^2 - 2 log sigma_1``, times
    ``||W||_F^2 / 2``, is ``D = W - SR sigma_1 u_1 v_1^T``, orthogonal to ``W``: a small step keeps
    ``||W||_F`` and puts what it takes from ``sigma_1`` into the bulk. All given values above the
    cap of `spectral_cap_update` take part, so that two close ones do not take turns; the growth of
    the bulk makes up for all of them. A step ``eta D`` adds ``2 (SR - 1) eta`` to the logarithm.
    Taken whole, it goes past the cap: take a small fraction of it.

    Args:
        triplets: Leading ``k`` triplets, descending.
        frobenius_norm: ``||W||_F``, 0-d tensor.
        floor: Stable rank to reach, dimensionless, at least 1.
        keeps_norm: Whether the bulk takes up what the leading values lose. False where the norm is
            above its healthy value, or none is known: the energy of a spike must not inflate the
            bulk.

    Returns:
        The update; none for a weight whose stable rank is at the floor or above, and none where
        `spectral_cap_update` has none.
    """
    values = triplets.values
    tau = cap_of(values, frobenius_norm, floor)
    moves = _reachable(values, frobenius_norm, floor) & (values > tau)
    rank = (frobenius_norm / values[0]).square()
    # Just as much of W as makes the update orthogonal to W: exactly 1 if only sigma_1 moves.
    growth = torch.where(moves, (values / values[0]).square(), 0.0).sum()
    length = (floor / rank).log() / (2 * (rank - growth).clamp_min(RANK_ONE))
    coefficients = torch.where(moves, -length * rank * values, 0.0)
    shrink = torch.where(moves[0], length * growth, 0.0) if keeps_norm else None
    return SpectralUpdate(triplets.left, coefficients, triplets.right, values, shrink)


def lower_stable_rank_update(
    triplets: SingularTriplets, frobenius_norm: Tensor, ceiling: float
) -> SpectralUpdate:
    """Step down the gradient of ``log(stable rank)``, to first order as far as the ceiling.

    Moves the *stable rank* down and the *spectral norm* up; a small step keeps ``||W||_F``. The
    opposite of `log_stable_rank_update` for one direction, without a cap.

    Args:
        triplets: Leading triplets, descending; only the first is moved.
        frobenius_norm: ``||W||_F``, 0-d tensor.
        ceiling: Stable rank to reach, dimensionless, above 1.

    Returns:
        The update; none for a weight whose stable rank is at the ceiling or below.
    """
    values = triplets.values
    first = torch.arange(len(values), device=values.device) == 0
    rank = (frobenius_norm / values[0]).square()
    length = (rank / ceiling).log().clamp_min(0) / (2 * (rank - 1).clamp_min(RANK_ONE))
    coefficients = torch.where(first, length * rank * values, 0.0)
    return SpectralUpdate(triplets.left, coefficients, triplets.right, values, -length)


def condition_update(trailing: SingularTriplets, cap: Tensor, ceiling: float) -> SpectralUpdate:
    """Lift the smallest singular values to where the condition number is at its ceiling.

    Moves the *condition number* down and the *stable rank* up by next to nothing. Also revives a
    value of exactly 0, as its vectors are known.

    Args:
        trailing: Smallest ``k`` triplets, of the weight as it is.
        cap: Spectral norm of the weight, 0-d tensor.
        ceiling: Condition number to reach, dimensionless, above 1.

    Returns:
        The update that lifts them all the way.
    """
    lift = (cap / ceiling - trailing.values).clamp_min(0)
    return SpectralUpdate(trailing.left, lift, trailing.right, trailing.values)


def legacy_l2_update(triplets: SingularTriplets) -> SpectralUpdate:
    """Shrink the whole weight, as the L2 penalty of ASSR v1.5 does under plain SGD.

    Moves the *norms* down and *neither* stable rank *nor* condition number, both of which do not
    depend on the weight's scale. For comparison only.
    """
    nothing, shrink = torch.zeros_like(triplets.values), torch.full_like(triplets.values[0], -2.0)
    return SpectralUpdate(triplets.left, nothing, triplets.right, triplets.values, shrink)


def cap_of(values: Tensor, frobenius_norm: Tensor, floor: float) -> Tensor:
    """Spectral norm at which the stable rank is at its floor, when only larger values are capped.

    For each number ``j`` of capped values, ``tau_j^2 (floor - j) = sum_{i > j} sigma_i^2``. No
    ``tau_j`` is below the cap, and that of the right ``j`` is the cap itself: so the smallest is
    the cap if the given values include all above it, and too high, never too low, if not.

    Args:
        values: Leading ``k`` singular values, shape ``(k,)``, descending.
        frobenius_norm: ``||W||_F``, 0-d tensor.
        floor: Stable rank to reach, dimensionless.

    Returns:
        The cap, 0-d tensor; at least ``values[0]`` where the stable rank is at the floor or above.
    """
    count = torch.arange(1, len(values) + 1, device=values.device, dtype=values.dtype)
    caps = _tail(values, frobenius_norm) / (floor - count)
    return torch.where(count < floor, caps, torch.inf).amin().sqrt()


def _reachable(values: Tensor, frobenius_norm: Tensor, floor: float) -> Tensor:
    """Whether the given values leave room for a stable rank of `floor`.

    A weight of numerical rank ``r < floor`` has nothing beyond its first ``r`` values, so that its
    cap would be 0 and the whole weight be removed. False for one that is zero or not finite.
    """
    count = torch.arange(1, len(values) + 1, device=values.device, dtype=values.dtype)
    rest = torch.where(count < floor, _tail(values, frobenius_norm), torch.inf)
    return rest.amin() > RANK_ONE * frobenius_norm.square()


def _tail(values: Tensor, frobenius_norm: Tensor) -> Tensor:
    """``sum_{i > j} sigma_i^2`` for ``j = 1..k``."""
    return (frobenius_norm.square() - values.square().cumsum(0)).clamp_min(0)
