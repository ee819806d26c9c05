"""Bounding how far one optimizer step moves the weight of a low-rank layer."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from spectral_lightning.linalg import whole_tensor
from spectral_lightning.nn import LowRankLinear

# Norms come from the 64th power of a Gram matrix, that is from six squarings.
_NUM_SQUARINGS = 6


@torch.no_grad()
def copied_factors(layer: LowRankLinear) -> tuple[Tensor, Tensor]:
    """Copies of a layer's active factors as they are stored, for `bound_update_` after a step.

    Of a sharded factor (DTensor) each rank copies its own shard.
    """
    factors = ((layer.left_factor.detach(), 1), (layer.right_factor.detach(), 0))
    left, right = (
        (stored if isinstance(stored, DTensor) else stored.narrow(dim, 0, layer.rank)).clone()
        for stored, dim in factors
    )
    return left, right


@torch.no_grad()
def bound_update_(
    layer: LowRankLinear, before: tuple[Tensor, Tensor], max_update_norm: float
) -> Tensor:
    """Scale down what a step has done to the factors, so that ``||dW||_2 <= max_update_norm``.

    ``dW = dU V + U dV + dU dV``, with the gates in ``U``, is within the bound ``eta`` if
    ``||dU||_2`` and ``||dV||_2`` are at most ``rho = min(1, eta / (||U||_2 + ||V||_2 + 1))``, with
    norms before the step. A change above ``rho`` is scaled down to it as a whole; one within stays
    to the bit, and so do both where one is not finite. Moves ``||dW||_2`` down, and no reading in
    a direction of its own.

    Norms are upper bounds in float64, too high by at most the factor ``rank^(1 / 256)``, 2 % at
    rank 256: cost ``O((m + n) r^2 + r^3)``, and no wait for the device. What is scaled is rounded
    once, to the dtype it is stored in, which may add ``u (||U||_F ||V||_2 + ||U||_2 ||V||_F)`` to
    the bound, ``u`` = 0.004 for bfloat16, 0.0005 for float16, 6e-8 for float32; no entry goes
    further than the step had taken it. Sharded factors are gathered: all ranks have to call it.

    Args:
        layer: Layer after the step; its active factors are overwritten.
        before: Its factors before the step, as of `copied_factors`; the rank has not changed since.
        max_update_norm: Largest ``||dW||_2``, > 0, in the weight's own units.

    Returns:
        Scales of ``dU`` and ``dV``, in [0, 1], shape ``(2,)``, float64, on the factors' device.

    Raises:
        ValueError: If `before` is of another rank.

    References:
        Janson, Oyallon and Belilovsky (2026), "Stabilizing native low-rank LLM pretraining": their
        optimizer, Spectron, has this ``rho`` for the size of all its updates, not as a bound.
        https://arxiv.org/abs/2602.12429
    """
    r = layer.rank
    with (
        whole_tensor(layer.left_factor) as left,
        whole_tensor(layer.right_factor) as right,
        whole_tensor(before[0]) as old_left,
        whole_tensor(before[1]) as old_right,
    ):
        if old_left.shape[1] < r or old_right.shape[0] < r:
            raise ValueError(
                f"`before` must hold the {r} active components of the layer, got"
                f" {old_left.shape[1]} and {old_right.shape[0]}; copy them at the present rank."
            )
        pairs = [(left[:, :r], old_left[:, :r]), (right[:r], old_right[:r])]
        olds = [old.double() for _, old in pairs]
        changes = [new.double() - old for (new, _), old in zip(pairs, olds, strict=True)]
        gate = layer.gate[:r].to(olds[0])
        of_left = torch.stack([olds[0], changes[0]]) * gate
        of_right = torch.stack([olds[1], changes[1]]).mT
        (U, dU), (V, dV) = _norms(of_left), _norms(of_right)
        rho = (max_update_norm / (U + V + 1)).clamp_max(1)
        scales = (rho / torch.stack([dU, dV])).clamp_max(1)
        scales = torch.where(torch.isfinite(U + V + dU + dV), scales, 1.0)
        for (new, _), old, change, scale in zip(pairs, olds, changes, scales, strict=True):
            new.copy_(torch.where(scale < 1, (old + scale * change).to(new.dtype), new))
    return scales


def _norms(matrices: Tensor) -> Tensor:
    """Upper bounds of the spectral norms of ``(b, m, r)`` float64 matrices, shape ``(b,)``.

    ``||A||_2 <= ||G^p||_F^(1 / 2p)`` with ``G = A^T A`` and ``p = 64``. Never waits for a GPU, as
    `eigvalsh` would for its error code.
    """
    gram = matrices.mT @ matrices
    size = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True)
    # The largest eigenvalue is then at least r^(-1/2), whose powers do not underflow.
    power = gram / torch.where(size > 0, size, 1.0)
    for _ in range(_NUM_SQUARINGS):
        power = power @ power
    largest = torch.linalg.vector_norm(power, dim=(-2, -1)) ** (0.5**_NUM_SQUARINGS)
    return (size.flatten() * largest).sqrt()
