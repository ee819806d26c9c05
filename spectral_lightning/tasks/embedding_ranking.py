"""Measures of ranked retrieval in expectation over ties, and where the relevant texts stand.

Equal scores say nothing of the order, so every measure is its mean over all orders of the tied
texts. A collapsed model, which gives all texts one score, then gets exactly the chance level.

References:
    McSherry and Najork (2008), "Computing Information Retrieval Performance Measures Efficiently
    in the Presence of Tied Scores", ECIR. https://doi.org/10.1007/978-3-540-78646-7_38
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NDCG_K = 10
"""Depth of the discounted gain."""

SCORE_STEPS = 1e6
"""Cosines are compared in steps of 1e-6, about what a product in float32 carries."""


class Places(NamedTuple):
    """Where each relevant text stands among the candidates of its query; ``P`` pairs.

    Attributes:
        query: Row of the query, shape ``(P,)``, int64, ascending.
        before: Candidates with a higher score, shape ``(P,)``.
        tied: Candidates with the same score, itself included, shape ``(P,)``.
        relevant_before: Relevant texts among those before, shape ``(P,)``.
        relevant_tied: Relevant texts among those tied, shape ``(P,)``.
    """

    query: Tensor
    before: Tensor
    tied: Tensor
    relevant_before: Tensor
    relevant_tied: Tensor

    def average(self, values: Tensor) -> Tensor:
        """Return the mean of a number per pair over the pairs of each query, shape ``(Q,)``."""
        return self._sum(values) / self.num_relevant

    def _sum(self, values: Tensor) -> Tensor:
        total = values.new_zeros(int(self.query[-1]) + 1)
        return total.index_add_(0, self.query, values)

    @property
    def num_relevant(self) -> Tensor:
        """Relevant texts of each query, shape ``(Q,)``, int64."""
        return self._sum(torch.ones_like(self.query))


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Multiply in float32 inside, whatever autocast and the matmul precision are set to."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def unit_prefix(vectors: Tensor, dim: int) -> Tensor:
    """Return the first `dim` entries of every row, normalised again, in float32."""
    return F.normalize(vectors[:, :dim].float(), dim=-1)


def compared_cosines(queries: Tensor, corpus: Tensor) -> Tensor:
    """Return cosines of unit rows in whole steps of 1e-6, shape ``(Q, N)``, float32."""
    with full_float32(queries.device):
        return (queries @ corpus.T).mul_(SCORE_STEPS).round_()


def find_places(
    queries: Tensor,
    corpus: Tensor,
    pairs: Tensor,
    own: Tensor,
    max_elements: int,
) -> Places:
    """Compare every query with the whole corpus and find where its relevant texts stand.

    Costs ``Q N d`` multiplications and, at a time, a few arrays of `max_elements` numbers.

    Args:
        queries: Unit rows, shape ``(Q, d)``.
        corpus: Unit rows, shape ``(N, d)``.
        pairs: Row of the query and row of a relevant text, shape ``(P, 2)``, sorted.
        own: Row of the corpus that is the query itself, shape ``(Q,)``, -1 for none; no candidate.
        max_elements: Largest number of scores held at a time.

    Returns:
        Places, on the CPU.
    """
    chunk = max(1, max_elements // len(corpus))
    parts = []
    for start in range(0, len(queries), chunk):
        scores = compared_cosines(queries[start : start + chunk], corpus)
        mine = own[start : start + chunk]
        has_own = (mine >= 0).nonzero().squeeze(1)
        scores[has_own, mine[has_own]] = -torch.inf
        here = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + chunk)]
        for first in range(0, len(here), chunk):
            part = here[first : first + chunk]
            row = part[:, 0] - start
            level = scores[row, part[:, 1]]
            ranked = scores[row]
            before = (ranked > level[:, None]).sum(1)
            tied = (ranked == level[:, None]).sum(1)
            parts.append((level, before, tied))
    level, before, tied = (torch.cat(columns).cpu() for columns in zip(*parts, strict=True))
    query = pairs[:, 0].cpu()
    return Places(query, before, tied, *_among_relevant(query, level))


def _among_relevant(query: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many relevant texts of the same query score higher, and how many the same."""
    order = level.argsort(descending=True, stable=True)
    order = order[query[order].argsort(stable=True)]
    query, level = query[order], level[order]
    starts = torch.ones(len(level), dtype=torch.bool)
    starts[1:] = (query[1:] != query[:-1]) | (level[1:] != level[:-1])
    tie = starts.cumsum(0) - 1
    start_of_query = torch.searchsorted(query, query)
    before, tied = torch.empty_like(query), torch.empty_like(query)
    before[order] = starts.nonzero().squeeze(1)[tie] - start_of_query
    tied[order] = torch.bincount(tie)[tie]
    return before, tied


