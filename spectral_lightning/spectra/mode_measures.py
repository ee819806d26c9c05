"""What is measured of a weight, its gradient and its update, to decide how the weight trains.

Pure functions of tensors; every number stays on the device until `on_host` brings all of them over
in one copy. *Intent* is what the gradient asks for, *effect* is what the optimizer really did: with
momentum, and all the more with Muon, the two differ.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_lightning.linalg import (
    PrincipalEnergy,
    Side,
    SingularTriplets,
    chance_share,
    energy_rank,
    full_precision,
    leading_singular_triplets,
    orthonormalize,
    principal_angles,
    principal_energy,
)

Measures = dict[str, Tensor]
"""Numbers by name, 0-d tensors in float64; NaN where something is undefined."""

CONCENTRATION_ENERGY = 0.95  # share of the energy in `concentration` (seed, metric 2)


class PrincipalWeight(NamedTuple):
    """A weight, its principal directions, and what the measures of any step need of both.

    Attributes:
        matrix: The weight ``W``, shape ``(m, n)``, in the dtype of `triplets`.
        triplets: Triplets, at least ``k``, descending.
        k: Principal directions: the leading ones.
        norm: ``||W||_F``, 0-d, float64.
        image: ``W V_k``, shape ``(m, k)``.
    """

    matrix: Tensor
    triplets: SingularTriplets
    k: int
    norm: Tensor
    image: Tensor


def principal_weight(weight: Tensor, triplets: SingularTriplets, k: int) -> PrincipalWeight:
    """What the measures of any step need of a weight ``(m, n)`` and its ``k`` leading triplets."""
    W = weight.to(triplets.values.dtype)
    with full_precision(W.device):
        image = W @ triplets.right[:, :k]
    norm = torch.linalg.vector_norm(weight, dtype=torch.float64)
    return PrincipalWeight(W, triplets, k, norm, image)


def spectrum_measures(
    triplets: SingularTriplets, frobenius_norm: Tensor, k: int, size: int
) -> Measures:
    """How much of a weight its ``k`` principal directions hold.

    Args:
        triplets: All triplets, or at least the ``k`` leading ones, descending.
        frobenius_norm: ``||W||_F``, 0-d.
        k: Principal directions.
        size: ``min(m, n)``.

    Returns:
        ``reconstruction_error``, ``||W - W_k||_F / ||W||_F`` in [0, 1]; and, if all triplets are
        given, ``concentration``: the fraction of all directions that hold 95 % of the energy.
    """
    values = triplets.values.double()
    total = frobenius_norm.double().square()
    if len(values) < size:
        tail = (total - values[:k].square().sum()).clamp_min(0)
        return {"reconstruction_error": (tail / total).sqrt()}
    tail = values[k:].square().sum()
    held = energy_rank(values, CONCENTRATION_ENERGY).double() / size
    return {"reconstruction_error": (tail / values.square().sum()).sqrt(), "concentration": held}


def gradient_triplets(
    gradient: Tensor,
    weight: Tensor,
    past: tuple[Tensor, Tensor] | None,
    k: int,
    *,
    decay: float,
    generator: torch.Generator,
) -> SingularTriplets:
    """The inputs that gradients read most, and what the weight makes of them.

    Right vectors and values are those of a running mean of ``G^T G / ||G||_F^2``, of which only the
    ``k`` leading directions are kept: one pass over the gradient stacked under what is kept.

    Args:
        gradient: Gradient ``G``, shape ``(m, n)``, not zero.
        weight: Weight, shape ``(m, n)``.
        past: Values, shape ``(k,)``, and right vectors, shape ``(n, k)``, of before; None at first.
        k: Directions.
        decay: Weight of the past, in [0, 1).
        generator: Generator of the first start, on the device of the gradient.

    Returns:
        Values, descending, whose squares are shares of the gradients' energy; right vectors; and an
        orthonormal basis of ``W V`` as left vectors.
    """
    G = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    G = G / torch.linalg.vector_norm(G)
    if past is None:
        start = torch.empty(k, G.shape[1], dtype=G.dtype, device=G.device)
        start.normal_(generator=generator)
        found, _ = leading_singular_triplets(G, start, num_passes=4)
    else:
        values, right = past
        kept = math.sqrt(decay) * (right * values).mT
        stacked = torch.cat([kept, math.sqrt(1 - decay) * G])
        found, _ = leading_singular_triplets(stacked, right.mT, num_passes=1)
    return input_triplets(weight, found.values, found.right)


def input_triplets(weight: Tensor, values: Tensor, right: Tensor) -> SingularTriplets:
    """Inputs with an orthonormal basis of what the weight makes of them as left vectors."""
    with full_precision(weight.device):
        return SingularTriplets(orthonormalize(weight.to(right.dtype) @ right), values, right)


def rotation_measures(previous: Tensor, current: Tensor, k: int) -> Measures:
    """How far the principal subspace has turned since an earlier analysis.

    Args:
        previous: Principal vectors of then, orthonormal, shape ``(m, j)``; the first ``k`` are
            compared.
        current: Principal vectors of now, orthonormal, at least ``k`` columns.
        k: Principal directions.

    Returns:
        ``subspace_angle``, the largest principal angle in radians, which close values around the
        ``k``-th make large; and ``subspace_overlap``, the mean squared cosine, which they do not.
    """
    angles = principal_angles(previous[:, :k], current[:, :k], are_orthonormal=True).double()
    return {"subspace_angle": angles[-1], "subspace_overlap": angles.cos().square().mean()}


def intent_measures(gradient: Tensor, principal: PrincipalWeight, side: Side) -> Measures:
    """What a gradient asks of the principal directions.

    Args:
        gradient: Gradient ``G`` of the loss by the weight, shape ``(m, n)``.
        principal: The weight ``W``, shape ``(m, n)``, with its principal directions.
        side: The part whose energy is compared with chance in ``intent_lift``.

    Returns:
        ``principal_alignment``, ``minor_alignment`` and ``outside_alignment``: ``||P G|| / ||G||``
        for the principal left directions, the others, and what is outside the column space of a
        tall weight, where the squares add up to 1; without all triplets the last two are one, as
        ``minor_alignment``. ``right_alignment``: the same for the principal right directions.
        ``left_lift``, ``right_lift`` and ``intent_lift``: energies over those of an unrelated
        gradient. ``intent_erosion``: see `ModeReading` of ``control``. ``gradient_norm``:
        ``||G||_F``.
    """
    triplets, k = principal.triplets, principal.k
    energy = principal_energy(gradient, triplets.left[:, :k], triplets.right[:, :k])
    left, right = energy.of("left").double(), energy.of("right").double()
    shape = (gradient.shape[0], gradient.shape[1])
    return {
        "principal_alignment": left.sqrt(),
        **_rest(gradient, triplets, left),
        "right_alignment": right.sqrt(),
        "left_lift": left / chance_share(shape, k, "left"),
        "right_lift": right / chance_share(shape, k, "right"),
        "intent_lift": energy.of(side).double() / chance_share(shape, k, side),
        "intent_erosion": -_erosion(gradient, energy, principal),
        "gradient_norm": energy.total.double().sqrt(),
    }


def effect_measures(update: Tensor, principal: PrincipalWeight, side: Side) -> Measures:
    """What an applied update did to the principal directions.

    Args:
        update: Weight after the optimizer's step minus weight before, shape ``(m, n)``.
        principal: The weight before, shape ``(m, n)``, with its principal directions.
        side: The part whose energy is compared with chance in ``effect_lift``.

    Returns:
        ``effect_lift`` and ``effect_erosion``, as of `intent_measures`; ``largest_erosion``: the
        largest relative loss of a principal singular value, to first order (negative if all grew);
        ``update_norm``: Frobenius norm of the update, weight's own units.
    """
    triplets, k = principal.triplets, principal.k
    energy = principal_energy(update, triplets.left[:, :k], triplets.right[:, :k])
    shape = (update.shape[0], update.shape[1])
    return {
        "effect_lift": energy.of(side).double() / chance_share(shape, k, side),
        "effect_erosion": _erosion(update, energy, principal),
        "largest_erosion": (-energy.changes / triplets.values[:k]).amax().double(),
        "update_norm": energy.total.double().sqrt(),
    }


def on_host(measures: Sequence[Mapping[str, Tensor]]) -> list[dict[str, float]]:
    """Bring the numbers of several layers to the host by one copy for each device."""
    vectors = [torch.stack([v.double() for v in found.values()]) for found in measures]
    return [
        dict(zip(found, numbers, strict=True))
        for found, numbers in zip(measures, vectors_on_host(vectors), strict=True)
    ]


def vectors_on_host(vectors: Sequence[Tensor]) -> list[list[float]]:
    """Bring vectors in float64 to the host by one copy for each device."""
    found: list[list[float]] = [[] for _ in vectors]
    for device in dict.fromkeys(vector.device for vector in vectors):
        there = [i for i, vector in enumerate(vectors) if vector.device == device]
        packed = torch.cat([vectors[i] for i in there]).tolist()
        for i in there:
            found[i], packed = packed[: len(vectors[i])], packed[len(vectors[i]) :]
    return found


def _rest(gradient: Tensor, triplets: SingularTriplets, principal: Tensor) -> Measures:
    """Where the gradient's energy is that is not in the principal left directions."""
    if len(triplets.values) < min(gradient.shape):
        return {"minor_alignment": (1 - principal).clamp_min(0).sqrt()}
    given = principal_energy(gradient, triplets.left, triplets.right).of("left").double()
    return {
        "minor_alignment": (given - principal).clamp_min(0).sqrt(),
        "outside_alignment": (1 - given).clamp_min(0).sqrt(),
    }


def _erosion(step: Tensor, energy: PrincipalEnergy, principal: PrincipalWeight) -> Tensor:
    """How strongly a step shrinks ``W_k = W V_k V_k^T`` beside the rest, in deviations of chance.

    The component along the whole weight is left out: shrinking all directions alike, as weight
    decay does, or scaling a layer that is normalised afterwards, erodes none.
    """
    W, image = principal.matrix, principal.image
    squared, own = (
        part.double().square() for part in (principal.norm, torch.linalg.vector_norm(image))
    )
    shared = torch.linalg.vecdot(energy.columns.flatten(), image.flatten()).double()
    along = torch.linalg.vecdot(step.to(W.dtype).flatten(), W.flatten()).double() / squared
    # Of W_k too, only what is orthogonal to W counts, so that chance has variance 1.
    size = (own - own.square() / squared).clamp_min(0).sqrt()
    norm = (energy.total.double() - along.square() * squared).clamp_min(0).sqrt()
    return (along * own - shared) * math.sqrt(step.numel()) / (size * norm)
