"""Further terms for embedding models, of which each is a scalar to be made small.

Between heads: `bridge_loss`, `alignment_loss`, `alignment_divergence`. Between texts:
`triplet_loss`, `cosent_loss`. Of a batch: `renyi_entropy`, `softmax_entropy`, which are to be made
large. All compute in float32, also under autocast (float64 stays float64).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from spectral_lightning.losses.cross_entropy import cross_entropy
from spectral_lightning.losses.gathering import Group, check_same_on_all_ranks, gather_rows
from spectral_lightning.losses.in_batch import Groups, at_least_float32, unit_rows
from spectral_lightning.losses.matryoshka import prefix

BridgeForm = Literal["cosine", "original"]
"""``cosine``: one minus the cosine, semantic side fixed. ``original``: mean square, both learn."""
AlignmentForm = Literal["mse", "kl"]
"""``mse``: mean square of cosines. ``kl``: divergence of the rankings of the batch."""
SpectralForm = Literal["renyi", "softmax"]
"""``renyi``: entropy of the batch's spectrum. ``softmax``: mean entropy of single rows."""


def bridge_loss(
    entity: Tensor,
    semantic: Tensor,
    *,
    dims: tuple[int, ...] = (96,),
    form: BridgeForm = "cosine",
) -> Tensor:
    """Distance of the entity head from the same prefix of the semantic head.

    There is no label of entities in it: the head learns to say in few numbers what the semantic
    head says.

    Args:
        entity: Shape ``(..., D)``.
        semantic: Shape ``(..., E)``.
        dims: Sizes of the prefixes, of which the mean is taken; 96 from Spectra-NSA.
        form: ``cosine``, one minus the cosine, from which the semantic head does not learn, or
            ``original``, the mean square over rows and numbers, from which both learn.

    Returns:
        Loss, a scalar, dimensionless.

    References:
        Cangi (2025), Spectra-NSA. https://github.com/Daniele-Cangi/Spectra-NSA
    """
    losses = []
    for dim in dims:
        one, other = prefix(entity, dim), prefix(semantic, dim)
        if form == "cosine":
            losses.append(1 - (one * other.detach()).sum(-1).mean())
        else:
            losses.append((one - other).square().mean())
    return torch.stack(losses).mean()


