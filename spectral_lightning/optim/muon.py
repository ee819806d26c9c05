"""One Muon step of a list of matrices, without an optimizer around it."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spectral_lightning.linalg.polar import newton_schulz

# Elements of one batched Newton-Schulz call: 64 MiB in float32. Larger batches only cost memory.
MAX_STACK_ELEMENTS = 2**24


def muon_(
    params: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    ns_steps: int,
    ns_dtype: torch.dtype | None,
    transposed: bool = False,
) -> None:
    """Move matrices along the polar factor of their averaged gradient, in place.

    With gradient ``G`` and buffer ``B``, in this order: ``B <- lerp(B, G, 1 - momentum)``;
    ``O = newton_schulz(lerp(G, B, momentum))``, Nesterov's look-ahead; ``W <- (1 - lr *
    weight_decay) W - lr * sqrt(max(1, m / n)) O``. Matrices of one shape share batched products,
    which takes half the time or less up to 128 x 128 on two CPU cores and saves launches on a GPU.

    Args:
        params: Matrices with a gradient, shape ``(m, n)`` each. Overwritten.
        buffers: Averaged gradients, shaped like `params`; zeros before the first step.
            Overwritten.
        lr: Learning rate, about the spectral norm of the step of a square matrix.
        momentum: Weight of the past in the averaged gradient, in ``[0, 1)``.
        weight_decay: Decoupled weight decay per unit of learning rate.
        ns_steps: Newton-Schulz iterations.
        ns_dtype: Compute dtype of Newton-Schulz; None means bfloat16 on CUDA (but not for
            float64) and the weight's own precision elsewhere, at least float32.
        transposed: Whether they are stored as ``(in, out)``, so that ``m`` and ``n`` change places.

    References:
        Jordan et al. (2024), "Muon: an optimizer for hidden layers in neural networks",
        https://kellerjordan.github.io/posts/muon/ and https://github.com/KellerJordan/Muon.
    """
    averages = []
    for param, buffer in zip(params, buffers, strict=True):
        assert param.grad is not None
        buffer.lerp_(param.grad, 1 - momentum)
        averages.append(param.grad.lerp(buffer, momentum))
    for stack in _stacks(params):
        first = params[stack[0]]
        polars = newton_schulz(
            torch.stack([averages[i] for i in stack]),
            num_steps=ns_steps,
            dtype=ns_dtype or _fast_dtype(first),
        )
        m, n = first.shape[::-1] if transposed else first.shape
        rate = lr * math.sqrt(max(1.0, m / n))
        for i, polar in zip(stack, polars, strict=True):
            params[i].mul_(1 - lr * weight_decay)
            params[i].add_(polar, alpha=-rate)


def _stacks(params: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of matrices of one shape, dtype and device, for one batched product each."""
    alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
    for i, param in enumerate(params):
        alike.setdefault((param.shape, param.dtype, param.device), []).append(i)
    for (shape, _, _), members in alike.items():
        size = max(1, MAX_STACK_ELEMENTS // shape.numel())
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _fast_dtype(param: Tensor) -> torch.dtype | None:
    """Bfloat16 where it is fast; None leaves the choice to the kernel."""
    return torch.bfloat16 if param.is_cuda and param.dtype != torch.float64 else None
