"""Retrieval over the whole corpus of an evaluation, at every Matryoshka dimension."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn
from typing_extensions import override

from spectral_lightning.tasks.embedding_metrics import (
    RowMetric,
    check_dims,
    check_lengths,
    check_vectors,
)
from spectral_lightning.tasks.embedding_ranking import (
    NDCG_K,
    Places,
    average_precision,
    chance_places,
    compared_cosines,
    find_places,
    ndcg,
    neighbour_shares,
    recall_at,
    reciprocal_rank,
    unit_prefix,
)

MAX_ELEMENTS = 2**22
"""Scores held at a time: 16 MiB in float32, and a few masks."""


class RetrievalScores(NamedTuple):
    """Measures of a ranking, of each query or of all.

    Attributes:
        recall: Share of the relevant texts among the first k, for every k.
        ndcg: Discounted gain of the first 10 over the best possible.
        mrr: One over the rank of the first relevant text.
        map: Mean precision at the relevant texts.
    """

    recall: dict[int, Tensor]
    ndcg: Tensor
    mrr: Tensor
    map: Tensor

    def mean(self) -> "RetrievalScores":
        """Return the means over the queries."""
        recall = {k: values.mean() for k, values in self.recall.items()}
        return RetrievalScores(recall, self.ndcg.mean(), self.mrr.mean(), self.map.mean())

    def named(self) -> dict[str, Tensor]:
        """Return the measures by names such as ``recall@5``."""
        recall = {f"recall@{k}": values for k, values in self.recall.items()}
        return recall | {f"ndcg@{NDCG_K}": self.ndcg, "mrr": self.mrr, "map": self.map}


class NeighbourOverlap(NamedTuple):
    """How many nearest neighbours a prefix shares with the full vectors.

    Attributes:
        num_neighbours: Neighbours compared of each text.
        chance: Overlap of unrelated neighbours.
        by_dim: Mean overlap at every dimension, in [0, 1].
    """

    num_neighbours: int
    chance: float
    by_dim: dict[int, float]


class RetrievalResult(NamedTuple):
    """What `CorpusRetrieval` found.

    Attributes:
        num_queries: Distinct queries that have a relevant text other than themselves.
        corpus_size: Distinct texts that were ranked.
        by_dim: Mean over the queries, at every dimension.
        per_query: Numbers of each query, shape ``(num_queries,)``, at every dimension.
        chance: What a model gets that gives every text the same score.
        neighbour_overlap: None unless asked for.
    """

    num_queries: int
    corpus_size: int
    by_dim: dict[int, RetrievalScores]
    per_query: dict[int, RetrievalScores]
    chance: RetrievalScores
    neighbour_overlap: NeighbourOverlap | None


def neighbour_overlap(
    vectors: Tensor,
    dims: tuple[int, ...],
    num_neighbours: int = 10,
    max_elements: int = MAX_ELEMENTS,
) -> NeighbourOverlap:
    """Compare the nearest neighbours of each prefix with those of the largest dimension.

    Ties are broken at random, independently at each dimension, and the overlap is the mean over
    that: a collapsed model is at chance, not at 1. Costs ``N N d`` multiplications per dimension.

    Args:
        vectors: Shape ``(N, d)``, any float dtype, need not have unit length.
        dims: Dimensions of the prefixes; the largest is the full one.
        num_neighbours: Neighbours of each text, itself excluded; at most ``N - 1`` are used.
        max_elements: Largest number of scores held at a time.

    Returns:
        Overlaps, and their chance level ``num_neighbours / (N - 1)``.

    Raises:
        ValueError: If there are fewer than two vectors, or they are narrower than the largest
            dimension, or `num_neighbours` is not positive.
    """
    dims = check_dims(dims)
    if len(vectors) < 2 or vectors.shape[1] < dims[0] or num_neighbours < 1:
        raise ValueError(
            f"`vectors` must have shape (N >= 2, d >= {dims[0]}) and `num_neighbours` must be >= 1,"
            f" got {tuple(vectors.shape)} and {num_neighbours}."
        )
    num_rows = len(vectors)
    used = min(num_neighbours, num_rows - 1)
    prefixes = {dim: unit_prefix(vectors, dim) for dim in dims}
    shared = dict.fromkeys(dims, 0.0)
    chunk = max(1, max_elements // num_rows)
    for start in range(0, num_rows, chunk):
        shares = {}
        for dim, prefix in prefixes.items():
            scores = compared_cosines(prefix[start : start + chunk], prefix)
            scores.diagonal(start).fill_(-torch.inf)
            shares[dim] = neighbour_shares(scores, used)
            shared[dim] += (shares[dim] * shares[dims[0]]).sum(dtype=torch.float32).item()
    by_dim = {dim: total / (num_rows * used) for dim, total in shared.items()}
    return NeighbourOverlap(used, used / (num_rows - 1), by_dim)


class CorpusRetrieval(RowMetric):
    """Rank all distinct positive texts for every query, at every Matryoshka dimension of a head.

    The corpus is every positive text of the evaluation, on all ranks, once; a query's relevant
    texts are all that it occurs with, and the query's own text is no candidate. Scores are cosines
    in float32, compared in steps of 1e-6, and each measure is its mean over the orders of tied
    texts, so a collapsed model is at chance. Recall at a k of at least the number of candidates is
    1, and so is its chance. Vectors that are not finite make all measures NaN, with a warning.

    Vectors are kept in float32, 4 bytes times the largest dimension for each row and side; the
    ranking holds a few arrays of `max_elements` scores.

    Args:
        dims: Dimensions of the prefixes.
        ks: Depths of Recall@k.
        num_neighbours: Neighbours compared by `neighbour_overlap`; 0 for none, since it costs the
            square of the corpus.
        max_elements: Largest number of scores held at a time.
        kwargs: Options of `torchmetrics.Metric`.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> metric = CorpusRetrieval((2,), ks=(1,))
        >>> vectors, ids = torch.eye(2), torch.tensor([1, 2])
        >>> metric.update(vectors, vectors, ids, ids + 10)
        >>> result = metric.compute()
        >>> result.by_dim[2].recall[1].item(), result.chance.recall[1].item()
        (1.0, 0.5)
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        ks: tuple[int, ...] = (1, 5, 10),
        num_neighbours: int = 0,
        max_elements: int = MAX_ELEMENTS,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not ks or min(ks) < 1 or num_neighbours < 0 or max_elements < 1:
            raise ValueError(
                "`ks` and `max_elements` must be >= 1 and `num_neighbours` >= 0, got"
                f" {tuple(ks)}, {max_elements} and {num_neighbours}."
            )
        self.dims = check_dims(dims)
        self.ks = tuple(sorted(set(ks)))
        self.num_neighbours = num_neighbours
        self.max_elements = max_elements
        for name in ("anchors", "positives"):
            self.add_rows(name, self.dims[0])
        for name in ("anchor_ids", "positive_ids"):
            self.add_rows(name, dtype=torch.int64)

    @override
    def update(
        self,
        anchors: Tensor,
        positives: Tensor,
        anchor_ids: Tensor,
        positive_ids: Tensor,
        valid: Tensor | None = None,
    ) -> None:
        """Add a batch of queries, each with one of its relevant texts.

        Args:
            anchors: Vectors of the queries, shape ``(B, d)``, any float dtype.
            positives: Vectors of the relevant texts, shape ``(B, d)``.
            anchor_ids: Equal for equal query texts, shape ``(B,)``, int64.
            positive_ids: Equal for equal texts, in one numbering with `anchor_ids`.
            valid: Rows that count, shape ``(B,)``, bool; None for all.

        Raises:
            ValueError: If shapes do not fit.
        """
        check_vectors(anchors, positives, self.dims[0])
        check_lengths(len(anchors), anchor_ids=anchor_ids, positive_ids=positive_ids, valid=valid)
        self.append(
            valid,
            anchors=anchors[:, : self.dims[0]],
            positives=positives[:, : self.dims[0]],
            anchor_ids=anchor_ids,
            positive_ids=positive_ids,
        )

    @override
    def compute(self) -> RetrievalResult:
        """Return the measures over all queries since the last reset.

        Raises:
            ValueError: If no query has a relevant text besides itself.
        """
        queries, corpus, pairs, own = self._ranking_task()
        num_candidates = len(corpus) - (own >= 0).long()
        finite = bool(queries.isfinite().all()) and bool(corpus.isfinite().all())
        if not finite:
            rank_zero_warn("The retrieval measures are NaN: some vectors are not finite.")
        chance = self._scores(chance_places(pairs, num_candidates))
        per_query = {}
        for dim in self.dims:
            if not finite:
                per_query[dim] = self._undefined(len(queries))
                continue
            prefixes = unit_prefix(queries, dim), unit_prefix(corpus, dim)
            per_query[dim] = self._scores(find_places(*prefixes, pairs, own, self.max_elements))
        overlap = None
        if self.num_neighbours and finite and len(corpus) > 1:
            overlap = neighbour_overlap(corpus, self.dims, self.num_neighbours, self.max_elements)
        by_dim = {dim: scores.mean() for dim, scores in per_query.items()}
        return RetrievalResult(len(queries), len(corpus), by_dim, per_query, chance.mean(), overlap)

    def _ranking_task(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return distinct queries and texts, sorted pairs of their rows, and own rows or -1."""
        text_ids, text = torch.unique(self.rows("positive_ids"), return_inverse=True)
        query_ids, query = torch.unique(self.rows("anchor_ids"), return_inverse=True)
        own = torch.searchsorted(text_ids, query_ids).clamp(max=len(text_ids) - 1)
        own = torch.where(text_ids[own] == query_ids, own, -1)
        pairs = torch.unique(torch.stack([query, text], dim=1), dim=0)
        pairs = pairs[pairs[:, 1] != own[pairs[:, 0]]]
        if not len(pairs):
            raise ValueError(
                "`CorpusRetrieval` needs a query with a relevant text other than itself, got"
                f" {len(query_ids)} queries that are their only relevant text."
            )
        kept, pairs[:, 0] = torch.unique(pairs[:, 0], return_inverse=True)
        queries = self.rows("anchors")[_first_rows(query)[kept]]
        return queries, self.rows("positives")[_first_rows(text)], pairs, own[kept]

    def _scores(self, places: Places) -> RetrievalScores:
        def result(values: Tensor) -> Tensor:
            return values.to(self.device, torch.float32)

        return RetrievalScores(
            {k: result(recall_at(places, k)) for k in self.ks},
            result(ndcg(places)),
            result(reciprocal_rank(places)),
            result(average_precision(places)),
        )

    def _undefined(self, num_queries: int) -> RetrievalScores:
        nan = torch.full((num_queries,), torch.nan, device=self.device)
        return RetrievalScores(dict.fromkeys(self.ks, nan), nan, nan, nan)


def _first_rows(groups: Tensor) -> Tensor:
    """Return the first row of every group, given the group ``0 <= g < G`` of each row."""
    rows = torch.arange(len(groups), device=groups.device)
    first = torch.full((int(groups.max()) + 1,), len(groups), device=groups.device)
    return first.scatter_reduce_(0, groups, rows, "amin")
