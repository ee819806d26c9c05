"""Averaged copies of a low-rank layer: they change their form with it, or averages go wrong.

A factor means nothing without the other: the same weight ``U V`` is ``(U T) (T^-1 V)`` too. So an
average of factors is one of weights only if all were written in one form. Lives here: how copies
follow the layer, right before it changes. Does not live here: averaging, and where the copies are.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from spectral_lightning.actuators.regauge import regauge_
from spectral_lightning.actuators.resize import grow_
from spectral_lightning.linalg import Regauge
from spectral_lightning.nn import LowRankLinear


@torch.no_grad()
def regauge_averages_(
    averages: Iterable[LowRankLinear], layer: LowRankLinear, found: Regauge
) -> None:
    """Write averaged copies as `regauge_` is about to write their layer.

    With the layer's ``U T`` and ``P^T V`` they become the averages of what its factors would have
    been in the new form, since both are linear. Their weights ``U V`` become ``U T P^T V``: as they
    were if the layer keeps all components, and else less what falls to those that it drops.

    Args:
        averages: Copies of the layer; overwritten.
        layer: The layer before the change.
        found: New components, for the `regauge_` that follows.

    Raises:
        ValueError: If a copy has missed a change.
    """
    for average in averages:
        follow_gates_([average], layer)
        device = average.left_factor.device
        regauge_(average, None, Regauge(*(part.to(device) for part in found)))


@torch.no_grad()
def grow_averages_(averages: Iterable[LowRankLinear], layer: LowRankLinear, rows: Tensor) -> None:
    """Add to averaged copies what `grow_` is about to add to their layer; weights stay.

    Args:
        averages: Copies of the layer; overwritten.
        layer: The layer before the change.
        rows: Rows of ``V``, for the `grow_` that follows.

    Raises:
        ValueError: If a copy has missed a change, or the rows do not fit into the capacity.
    """
    for average in averages:
        follow_gates_([average], layer)
        grow_(average, None, rows.to(average.right_factor.device))


@torch.no_grad()
def follow_gates_(averages: Iterable[LowRankLinear], layer: LowRankLinear) -> None:
    """Give averaged copies the gates and the rank of their layer, whatever was made of them.

    Gates are a schedule and no weights: what fades in the layer fades in its copies, and is gone
    from both at once. An average of whole numbers is rounded down, also of equal ones: of 22 and 22
    with a decay of 0.9999 to 21 (`torch.optim.swa_utils.get_ema_avg_fn`, PyTorch 2.13).

    Args:
        averages: Copies of the layer; overwritten.
        layer: The layer.

    Raises:
        ValueError: If a copy has missed a change.
    """
    for average in averages:
        if average.rank != layer.rank:
            raise ValueError(
                f"`averages` must have the rank of their layer, {layer.rank}, got {average.rank};"
                " have them follow each of its changes."
            )
        average.active_rank.fill_(layer.rank)
        average.gate.copy_(layer.gate)
