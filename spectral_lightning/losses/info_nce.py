"""InfoNCE over the batch of all ranks, with hard negatives and without false ones."""

import math

import torch
from torch import Tensor

from spectral_lightning.losses.cross_entropy import CrossEntropy
from spectral_lightning.losses.gathering import Group, gather_rows
from spectral_lightning.losses.in_batch import Groups, compare, contrast, stack_groups


def info_nce(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor,
    anchor_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    symmetric: bool = True,
    margin: float | None = None,
    loss: CrossEntropy | None = None,
    group: Group = None,
) -> Tensor:
    r"""Surprise at each anchor's positive among the texts of the whole batch.

    Cross-entropy of cosines divided by a temperature. An anchor is compared with the positives and
    hard negatives of all ranks; with `symmetric`, half of the loss compares each positive with the
    anchors of all ranks. Texts that are no negatives do not count, as their ids tell: the row's
    own anchor or positive, and the other half of a pair that shares one of them. Computed in
    float32, also under autocast (float64 stays float64). DDP's mean of the gradients is that of
    one process with the whole batch. Differentiable once.

    Args:
        anchors: Shape ``(B, d)``, any length; ``B`` is the same on all ranks.
        positives: Shape ``(B, d)``.
        negatives: Hard negatives, shape ``(B, d)`` or ``(B, n, d)``.
        temperature: What cosines are divided by, above 0; a tensor may be learned.
        anchor_ids: Ids of the texts, equal for equal texts, shape ``(B,)``, int64.
        positive_ids: Those of the positives, shape ``(B,)``; given if `anchor_ids` are.
        negative_ids: Those of the negatives, shape ``(B,)`` or ``(B, n)``; given if both are.
        symmetric: Whether positives look for their anchors, too.
        margin: Texts whose cosine is above that of the target minus this do not count, either;
            None lets them count.
        loss: Cross-entropy to use, e.g. ``CrossEntropy(transform="stablemax")``; None for softmax.
        group: Ranks that share the batch; None for all.

    Returns:
        Loss, a scalar, nats, at least float32: the mean over this rank's rows.

    Raises:
        ValueError: If shapes do not fit together, ids are given in part, ranks have batches of
            different sizes, a single row has nothing to be compared with, or an option is outside
            its range.

    References:
        Van den Oord, Li and Vinyals (2018), "Representation learning with contrastive predictive
        coding", equation 4. https://arxiv.org/abs/1807.03748
        Moreira et al. (2024), "NV-Retriever" (its TopK-MarginPos).
            https://arxiv.org/abs/2407.15831

    Example:
        >>> rows = torch.eye(2)
        >>> info_nce(rows, rows, temperature=1.0).exp()  # (e + 1) / e
        tensor(1.3679)
    """
    check_temperature(temperature)
    check_contrast(margin, loss)
    groups = stack_groups(anchors, positives, negatives)
    text_ids = _stack_ids(anchor_ids, positive_ids, negative_ids, negatives)
    comparison = compare(len(groups), groups.shape[1], groups.device, text_ids, group)
    return contrast(
        Groups(groups, gather_rows(groups, group)),
        comparison,
        temperature=temperature,
        symmetric=symmetric,
        margin=margin,
        loss=loss,
    )


def check_temperature(temperature: float | Tensor) -> None:
    """Refuse temperatures that are not above 0; the value of a tensor is not looked at.

    Raises:
        ValueError: If it is a number that is not, or a tensor of more than one.
    """
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(
                f"`temperature` must be one number, got shape {tuple(temperature.shape)}."
            )
    elif not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be finite and > 0, got {temperature}.")


def check_contrast(margin: float | None, loss: CrossEntropy | None) -> None:
    """Refuse options that InfoNCE cannot work with.

    Raises:
        ValueError: If the margin is not finite, or the loss gives a share to masked texts.
    """
    if margin is not None and not math.isfinite(margin):
        raise ValueError(f"`margin` must be finite, got {margin}.")
    if loss is not None and loss.label_smoothing > 0:
        raise ValueError(
            "`label_smoothing` must be 0 in a contrastive loss, where masked texts cannot get a"
            f" share, got {loss.label_smoothing}."
        )


def _stack_ids(
    anchors: Tensor | None,
    positives: Tensor | None,
    negatives: Tensor | None,
    negative_rows: Tensor | None,
) -> Tensor | None:
    """Ids as one tensor of shape ``(B, k)``; None without ids."""
    parts = [anchors, positives, *([] if negative_rows is None else [negatives])]
    given = [part.view(len(part), -1) for part in parts if part is not None]
    if len(given) not in (0, len(parts)) or (negative_rows is None and negatives is not None):
        raise ValueError(
            "Ids must be given for all texts or for none, got ids for"
            f" {[part is not None for part in (anchors, positives, negatives)]} of anchors,"
            f" positives and {'no ' if negative_rows is None else ''}negatives."
        )
    return torch.cat(given, 1) if given else None
