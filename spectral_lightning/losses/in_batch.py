"""The rest of the batch as negatives: groups of texts, those of all ranks, and who is no negative.

A group is an anchor, its positive and its hard negatives, in this order. Lives here: what the
losses of several heads share. Does not live here: the losses.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spectral_lightning.losses.cross_entropy import CrossEntropy
from spectral_lightning.losses.gathering import (
    Group,
    check_same_on_all_ranks,
    gather_rows,
    num_ranks,
    rank_in,
)


class Groups(NamedTuple):
    """Representations of one head.

    Attributes:
        own: Those of this rank, shape ``(B, k, d)``.
        all: Those of all ranks, shape ``(N, k, d)``.
    """

    own: Tensor
    all: Tensor

    @property
    def texts(self) -> Tensor:
        """All positives, then all hard negatives, shape ``(N * (k - 1), d)``."""
        return texts(self.all)


class Comparison(NamedTuple):
    """What the rows of this rank are compared with.

    Attributes:
        targets: Index of each row's group among those of all ranks, shape ``(B,)``, int64.
        false_texts: Texts that are no negatives of an anchor, shape ``(B, N * (k - 1))``; or None.
        false_anchors: Anchors that are no negatives of a positive, shape ``(B, N)``; or None.
    """

    targets: Tensor
    false_texts: Tensor | None = None
    false_anchors: Tensor | None = None


def texts(groups: Tensor) -> Tensor:
    """All positives, then all hard negatives, of groups or of their ids."""
    return torch.cat([groups[:, 1], groups[:, 2:].flatten(0, 1)])


def stack_groups(anchors: Tensor, positives: Tensor, negatives: Tensor | None = None) -> Tensor:
    """Groups of shape ``(B, k, d)``, at least float32.

    Args:
        anchors: Shape ``(B, d)``.
        positives: Shape ``(B, d)``.
        negatives: Hard negatives, shape ``(B, d)`` or ``(B, k - 2, d)``.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    if anchors.ndim != 2 or positives.shape != anchors.shape:
        raise ValueError(
            "`anchors` and `positives` must have one shape (B, d), got"
            f" {tuple(anchors.shape)} and {tuple(positives.shape)}."
        )
    parts = [anchors[:, None], positives[:, None]]
    if negatives is not None:
        rows = negatives[:, None] if negatives.ndim == 2 else negatives
        if rows.ndim != 3 or rows.shape[::2] != anchors.shape:
            B, d = anchors.shape
            raise ValueError(
                f"`negatives` must have shape {(B, d)} or ({B}, n, {d}) for anchors of shape"
                f" {(B, d)}, got {tuple(negatives.shape)}."
            )
        parts.append(rows)
    return at_least_float32(torch.cat(parts, 1))


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1, at least float32; rows of zeros stay."""
    return F.normalize(at_least_float32(x), dim=-1)


def compare(
    num_rows: int,
    num_texts: int,
    device: torch.device,
    text_ids: Tensor | None = None,
    group: Group = None,
) -> Comparison:
    """Targets and false negatives of this rank's rows, the same for all heads.

    A text is no negative of an anchor if it is the anchor's positive or the anchor itself, or the
    positive of the same anchor elsewhere; and likewise in the other direction.

    Args:
        num_rows: ``B``.
        num_texts: ``k``, texts of a group.
        device: Device of the representations.
        text_ids: Ids of the texts, equal for equal texts, shape ``(B, k)``; None masks nothing.
        group: Ranks that share the batch; None for all.

    Raises:
        ValueError: If ranks differ in a size, a row has nothing to be compared with, or the ids
            do not fit.
    """
    if text_ids is not None and text_ids.shape != (num_rows, num_texts):
        raise ValueError(
            f"`text_ids` must have shape {(num_rows, num_texts)}, one id per text, got"
            f" {tuple(text_ids.shape)}."
        )
    num_id_columns = 0 if text_ids is None else num_texts
    check_same_on_all_ranks(
        device, group, rows=num_rows, texts_per_row=num_texts, ids_per_row=num_id_columns
    )
    if num_rows * num_ranks(group) == 1 and num_texts == 2:
        raise ValueError(
            "A batch must have at least 2 rows over all ranks, or hard negatives, got 1 row and"
            " none: there is nothing to compare the positive with; raise the batch size, or drop"
            " an incomplete last batch."
        )
    targets = rank_in(group) * num_rows + torch.arange(num_rows, device=device)
    if text_ids is None:
        return Comparison(targets)

    everyone = gather_rows(text_ids.to(device), group)
    anchor, positive = text_ids.to(device)[:, :2, None].unbind(1)
    false_texts = (texts(everyone) == anchor) | (texts(everyone) == positive)
    false_texts[:, : len(everyone)] |= everyone[:, 0] == anchor
    false_anchors = (everyone[:, 0] == anchor) | (everyone[:, 0] == positive)
    false_anchors |= everyone[:, 1] == positive
    for is_false in (false_texts, false_anchors):
        is_false.scatter_(1, targets[:, None], value=False)
    return Comparison(targets, false_texts, false_anchors)


def contrast(
    groups: Groups,
    comparison: Comparison,
    *,
    temperature: float | Tensor,
    symmetric: bool = True,
    margin: float | None = None,
    loss: CrossEntropy | None = None,
) -> Tensor:
    """InfoNCE of one head; arguments as of `info_nce`.

    Args:
        groups: Representations.
        comparison: What they are compared with.
        temperature: What cosines are divided by.
        symmetric: Whether positives look for their anchors, too.
        margin: Texts whose cosine is above that of the target minus this do not count.
        loss: Cross-entropy to use.
    """
    options = temperature, margin, loss or CrossEntropy()
    with torch.autocast(groups.own.device.type, enabled=False):
        own, everyone = (unit_rows(part) for part in groups)
        targets, false_texts, false_anchors = comparison
        forward = _direction(own[:, 0], texts(everyone), targets, false_texts, *options)
        if not symmetric:
            return forward
        backward = _direction(own[:, 1], everyone[:, 0], targets, false_anchors, *options)
        return (forward + backward) / 2


def _direction(
    rows: Tensor,
    columns: Tensor,
    targets: Tensor,
    is_false: Tensor | None,
    temperature: float | Tensor,
    margin: float | None,
    loss: CrossEntropy,
) -> Tensor:
    cosines = rows @ columns.mT
    index = targets[:, None]
    if margin is not None:
        values = cosines.detach()
        is_close = values > values.gather(1, index) - margin
        is_false = is_close if is_false is None else is_false | is_close
        is_false.scatter_(1, index, value=False)
    logits = cosines / temperature
    if is_false is not None:  # after the division, whose gradient would be 0 * infinity
        logits = logits.masked_fill(is_false, -torch.inf)
    return loss(logits, targets)
