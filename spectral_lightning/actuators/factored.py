"""Optimizer state of a `FactoredLinear` when its weight moves between base and factors.

Lives here: the running means that base and factors carry. Does not live here: the weights (`nn`).
"""

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from spectral_lightning.actuators.protection import FIRST_MOMENTS
from spectral_lightning.nn import FactoredLinear


@torch.no_grad()
def carry_moments(optimizer: Optimizer, layer: FactoredLinear, gradient: Tensor) -> None:
    """Go on averaging the gradient of the base's weight, which the optimizer does not step.

    So a return to full mode finds the momentum, and Adam's second moment, of a layer that was
    never away. Nothing is done before the optimizer's first step.

    Args:
        optimizer: Optimizer that knows the base.
        layer: Layer in low-rank mode.
        gradient: Gradient of the whole weight, shape ``(m, n)``.
    """
    state = optimizer.state.get(layer.weight, {})
    group = next(g for g in optimizer.param_groups if any(p is layer.weight for p in g["params"]))
    if "exp_avg" in state:
        first, second = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        state["step"] += 1
    elif state.get("momentum_buffer") is not None:
        momentum = group.get("momentum_now", group["momentum"])
        if isinstance(optimizer, SGD):
            state["momentum_buffer"].mul_(momentum).add_(gradient, alpha=1 - group["dampening"])
        else:
            state["momentum_buffer"].lerp_(gradient, 1 - momentum)


@torch.no_grad()
def share_moments(optimizer: Optimizer, layer: FactoredLinear) -> None:
    """Give the factors the running means that belong to the base's, by the chain rule.

    ``M_B = M_W A^T`` and ``M_A = B^T M_W``; second moments as if the entries of the gradient were
    independent, ``v_B = v_W (A^2)^T`` and ``v_A = (B^2)^T v_W``. With factors of zero, as after
    `FactoredLinear.merge_`, theirs become zero.

    Args:
        optimizer: Optimizer that knows base and factors.
        layer: Layer whose factors are what they will be at the next step.
    """
    B, A = layer.left_factor, layer.right_factor
    base = optimizer.state.get(layer.weight, {})
    for factor in (B, A):
        own = optimizer.state.get(factor, {})
        for name in (*FIRST_MOMENTS, "exp_avg_sq"):
            moment, mine = base.get(name), own.get(name)
            if moment is None or mine is None:
                continue
            left, right = (B.square(), A.square()) if name == "exp_avg_sq" else (B, A)
            mine.copy_(moment @ right.mT if factor is B else left.mT @ moment)
