"""Writing an update into a weight: how much of it, how large at most, and in which precision."""

import torch
from torch import Tensor

from spectral_lightning.actuators.spectral import SpectralUpdate
from spectral_lightning.linalg import full_precision

_HALF = (torch.bfloat16, torch.float16)


def relative_size(update: SpectralUpdate, frobenius_norm: Tensor) -> Tensor:
    """``||update||_F / ||W||_F`` of the whole update, dimensionless, 0-d tensor."""
    a = torch.zeros_like(frobenius_norm) if update.shrink is None else update.shrink
    cross = 2 * a * (update.coefficients * update.values).sum()
    square = update.coefficients.square().sum() + cross + (a * frobenius_norm).square()
    return square.clamp_min(0).sqrt() / frobenius_norm


@torch.no_grad()
def add_(
    weight: Tensor,
    update: SpectralUpdate,
    frobenius_norm: Tensor,
    *,
    fraction: Tensor,
    max_relative_step: float,
    generator: torch.Generator,
) -> Tensor:
    """Add a fraction of an update to a weight in place, without waiting for the device.

    An update or a fraction that is not finite leaves the weight as it is. Half-precision weights
    take it by stochastic rounding: what is below half their spacing would otherwise be lost at
    every step, and with it the whole effect.

    Args:
        weight: Matrix ``W``, shape ``(m, n)``; overwritten. A view is fine.
        update: Update.
        frobenius_norm: ``||W||_F``, 0-d tensor.
        fraction: How much of the update to take, 0-d tensor, clipped to [0, 1].
        max_relative_step: Largest ``||step||_F / ||W||_F``.
        generator: Generator of the stochastic rounding, on the device of the weight.

    Returns:
        ``||step||_F / ||W||_F`` of the step taken, 0-d tensor.
    """
    size = relative_size(update, frobenius_norm)
    finite = torch.isfinite(size) & ~torch.isnan(fraction)
    allowed = max_relative_step / size.clamp_min(torch.finfo(size.dtype).tiny)
    taken = torch.where(finite, fraction.clamp(0, 1).minimum(allowed), 0.0)
    # Chosen, not multiplied: 0 times NaN is NaN.
    left = torch.where(finite, update.left * (update.coefficients * taken), 0.0)
    right = torch.where(finite, update.right, 0.0).mT
    keep = None if update.shrink is None else torch.where(finite, 1 + update.shrink * taken, 1.0)
    with full_precision(weight.device):
        if weight.dtype in _HALF:
            scaled = weight.float() if keep is None else weight.float() * keep
            exact = torch.addmm(scaled, left, right)
            weight.copy_(_rounded(exact, weight.dtype, generator))
        else:
            if keep is not None:
                weight.mul_(keep.to(weight.dtype))
            weight.addmm_(left.to(weight.dtype), right.to(weight.dtype))
    return torch.where(finite, taken * size, 0.0)


def _rounded(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round each entry up or down with the probability that keeps its mean."""
    nearest = exact.to(dtype)
    error = exact - nearest.float()
    # Neighbours of a floating-point number are those of its bits; away from zero is one more.
    away = (error > 0) == (nearest > 0)
    step = torch.where(away, 1, -1).to(torch.int16)
    neighbour = (nearest.view(torch.int16) + step).view(dtype).float()
    # Those of zero are the smallest numbers of either sign, in fp16 within an update's reach.
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    beside_zero = torch.full_like(error, smallest).copysign(error)
    neighbour = torch.where(nearest == 0, beside_zero, neighbour)
    gap = (neighbour - nearest.float()).abs()
    chance = torch.rand(exact.shape, generator=generator, device=exact.device, dtype=exact.dtype)
    moves = (error != 0) & torch.isfinite(neighbour) & (chance * gap < error.abs())
    return torch.where(moves, neighbour, nearest.float()).to(dtype)
