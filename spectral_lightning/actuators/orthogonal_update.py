"""Orthogonal optimizer steps: what a step adds to a weight is made orthogonal to it.

Lives here: projected updates, and what weight decay does to them. The projection itself is in
`orthogonal`.
"""

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from spectral_lightning.actuators.orthogonal import MAX_GAIN, Granularity, project_

Project = Literal["grad", "update", "both"]

# Add weight decay to the gradient, unless a group says otherwise as AdamW's do.
_COUPLED = (SGD, ASGD, Adam, NAdam, RAdam, Adamax, Adagrad, Adadelta, RMSprop)


@torch.no_grad()
def project_update_(
    weights: Sequence[Tensor],
    before: Sequence[Tensor],
    granularity: Granularity | Sequence[Granularity] = "tensor",
    *,
    rescale: bool = True,
    max_gain: float = MAX_GAIN,
) -> Tensor:
    """Make what a step has added to weights orthogonal to what they were, in place.

    That of Adam is not, though every gradient be orthogonal: its averages are of gradients that
    were so to other weights, and are divided entry by entry. Weight decay is taken out as well.
    The update is taken in float32 at least, and the new weight rounded once, to its own dtype.

    Args:
        weights: Weights after the step; overwritten.
        before: Copies of them before it.
        granularity: What is one vector, as in `project_`.
        rescale: Whether the update keeps its norm.
        max_gain: Largest factor of that, at least 1.

    Returns:
        ``cos(update, w)`` of each whole tensor before the projection, as `project_` does.

    Example:
        >>> weight = torch.tensor([[3.0, 1.0]])
        >>> project_update_([weight], [torch.tensor([[2.0, 0.0]])], rescale=False)
        tensor([0.7071], dtype=torch.float64)
        >>> weight
        tensor([[2., 1.]])
    """
    olds = [old.to(torch.promote_types(old.dtype, torch.float32)) for old in before]
    pairs = zip(weights, olds, strict=True)
    changes = [weight.detach().to(old.dtype) - old for weight, old in pairs]
    cosines = project_(changes, before, granularity, rescale=rescale, max_gain=max_gain)
    for weight, old, change in zip(weights, olds, changes, strict=True):
        weight.copy_(old + change)
    return cosines


def decay_conflict(
    optimizer: Optimizer, parameters: Collection[Tensor], project: Project
) -> str | None:
    """Why weight decay and the projection undo each other, as a sentence; None if they do not.

    Decoupled decay is no conflict with projected gradients: it takes back what steps along them
    add to the norms of weights.

    Args:
        optimizer: Optimizer of these parameters, among others.
        parameters: Parameters that are projected.
        project: What is projected of them.
    """
    chosen = {id(parameter) for parameter in parameters}
    groups = [
        group
        for group in optimizer.param_groups
        if group.get("weight_decay") and any(id(p) in chosen for p in group["params"])
    ]
    name = type(optimizer).__name__
    if groups and project != "grad":
        return (
            f"The weight decay of {name} has no effect where updates are projected, as it points"
            ' along the weights; set `weight_decay=0`, or `project="grad"`.'
        )
    coupled = isinstance(optimizer, _COUPLED)
    if coupled and any(not group.get("decoupled_weight_decay") for group in groups):
        return (
            f"The weight decay of {name} is added to gradients after their projection, so that they"
            " point along the weights again; use a decoupled one, as that of AdamW, or"
            " `weight_decay=0`."
        )
    return None