def chance_places(pairs: Tensor, num_candidates: Tensor) -> Places:
    """Return the places of a model that gives every text the same score.

    Args:
        pairs: As for `find_places`.
        num_candidates: Candidates of every query, shape ``(Q,)``, int64.

    Returns:
        Places, on the CPU; measures of these are the chance levels.
    """
    query = pairs[:, 0].cpu()
    zeros = torch.zeros_like(query)
    num_relevant = torch.bincount(query)
    return Places(query, zeros, num_candidates.cpu()[query], zeros, num_relevant[query])


def recall_at(places: Places, k: int) -> Tensor:
    """Return the share of a query's relevant texts among the first `k`, shape ``(Q,)``, float64.

    With `k` at least the number of candidates it is 1. Chance is ``k`` over that number.
    """
    inside = torch.minimum((k - places.before).clamp(min=0), places.tied)
    return places.average(inside.double() / places.tied)


def ndcg(places: Places) -> Tensor:
    """Return the discounted gain of the first 10 over the best possible, shape ``(Q,)``, float64.

    References:
        Jarvelin and Kekalainen (2002), "Cumulated gain-based evaluation of IR techniques".
        https://doi.org/10.1145/582415.582418
    """
    discounts = 1 / torch.log2(torch.arange(2, NDCG_K + 2, dtype=torch.float64))
    gains = F.pad(discounts.cumsum(0), (1, 0))
    first, last = places.before.clamp(max=NDCG_K), (places.before + places.tied).clamp(max=NDCG_K)
    gain = (gains[last] - gains[first]) / places.tied
    ideal = gains[places.num_relevant.clamp(max=NDCG_K)]
    return places.average(gain) * places.num_relevant / ideal


def _harmonic(places: Places) -> tuple[Tensor, Tensor]:
    """Return the harmonic numbers up to each pair's tied texts, and to the end of them."""
    last = places.before + places.tied
    terms = 1 / torch.arange(1, int(last.max()) + 1, dtype=torch.float64)
    numbers = F.pad(terms.cumsum(0), (1, 0))
    return numbers[places.before], numbers[last]


def average_precision(places: Places) -> Tensor:
    """Return the mean, over a query's relevant texts, of the precision at each.

    Returns:
        Shape ``(Q,)``, float64, in (0, 1].
    """
    low, high = _harmonic(places)
    slots = high - low  # sum of 1/rank over the ranks of the tied texts
    others = (places.relevant_tied - 1) / (places.tied - 1).clamp(min=1)
    earlier = places.tied - (places.before + 1) * slots
    return places.average(((places.relevant_before + 1) * slots + others * earlier) / places.tied)


def reciprocal_rank(places: Places) -> Tensor:
    """Return one over the rank of a query's first relevant text, shape ``(Q,)``, float64."""
    low, high = _harmonic(places)
    value = (high - low) / places.tied  # the only relevant text of its tie
    several = (places.relevant_tied > 1) & (places.relevant_before == 0)
    ties = torch.stack([places.before, places.tied, places.relevant_tied], dim=1)[several]
    kinds, kind = torch.unique(ties, dim=0, return_inverse=True)
    if len(kinds):
        value[several] = torch.stack([_first_of_several(*row) for row in kinds.tolist()])[kind]
    first = torch.where(places.relevant_before == 0, value / places.relevant_tied, 0)
    return places.average(first) * places.num_relevant


def _first_of_several(before: int, tied: int, relevant: int) -> Tensor:
    """Return the mean of one over the rank of the first of several relevant texts in a tie."""
    slot = torch.arange(1, tied - relevant + 2, dtype=torch.float64)
    # P(slot j is the first) = C(tied - j, relevant - 1) / C(tied, relevant)
    log_ways = (tied - slot + 1).lgamma() - (tied - slot - relevant + 2).lgamma()
    probability = torch.softmax(log_ways, dim=0)
    return (probability / (before + slot)).sum()


def neighbour_shares(scores: Tensor, num_neighbours: int) -> Tensor:
    """Return the chance of each text to be among the nearest, ties in random order.

    Args:
        scores: Shape ``(Q, N)``; -inf for texts that are no candidates.
        num_neighbours: Number of nearest texts, at most the number of candidates.

    Returns:
        Shape ``(Q, N)``, in [0, 1], rows sum to `num_neighbours`.
    """
    level = scores.topk(num_neighbours, dim=1).values[:, -1:]
    higher, same = scores > level, scores == level
    left = num_neighbours - higher.sum(1, keepdim=True)
    return torch.where(same, left / same.sum(1, keepdim=True), higher.float())
