"""What quanta of rank are worth, and how a budget of parameters is spent on them.

Lives here: the arithmetic of a budget, for ranks by layer name. Does not live here: when ranks may
change (`rank_budget`).
"""

import heapq
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from spectral_lightning.control.rank_clock import RankClock
from spectral_lightning.control.ranks import RankReading, energy_shares

Ranks = dict[str, int]


class Offer(NamedTuple):
    """The next quantum of a layer, to be dropped or added."""

    name: str
    """Layer."""
    rank: int
    """Its rank afterwards."""
    worth: float
    """Energy of the quantum, as a share of the layer's present energy."""
    cost: int
    """Its parameters."""

    @property
    def density(self) -> float:
        """What a parameter is worth."""
        return self.worth / self.cost


@dataclass(frozen=True, kw_only=True)
class LayerWorth:
    """What the components of a layer are worth: those that it has, and those that it would have."""

    name: str
    reading: RankReading
    clock: RankClock
    growth_threshold: float

    @cached_property
    def shares(self) -> list[float]:
        """Energy of the present components, descending, with sum 1."""
        return energy_shares(self.reading.values)

    @cached_property
    def tail(self) -> tuple[float, float]:
        """Mean energy of a component in the last quantum, and the factor by which quanta go on."""
        width = min(self.clock.quantum, len(self.shares))
        last = sum(self.shares[-width:]) / width
        lift = self.reading.growth
        if lift is None or lift < self.growth_threshold:
            return last, 0.0
        return last, 1 - 1 / lift  # of a lift, all but 1 is signal

    def worth(self, low: int, high: int) -> float:
        """Energy of the components in ``[low, high)``, present or not."""
        present = len(self.shares)
        absent = high - max(low, present)
        known = sum(self.shares[low:high])
        if absent <= 0:
            return known
        last, factor = self.tail
        return known + absent * last * factor ** ((high - 1 - present) // self.clock.quantum + 1)

    @cached_property
    def offers(self) -> dict[tuple[int, int], Offer | None]:
        """What `offer` has found so far, because a trade asks again and again."""
        return {}

    def offer(self, rank: int, direction: int) -> Offer | None:
        """The next quantum up (1) or down (-1) from a rank; None at a bound.

        Nothing is known of a layer whose reading failed, and nothing can be done to it: it offers
        nothing.
        """
        key = rank, direction
        if key not in self.offers:
            self.offers[key] = self._offer(rank, direction)
        return self.offers[key]

    def _offer(self, rank: int, direction: int) -> Offer | None:
        new = self.clock.neighbour(rank, direction, self.reading.capacity)
        if new == rank or self.reading.failure:
            return None
        low, high = min(rank, new), max(rank, new)
        return Offer(self.name, new, self.worth(low, high), (high - low) * self.reading.unit_cost)


Layers = Mapping[str, LayerWorth]


def total_cost(layers: Layers, ranks: Mapping[str, int]) -> int:
    """Parameters of all layers."""
    return sum(rank * layers[name].reading.unit_cost for name, rank in ranks.items())


def allot(layers: Layers, ranks: Mapping[str, int], allowance: float) -> Ranks:
    """Ranks if what the given ones leave of an allowance is spent on the best quanta."""
    new = dict(ranks)
    free = allowance - total_cost(layers, new)
    heap = [_best_first(offer) for name in new if (offer := layers[name].offer(new[name], 1))]
    heapq.heapify(heap)
    while heap:
        *_, offer = heapq.heappop(heap)
        if offer.cost > free or offer.worth <= 0:
            continue  # a smaller layer's may still fit
        free -= offer.cost
        new[offer.name] = offer.rank
        if following := layers[offer.name].offer(offer.rank, 1):
            heapq.heappush(heap, _best_first(following))
    return new


def cut(layers: Layers, ranks: Mapping[str, int], allowance: float) -> Ranks:
    """Ranks that fit into an allowance: the quanta that are worth least are dropped.

    The allowance has to hold the smallest ranks, and layers that offer nothing are not cut.
    """
    new = dict(ranks)
    excess = total_cost(layers, new) - allowance
    heap = _droppable(layers, new, new)
    while excess > 0 and heap:
        *_, offer = heapq.heappop(heap)
        excess -= offer.cost
        new[offer.name] = offer.rank
        if following := layers[offer.name].offer(offer.rank, -1):
            heapq.heappush(heap, _worst_first(following))
    return new


def trade(
    layers: Layers,
    ranks: Mapping[str, int],
    sellers: Collection[str],
    buyers: Collection[str],
    allowance: float,
    margin: float,
) -> Ranks:
    """Ranks after quanta were bought from what is free, or from other layers.

    A layer only buys or only sells, at most ``clock.max_step`` components.

    Args:
        layers: Layers.
        ranks: Ranks, inside the allowance.
        sellers: Layers that may shrink.
        buyers: Layers that may grow.
        allowance: Parameters of all layers together.
        margin: A quantum is bought if it is worth more than this times what is sold for it.
    """
    new = dict(ranks)
    free = allowance - total_cost(layers, new)
    while True:
        supply = _droppable(layers, new, [n for n in sellers if new[n] <= ranks[n]])
        demand = [
            _best_first(offer)
            for name in buyers
            if new[name] >= ranks[name] and (offer := layers[name].offer(new[name], 1))
        ]
        for *_, offer in sorted(demand):
            if offer.worth <= 0 or not _is_reachable(layers, ranks, offer):
                continue
            need = offer.cost - free
            sold = _raise(layers, ranks, supply, offer, need, offer.worth / margin)
            if sold is not None:
                break
        else:
            return new
        free += sum(sale.cost for sale in sold) - offer.cost
        new |= {moved.name: moved.rank for moved in (*sold, offer)}


Ordered = tuple[float, int, str, Offer]


def _raise(
    layers: Layers,
    ranks: Mapping[str, int],
    supply: list[Ordered],
    buyer: Offer,
    need: float,
    most: float,
) -> list[Offer] | None:
    """Cheapest sales that free the needed parameters; None if there are none worth less."""
    sold: list[Offer] = []
    if need > 0 and (not supply or supply[0][0] * need >= most):
        return None
    heap, lost = list(supply), 0.0
    while need > 0:
        if not heap:
            return None
        *_, offer = heapq.heappop(heap)
        if offer.name == buyer.name or not _is_reachable(layers, ranks, offer):
            continue
        lost += offer.worth
        if lost >= most:
            return None
        need -= offer.cost
        sold.append(offer)
        if following := layers[offer.name].offer(offer.rank, -1):
            heapq.heappush(heap, _worst_first(following))
    return sold


def _droppable(layers: Layers, ranks: Mapping[str, int], names: Collection[str]) -> list[Ordered]:
    offers = (layers[name].offer(ranks[name], -1) for name in names)
    return sorted(_worst_first(offer) for offer in offers if offer)


def _is_reachable(layers: Layers, ranks: Mapping[str, int], offer: Offer) -> bool:
    return abs(offer.rank - ranks[offer.name]) <= layers[offer.name].clock.max_step


def _best_first(offer: Offer) -> Ordered:
    # Among equals the lowest rank, then the name: the order of layers must not matter.
    return -offer.density, offer.rank, offer.name, offer


def _worst_first(offer: Offer) -> Ordered:
    return offer.density, -offer.rank, offer.name, offer
