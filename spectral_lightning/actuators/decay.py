"""Decay of a product of factors, instead of the factors themselves."""

import torch

from spectral_lightning.actuators.resize import gathered_factors
from spectral_lightning.linalg import whole_tensor
from spectral_lightning.nn import LowRankLinear


@torch.no_grad()
def add_frobenius_decay_(layer: LowRankLinear, strength: float) -> None:
    """Add the gradient of ``strength / 2 ||U V||_F^2`` to a layer's gradients.

    ``strength U (V V^T)`` and ``strength (U^T U) V``, cost ``O((m + n) r^2)``. Decay of the factors
    themselves is a nuclear norm on the product, which makes its rank low whatever the task needs.
    Moves the Frobenius norm down, and large singular values faster than small ones, so that the
    stable rank does not fall.

    Args:
        layer: Layer; its gradients are overwritten. One without gradients is left alone.
        strength: Dimensionless, >= 0.

    References:
        Khodak et al. (2021), "Initialization and regularization of factorized neural layers",
        sec. 3.2. https://arxiv.org/abs/2105.01029
    """
    left, right = layer.left_factor.grad, layer.right_factor.grad
    if left is None or right is None:
        return
    r, (U, V) = layer.rank, gathered_factors(layer)
    with whole_tensor(left) as whole:
        found = U @ (V @ V.mT) * layer.gate[:r].to(U.dtype)
        whole[:, :r].add_(found.to(whole.dtype), alpha=strength)
    with whole_tensor(right) as whole:
        whole[:r].add_(((U.mT @ U) @ V).to(whole.dtype), alpha=strength)
