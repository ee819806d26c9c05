"""Metrics of sentence embeddings on scored pairs and of anomaly scores; retrieval is next door."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_roc,
)
from torchmetrics.utilities import dim_zero_cat, rank_zero_warn
from typing_extensions import override

from spectral_lightning.tasks.embedding_statistics import average_ranks, pearson, spearman


class RowMetric(Metric):
    """A metric that keeps its rows, and joins those of all ranks whatever their number.

    torchmetrics gives a rank without rows an empty float vector, which cannot be joined with rows
    of another type or shape; here it gets an empty state of the right one.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._row_types: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def add_rows(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        """Add a state of rows of a shape and type, empty at first."""
        self.add_state(name, [], dist_reduce_fx="cat")
        self._row_types[name] = (shape, dtype)

    def append(self, valid: Tensor | None, **rows: Tensor) -> None:
        """Append the valid rows to the states of these names."""
        for name, values in rows.items():
            kept = values.detach().to(self._row_types[name][1])
            getattr(self, name).append(kept if valid is None else kept[valid.bool()])

    def rows(self, name: str) -> Tensor:
        """Return all rows of a state.

        Raises:
            ValueError: If there are none.
        """
        state = getattr(self, name)
        if len(state) == 0 or not (joined := dim_zero_cat(state)).shape[0]:
            raise ValueError(
                f"`{type(self).__name__}` must see at least one row before `compute`, got none;"
                " call `update` first."
            )
        return joined

    @override
    def sync(self, *args: Any, **kwargs: Any) -> None:
        for name, (shape, dtype) in self._row_types.items():
            if isinstance(getattr(self, name), list) and not getattr(self, name):
                empty = torch.empty((0, *shape), dtype=dtype, device=self.device)
                setattr(self, name, [empty])
        super().sync(*args, **kwargs)


def check_dims(dims: tuple[int, ...]) -> tuple[int, ...]:
    """Return the dimensions, largest first.

    Raises:
        ValueError: If there are none, or they are not positive and distinct.
    """
    if not dims or min(dims) < 1 or len(set(dims)) < len(dims):
        raise ValueError(f"`dims` must be positive and distinct, got {tuple(dims)}.")
    return tuple(sorted(dims, reverse=True))


def check_vectors(first: Tensor, second: Tensor, dim: int) -> None:
    """Check that two batches of vectors fit together and are wide enough.

    Raises:
        ValueError: If they are not of one shape ``(B, d)`` with ``d >= dim``.
    """
    if first.ndim != 2 or first.shape != second.shape or first.shape[1] < dim:
        raise ValueError(
            f"Both batches of vectors must have one shape (B, d) with d >= {dim}, the largest of"
            f" `dims`, got {tuple(first.shape)} and {tuple(second.shape)}."
        )


def check_lengths(num_rows: int, **columns: Tensor | None) -> None:
    """Check that every column given has one number per row.

    Raises:
        ValueError: If one has not; it is named.
    """
    for name, column in columns.items():
        if column is not None and column.shape != (num_rows,):
            raise ValueError(f"`{name}` must have shape ({num_rows},), got {tuple(column.shape)}.")


class Correlation(NamedTuple):
    """How well similarities follow the gold scores, at one dimension.

    Attributes:
        spearman: Rank correlation in [-1, 1], a scalar; NaN if undefined.
        pearson: Linear correlation in [-1, 1], a scalar; NaN if undefined.
        similarities: Cosine of every pair, shape ``(n,)``.
    """

    spearman: Tensor
    pearson: Tensor
    similarities: Tensor


class CorrelationResult(NamedTuple):
    """What `SimilarityCorrelation` found.

    Attributes:
        num_pairs: Number of pairs.
        scores: Gold scores, shape ``(n,)``.
        by_dim: Correlation at every dimension.
    """

    num_pairs: int
    scores: Tensor
    by_dim: dict[int, Correlation]


class SimilarityCorrelation(RowMetric):
    """Correlation of cosine similarity with gold scores, at every Matryoshka dimension of a head.

    A prefix of both vectors is taken and normalised again, so that vectors need not have unit
    length. Cosines and scores of all ranks are joined; correlations are computed in float64.
    Constant or non-finite similarities have no correlation: it is NaN, with a warning, never 0.

    Args:
        dims: Dimensions of the prefixes.
        kwargs: Options of `torchmetrics.Metric`.

    Raises:
        ValueError: If `dims` are not positive and distinct.

    Example:
        >>> metric = SimilarityCorrelation((2,))
        >>> first = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
        >>> second = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        >>> metric.update(first, second, torch.tensor([5.0, 4.0, 0.0]))
        >>> metric.compute().by_dim[2].spearman
        tensor(1.)
    """

    def __init__(self, dims: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dims = check_dims(dims)
        self.add_rows("similarities", len(self.dims))
        self.add_rows("scores")

    @override
    def update(
        self, first: Tensor, second: Tensor, scores: Tensor, valid: Tensor | None = None
    ) -> None:
        """Add a batch of pairs.

        Args:
            first: Vectors of the first texts, shape ``(B, d)``, any float dtype.
            second: Vectors of the second texts, shape ``(B, d)``.
            scores: Gold similarity, shape ``(B,)``, on any scale.
            valid: Rows that count, shape ``(B,)``, bool; None for all.

        Raises:
            ValueError: If shapes do not fit.
        """
        check_vectors(first, second, self.dims[0])
        check_lengths(len(first), scores=scores, valid=valid)
        first, second = first.float(), second.float()
        columns = [F.cosine_similarity(first[:, :dim], second[:, :dim]) for dim in self.dims]
        self.append(valid, similarities=torch.stack(columns, dim=1), scores=scores)

    @override
    def compute(self) -> CorrelationResult:
        """Return the correlations over all pairs since the last reset."""
        scores, similarities = self.rows("scores"), self.rows("similarities")
        by_dim = {}
        for dim, column in zip(self.dims, similarities.T, strict=True):
            rank, linear = spearman(column, scores).to(scores), pearson(column, scores).to(scores)
            by_dim[dim] = Correlation(rank, linear, column)
        undefined = [dim for dim in self.dims if by_dim[dim].spearman.isnan()]
        if undefined:
            rank_zero_warn(
                f"The correlation at dimensions {undefined} is NaN: similarities or gold scores of"
                f" the {len(scores)} pairs are constant or not finite."
            )
        return CorrelationResult(len(scores), scores, by_dim)


class AnomalyResult(NamedTuple):
    """What `AnomalyDetection` found.

    Attributes:
        auroc: Probability that an anomaly looks more anomalous than a normal text; chance is 0.5.
        average_precision: Area under precision and recall; chance is the share of anomalies.
        fpr_at_95: Share of normal texts flagged by the strictest threshold that finds 95 % of the
            anomalies; chance is 0.95, less is better.
        higher_is_anomalous: The declared direction; it is never chosen after seeing the result.
        num_anomalous: Number of anomalies.
        num_normal: Number of normal texts.
    """

    auroc: Tensor
    average_precision: Tensor
    fpr_at_95: Tensor
    higher_is_anomalous: bool
    num_anomalous: int
    num_normal: int


class AnomalyDetection(RowMetric):
    """How well a score tells anomalies from normal texts, in a direction declared beforehand.

    Only the order of the scores counts. A score that works the wrong way round has an AUROC below
    0.5. NaN, with a warning, when there are only anomalies, only normal texts, or a score that is
    not finite.

    Args:
        higher_is_anomalous: Whether a high score means an anomaly.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = AnomalyDetection()
        >>> metric.update(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([False, False, True]))
        >>> metric.compute().auroc
        tensor(1.)
    """

    def __init__(self, higher_is_anomalous: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.higher_is_anomalous = higher_is_anomalous
        self.add_rows("scores")
        self.add_rows("anomalous", dtype=torch.bool)

    @override
    def update(self, scores: Tensor, anomalous: Tensor, valid: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            scores: Shape ``(B,)``, any range.
            anomalous: Whether each text is an anomaly, shape ``(B,)``, bool.
            valid: Rows that count, shape ``(B,)``, bool; None for all.

        Raises:
            ValueError: If shapes do not fit.
        """
        check_lengths(scores.numel(), scores=scores, anomalous=anomalous, valid=valid)
        self.append(valid, scores=scores, anomalous=anomalous)

    @override
    def compute(self) -> AnomalyResult:
        """Return the measures over all texts since the last reset."""
        scores, anomalous = self.rows("scores"), self.rows("anomalous").cpu()
        num_anomalous = int(anomalous.sum())
        counts = (self.higher_is_anomalous, num_anomalous, len(anomalous) - num_anomalous)
        if min(counts[1:]) == 0 or not bool(scores.isfinite().all()):
            rank_zero_warn(
                "The anomaly measures are NaN: they need finite scores of anomalies and of normal"
                f" texts, got {counts[1]} and {counts[2]} texts."
            )
            undefined = scores.new_full((), torch.nan)
            return AnomalyResult(undefined, undefined, undefined, *counts)
        # torchmetrics sends scores outside [0, 1] through a sigmoid, which makes large ones equal.
        ranks = average_ranks(scores if self.higher_is_anomalous else -scores) / len(scores)
        labels = anomalous.long()
        flagged, found, _ = binary_roc(ranks, labels)
        strictest = flagged[found >= 0.95].min()
        auroc, precision = binary_auroc(ranks, labels), binary_average_precision(ranks, labels)
        return AnomalyResult(auroc.to(scores), precision.to(scores), strictest.to(scores), *counts)
