"""The kernel of the cross-entropies: loss and gradient of every row of a matrix of logits.

The target's own term is kept out of the sum over classes (leave one out). With ``g`` the logits,
or their `symlog`::

    gap = logsumexp_{k != y} g_k - g_y        loss = log(1 + exp(gap))
    d loss / d g_y = -sigmoid(gap)            d loss / d g_k = probability of k

so nothing is ever added to 1 before a logarithm, and a confident row keeps its loss and the
gradient of its correct class down to the smallest float.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spectral_lightning.losses.targets import Target
from spectral_lightning.nn import symlog
from spectral_lightning.nn.functional import Transform


class Rows(NamedTuple):
    """What the gradient needs, as the forward pass left it.

    Attributes:
        exps: Exponentials of all classes but the main one, which is 0, shape ``(N, C)``.
        factor: Factor of each row of them, shape ``(N,)``.
        main: Gradient of the main class, shape ``(N,)``.
        rest: That of the target.
        bent: The logits, if a transform bends them; None for softmax.
    """

    exps: Tensor
    factor: Tensor
    main: Tensor
    rest: Tensor | None
    bent: Tensor | None


def row_losses(
    logits: Tensor, target: Target, transform: Transform, z_loss: float, dtype: torch.dtype
) -> tuple[Tensor, Rows]:
    """Cross-entropy of every row, without recording a graph.

    Args:
        logits: Shape ``(N, C)``; left as they are.
        target: Target distribution.
        transform: What turns logits into probabilities.
        z_loss: Coefficient of the squared normaliser ``logsumexp(g)``.
        dtype: Dtype to compute in, float32 or float64.

    Returns:
        Losses, shape ``(N,)``, nats, in `dtype`; and what `row_gradients` takes.
    """
    main, weight, rest = target
    index = main[:, None]
    exps = symlog(logits.to(dtype)) if transform == "stablemax" else logits.to(dtype, copy=True)
    if rest is not None:
        # Surprises are differences, here to the largest logit, so that an offset costs no digits.
        offset = exps.amax(1)
        expected = _expectation(rest, exps.sub_(offset[:, None]))
    own = exps.gather(1, index).squeeze(1)
    exps.scatter_(1, index, -torch.inf)
    # Not minus infinity, so that a row whose other classes are all masked gives zeros.
    top = exps.amax(1).clamp(min=torch.finfo(dtype).min)
    total = exps.sub_(top[:, None]).exp_().sum(1)
    gap = total.log() + (top - own)
    nats = torch.logaddexp(gap, torch.zeros_like(gap))
    # sigmoid(gap), which torch.sigmoid flushes to 0 long before it underflows.
    others = torch.exp(-torch.logaddexp(-gap, torch.zeros_like(gap)))

    losses, main_gradient = weight * nats, -weight * others
    share = torch.zeros_like(nats)
    normaliser = torch.logaddexp(own, top + total.log())
    if rest is not None:
        share = rest.sum(-1)
        losses = losses + share * normaliser - expected
        main_gradient = main_gradient - rest.expand_as(exps).gather(1, index).squeeze(1)
        normaliser = normaliser + offset
    if z_loss > 0:
        losses = losses + z_loss * normaliser.square()
        share = share + 2 * z_loss * normaliser
    main_gradient = main_gradient + share * torch.exp(-nats)
    # The largest exponential is 1, unless there is no other class.
    factor = (weight + share) * others / total.clamp(min=1)
    bent = logits if transform == "stablemax" else None
    return losses, Rows(exps, factor, main_gradient, rest, bent)


def row_gradients(main: Tensor, rows: Rows, scale: Tensor) -> Tensor:
    """Gradient of the weighted sum of row losses.

    Args:
        main: The main class of each row, shape ``(N,)``.
        rows: Result of `row_losses`.
        scale: Weight of each row, shape ``(N,)``.

    Returns:
        Gradient for the logits, shape ``(N, C)``, in the dtype of the computation.
    """
    # A row that does not count may be infinite.
    factor, main_gradient = (
        torch.where(scale == 0, 0, scale * values)[:, None] for values in (rows.factor, rows.main)
    )
    gradient = rows.exps * factor
    if rows.rest is not None:
        gradient.addcmul_(rows.rest, scale[:, None], value=-1)
    gradient.scatter_(1, main[:, None], main_gradient)
    if rows.bent is not None:
        gradient.div_(rows.bent.to(gradient.dtype).abs().add_(1))
    return gradient


def _expectation(rest: Tensor, values: Tensor) -> Tensor:
    """Sum of ``rest * values`` in each row; what has no share may be infinite."""
    if rest.ndim == 1:
        return values @ rest
    return values.masked_fill(rest == 0, 0).mul_(rest).sum(1)
