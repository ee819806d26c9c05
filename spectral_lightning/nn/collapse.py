"""Softmax collapse: how close logits are to where the ordinary cross-entropy rounds to nothing.

In a dtype with ``p`` bits of precision, ``1 + x`` is 1 for ``x < 2 ** -p``. A sample whose correct
class leads all others together by more than ``p log 2`` nats has loss 0 and a correct class without
gradient, whatever there is left to learn. Logits of StableMax are measured after `symlog`.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spectral_lightning.nn.functional import symlog

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
QUANTILES = (0.1, 0.5, 0.9)
"""Quantiles of the headroom."""

_CHUNK = 2**24  # logits in one piece, so that a vocabulary in float64 fits


class DtypeCollapse(NamedTuple):
    """What the ordinary cross-entropy makes of logits in one dtype; scalars, float32.

    Attributes:
        zero_loss: Fraction of the samples whose loss is 0.
        zero_gradient: Fraction whose correct class has gradient 0.
        absorbed: Fraction whose normaliser, in units of its largest term, is 1.
        headroom: `QUANTILES` of the lead of the correct class over all others together, in units
            of the lead ``p log 2`` at which this dtype collapses, shape ``(3,)``: collapsed from 1
            on, undecided at 0.
    """

    zero_loss: Tensor
    zero_gradient: Tensor
    absorbed: Tensor
    headroom: Tensor


class Collapse(NamedTuple):
    """Measures of `softmax_collapse`.

    Attributes:
        dtypes: Measures in each dtype, by names such as ``"float32"``.
        logit_scaling: Derivative of the mean loss with respect to a factor on all logits, at 1,
            nats: negative where larger logits alone reduce the loss.
    """

    dtypes: dict[str, DtypeCollapse]
    logit_scaling: Tensor


def softmax_collapse(
    logits: Tensor,
    targets: Tensor,
    dtypes: Sequence[torch.dtype] = DTYPES,
    transform: Literal["softmax", "stablemax"] = "softmax",
) -> Collapse:
    """Measure how much of a batch the ordinary cross-entropy rounds away in each dtype.

    That loss is computed here from logits rounded to the dtype; the loss that is trained need not
    be of this form. The host does not wait for the device.

    Args:
        logits: Shape ``(N, C)``, floating point.
        targets: Class ids, shape ``(N,)``; negative ones do not count.
        dtypes: Dtypes to compute the loss in.
        transform: What turns logits into probabilities.

    Returns:
        Fractions, quantiles and the derivative, on the device of the logits; NaN where no target
        counts.

    References:
        Prieto et al. (2025), "Grokking at the edge of numerical stability", section 3 (collapse).
        https://arxiv.org/abs/2501.04697

    Example:
        >>> logits, targets = torch.tensor([[20.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0])
        >>> measures = softmax_collapse(logits, targets).dtypes
        >>> measures["float32"].zero_loss, measures["float64"].zero_loss
        (tensor(0.5000), tensor(0.))
    """
    is_counted = targets >= 0
    ids = targets.clamp(min=0)
    size = max(1, _CHUNK // logits.shape[-1])
    pieces = [slice(start, start + size) for start in range(0, len(ids), size)]
    parts = [(logits.detach()[piece], ids[piece]) for piece in pieces]
    total = is_counted.sum()

    def mean(values: Tensor) -> Tensor:
        return torch.where(is_counted, values, 0).sum(-1) / total

    leads, slopes = torch.cat([_leads_and_slopes(*part, transform) for part in parts], -1)
    quantiles = _quantiles(torch.where(is_counted, leads, torch.inf), total)
    measures = {}
    for dtype in dtypes:
        flags = torch.cat([_flags(*part, dtype, transform) for part in parts], -1)
        bits = 1 - math.log2(torch.finfo(dtype).eps)
        headroom = quantiles / (bits * math.log(2))
        loss, gradient, absorbed = mean(flags).unbind()
        name = str(dtype).removeprefix("torch.")
        measures[name] = DtypeCollapse(loss, gradient, absorbed, headroom)
    return Collapse(measures, mean(slopes))


def _flags(logits: Tensor, ids: Tensor, dtype: torch.dtype, transform: str) -> Tensor:
    """Whether loss, gradient, and all terms but one vanish, shape ``(3, N)``, as float32."""
    bent = _bent(logits.to(dtype), transform)
    own = F.log_softmax(bent, -1).gather(1, ids[:, None]).squeeze(1)
    sums = (bent - bent.amax(1, keepdim=True)).exp().sum(1)
    return torch.stack((own == 0, own.exp() == 1, sums == 1)).float()


def _leads_and_slopes(logits: Tensor, ids: Tensor, transform: str) -> Tensor:
    """Lead of each target over the others, and slope of its loss as logits grow, ``(2, N)``."""
    logits = logits.float()
    index = ids[:, None]
    bent = _bent(logits, transform)
    others = bent.scatter(1, index, -torch.inf).logsumexp(1)
    leads = bent.gather(1, index).squeeze(1) - others
    pulls = logits / (1 + logits.abs()) if transform == "stablemax" else logits
    shares = torch.softmax(bent, -1)
    # Differences to the target first: what is left of a sure sample would cancel.
    slopes = torch.where(shares > 0, shares * (pulls - pulls.gather(1, index)), 0).sum(1)
    return torch.stack((leads, slopes))


def _bent(logits: Tensor, transform: str) -> Tensor:
    return symlog(logits) if transform == "stablemax" else logits


def _quantiles(values: Tensor, total: Tensor) -> Tensor:
    """`QUANTILES` of the lowest `total` values, each one of them."""
    ranks = torch.stack([(q * (total - 1)).round() for q in QUANTILES]).long()
    found = values.sort().values[ranks.clamp(min=0)]
    return torch.where(total > 0, found, torch.nan)