def alignment_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean square between two heads' cosines; the teacher is fixed.

    Cosines of an anchor with its positive and with its hard negatives count for half each.

    Args:
        student: Groups of anchor, positive and hard negatives, shape ``(B, k, d)``.
        teacher: The same of another head, shape ``(B, k, D)``.

    Returns:
        Loss, a scalar, dimensionless.

    References:
        Cangi (2025), Spectra-NSA. https://github.com/Daniele-Cangi/Spectra-NSA
    """
    squares = (_group_cosines(student) - _group_cosines(teacher).detach()).square()
    parts = [squares[:, :1].mean()]
    if squares.shape[1] > 1:
        parts.append(squares[:, 1:].mean())
    return torch.stack(parts).mean()


def alignment_divergence(
    student: Groups, teacher: Groups, *, temperature: float | Tensor
) -> Tensor:
    """Nats that a head's ranking of the batch lacks of another's, which is fixed.

    Kullback-Leibler divergence of the softmax over the cosines of an anchor with all texts of the
    batch, divided by a temperature.

    Args:
        student: Representations of one head.
        teacher: Those of another.
        temperature: What cosines are divided by, above 0; fixed here, also if it is learned.

    Returns:
        Loss, a scalar, nats: the mean over this rank's rows.

    References:
        Hinton, Vinyals and Dean (2015), "Distilling the knowledge in a neural network", section 2.
        https://arxiv.org/abs/1503.02531
    """
    if isinstance(temperature, Tensor):
        temperature = temperature.detach()
    with torch.autocast(student.own.device.type, enabled=False):
        logs = [
            (unit_rows(head.own[:, 0]) @ unit_rows(head.texts).mT / temperature).log_softmax(1)
            for head in (student, teacher)
        ]
        return F.kl_div(logs[0], logs[1].detach(), reduction="batchmean", log_target=True)


def triplet_loss(groups: Tensor, margin: float = 0.3) -> Tensor:
    """How far hard negatives are from being farther away than the positive by a margin.

    Args:
        groups: Groups of anchor, positive and hard negatives, shape ``(B, k, d)`` with ``k > 2``.
        margin: Wanted difference of the distances between unit rows; 0.3 from Spectra-NSA.

    Returns:
        Loss, a scalar, dimensionless: the mean over all hard negatives.

    References:
        Schroff, Kalenichenko and Philbin (2015), "FaceNet", section 3.1, there with
        squared distances. https://arxiv.org/abs/1503.03832
    """
    anchors, positives, negatives = unit_rows(groups).tensor_split([1, 2], 1)
    return F.triplet_margin_loss(anchors, positives, negatives, margin=margin)


def renyi_entropy(rows: Tensor) -> Tensor:
    r"""Entropy of the spectrum of a batch: the logarithm of how many directions it fills evenly.

    With ``rho = Z^T Z / N`` of unit rows, whose trace is 1, it is ``-log tr(rho^2)``, the Renyi
    entropy of order 2 of the eigenvalues, from a product instead of a decomposition.

    Args:
        rows: Shape ``(N, d)``, any length.

    Returns:
        Entropy, a scalar, nats, in ``[0, log(min(N, d))]``.

    References:
        Giraldo, Rao and Principe (2015), "Measures of entropy from data using infinitely divisible
        kernels". https://arxiv.org/abs/1211.2459

    Example:
        >>> renyi_entropy(torch.eye(4)).exp()  # four directions
        tensor(4.)
    """
    with torch.autocast(rows.device.type, enabled=False):
        unit = unit_rows(rows)
        num_rows, dim = unit.shape
        products = unit @ unit.mT if num_rows <= dim else unit.mT @ unit
        return -(products / num_rows).square().sum().log()


def softmax_entropy(rows: Tensor) -> Tensor:
    """Mean entropy of the softmax of each row, the spectral term of the original.

    It is near its maximum whatever the text if the rows come out of a layer norm.

    Args:
        rows: Shape ``(N, d)``.

    Returns:
        Entropy, a scalar, nats, in ``[0, log(d)]``.

    References:
        Cangi (2025), Spectra-NSA. https://github.com/Daniele-Cangi/Spectra-NSA
    """
    logs = at_least_float32(rows).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def cosent_loss(
    first: Tensor, second: Tensor, scores: Tensor, scale: float = 20.0, group: Group = None
) -> Tensor:
    r"""How badly the cosines of scored pairs are ordered, over the batch of all ranks.

    ``log(1 + sum exp(scale * (cos_i - cos_j)))`` over all ``i, j`` where pair ``j`` has the higher
    score. Only the order of the scores matters. The same on all ranks; DDP's mean of the gradients
    is that of one process with the whole batch. Costs a matrix of all pairs of pairs.

    Args:
        first: One side of each pair, shape ``(B, d)``.
        second: The other, shape ``(B, d)``.
        scores: How alike they are, shape ``(B,)``, any unit.
        scale: What cosines are multiplied by, above 0; 20 from the reference.
        group: Ranks that share the batch; None for all.

    Returns:
        Loss, a scalar, nats; 0 if all scores are equal.

    Raises:
        ValueError: If the shapes do not fit together, `scale` is not above 0, or ranks have
            batches of different sizes.

    References:
        Su (2022), "CoSENT". https://kexue.fm/archives/8847

    Example:
        >>> rows = torch.eye(2)
        >>> cosent_loss(rows, rows[[0, 0]], torch.tensor([0.0, 1.0]))  # cosines 1 and 0
        tensor(20.)
    """
    if first.ndim != 2 or second.shape != first.shape or scores.shape != first.shape[:1]:
        raise ValueError(
            "`first` and `second` must have one shape (B, d), and `scores` (B,), got"
            f" {tuple(first.shape)}, {tuple(second.shape)} and {tuple(scores.shape)}."
        )
    if not 0 < scale < float("inf"):
        raise ValueError(f"`scale` must be finite and > 0, got {scale}.")
    check_same_on_all_ranks(first.device, group, rows=len(first))
    cosines = gather_rows((unit_rows(first) * unit_rows(second)).sum(-1), group)
    scores = gather_rows(scores, group)
    differences = scale * (cosines[:, None] - cosines)
    logits = differences.masked_fill(scores[:, None] >= scores, -torch.inf).flatten()
    # The 1 is a class of its own, whose surprise this is.
    return cross_entropy(F.pad(logits, (1, 0))[None], scores.new_zeros(1, dtype=torch.int64))


def _group_cosines(groups: Tensor) -> Tensor:
    """Cosines of each anchor with the rest of its group, shape ``(B, k - 1)``."""
    unit = unit_rows(groups)
    return (unit[:, :1] * unit[:, 1:]).sum(-1)
