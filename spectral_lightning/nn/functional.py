"""Functions without parameters: StableMax, a softmax whose tails fall polynomially."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from typing_extensions import override

Transform = Literal["softmax", "stablemax"]
"""What turns logits into probabilities."""


def symlog(x: Tensor) -> Tensor:
    r"""Symmetric logarithm ``sign(x) log(1 + |x|)``, the map that turns softmax into StableMax.

    Its derivative is ``1 / (1 + |x|)`` everywhere, also at 0 and at 1 and -1, where the formulas
    with ``sign`` or ``where`` give 0 or NaN. Infinities stay, with derivative 0. Differentiable
    twice.

    Args:
        x: Any shape, floating point.

    Returns:
        Shape and dtype of `x`.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
        >>> symlog(x).exp()
        tensor([0.5000, 1.0000, 2.0000], grad_fn=<ExpBackward0>)
        >>> symlog(x).sum().backward()
        >>> x.grad
        tensor([0.5000, 1.0000, 0.5000])
    """
    return _SymLog.apply(x)  # type: ignore[no-untyped-call]


def stablemax(x: Tensor, dim: int = -1) -> Tensor:
    r"""Probabilities proportional to ``1 + x`` for positive and ``1 / (1 - x)`` for negative ``x``.

    Equal to the softmax of `symlog`, which is how it is computed, in float32 for half precision.
    It keeps the order of the logits, and falls off as ``1 / |x|`` where softmax falls off
    exponentially. Logits of minus infinity, as of a masked vocabulary, get probability and
    gradient 0.

    Args:
        x: Logits, floating point.
        dim: Dimension along which the probabilities add up to 1.

    Returns:
        Shape and dtype of `x`.

    References:
        Prieto et al. (2025), "Grokking at the edge of numerical stability", section 4.1.
        https://arxiv.org/abs/2501.04697

    Example:
        >>> stablemax(torch.tensor([1.0, 0.0, -1.0]))  # 2 : 1 : 1/2
        tensor([0.5714, 0.2857, 0.1429])
    """
    return torch.softmax(symlog(_widened(x)), dim).to(x.dtype)


def log_stablemax(x: Tensor, dim: int = -1) -> Tensor:
    r"""Logarithm of `stablemax`, exact also where the probability is tiny.

    Args:
        x: Logits, floating point; computed in float32 for half precision.
        dim: Dimension along which the probabilities add up to 1.

    Returns:
        Shape and dtype of `x`, nats.

    References:
        Prieto et al. (2025), "Grokking at the edge of numerical stability", section 4.1.
        https://arxiv.org/abs/2501.04697

    Example:
        >>> log_stablemax(torch.tensor([1.0, 0.0, -1.0])).exp()
        tensor([0.5714, 0.2857, 0.1429])
    """
    return torch.log_softmax(symlog(_widened(x)), dim).to(x.dtype)


def _widened(x: Tensor) -> Tensor:
    # A vocabulary of 1e5 zero logits sums to more than float16 can hold.
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _SymLog(torch.autograd.Function):
    generate_vmap_rule = True

    @override
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        # Autocast runs log1p in float32.
        return torch.copysign(torch.log1p(x.abs()), x).to(x.dtype)

    @override
    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @override
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (1 + x.abs())
