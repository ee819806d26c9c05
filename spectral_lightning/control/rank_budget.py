"""Ranks of all layers out of one budget."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from spectral_lightning.control.rank_control import RankController
from spectral_lightning.control.rank_offers import LayerWorth, allot, cut, trade
from spectral_lightning.control.ranks import RankDecision, RankReading, RankState, RankVerdict


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class BudgetAllocator(RankController):
    """Spend a budget of parameters where a parameter holds most energy.

    A component of an ``(m, n)`` layer costs ``m + n`` parameters, and as many multiplications per
    token; it is worth its share of its layer's energy. Components that a layer does not have are
    worth what its last quantum holds, times ``1 - 1 / growth`` for each quantum further out, and
    nothing while the growth lift is below its threshold or not measured.

    An update buys single quanta, the best first: from what is free of the budget, or from other
    layers if the gain is above ``1 + hysteresis`` times their loss. A layer turns from buying to
    selling, or back, at most once in the time of 50 shortest intervals, because what a quantum will
    be worth is a guess. All layers are checked together.

    The budget holds after every update. Ranks that exceed it, at the start or because a run goes on
    with a smaller one, are cut at once, whatever the clock says, but not below ``clock.rank_min``.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        Zhang et al. (2023), "AdaLoRA", sec. 3.3, https://arxiv.org/abs/2303.10512, shares one
        budget by importance; cost, quanta and growth are added here.

    Example:
        >>> readings = {
        ...     name: RankReading(step=0, shape=(64, 64), rank=16, capacity=64, values=values)
        ...     for name, values in {"sharp": [1.0] * 8 + [0.1] * 8, "flat": [1.0] * 16}.items()
        ... }
        >>> decisions = BudgetAllocator(budget=24 * 128).update({}, readings)
        >>> {name: decision.rank for name, decision in decisions.items()}
        {'sharp': 8, 'flat': 16}
    """

    is_global: ClassVar[bool] = True
    budget: float
    """Parameters (or multiplications per token) of all layers together: a number above 1, or a
    share in (0, 1] of what they would be as dense matrices."""
    hysteresis: float = 0.5
    """Relative gain that moving a quantum to another layer has to promise; set by hand."""
    growth_threshold: float = 2.0
    """Growth lift below which absent components are worth nothing, at least 1; as in
    `EnergyController`."""

    def __post_init__(self) -> None:
        if not 0 < self.budget < math.inf:
            raise ValueError(f"`budget` must be positive and finite, got {self.budget}.")
        if not 0 <= self.hysteresis < math.inf:
            raise ValueError(f"`hysteresis` must be >= 0 and finite, got {self.hysteresis}.")
        if not 1 <= self.growth_threshold < math.inf:
            raise ValueError(
                f"`growth_threshold` must be >= 1 and finite, got {self.growth_threshold}."
            )

    def is_due(self, state: RankState, step: int) -> bool:
        """Whether the layers are to be measured; the first time at once, to keep the budget."""
        return state.checked is None or super().is_due(state, step)

    def allowance(self, readings: Mapping[str, RankReading]) -> float:
        """The budget of these layers in parameters.

        Raises:
            ValueError: If it does not hold the smallest ranks.
        """
        dense = sum(math.prod(reading.shape) for reading in readings.values())
        allowance = self.budget * dense if self.budget <= 1 else self.budget
        least = sum(self._floor(reading) * reading.unit_cost for reading in readings.values())
        if least > allowance:
            raise ValueError(
                f"`budget` must leave room for rank_min={self.clock.rank_min} in all layers, which"
                f" takes {least} parameters, got {self.budget}, which is {allowance:.0f}."
            )
        return allowance

    def target(self, reading: RankReading) -> float:
        """Components that a layer would get if it were the only one."""
        return self.targets({"": reading})[""]

    def targets(self, readings: Mapping[str, RankReading]) -> dict[str, float]:
        """Components that each layer would get if the budget were spent anew.

        Raises:
            ValueError: If the budget does not hold the smallest ranks.
        """
        layers = self._layers(readings)
        least = {n: r.rank if r.failure else self._floor(r) for n, r in readings.items()}
        fixed = {name for name, reading in readings.items() if reading.failure}
        taken = sum(least[name] * readings[name].unit_cost for name in fixed)
        rest = {name: rank for name, rank in least.items() if name not in fixed}
        allotted = allot(layers, rest, self.allowance(readings) - taken)
        return {name: float(rank) for name, rank in allotted.items()}

    def update(
        self, states: Mapping[str, RankState], readings: Mapping[str, RankReading]
    ) -> dict[str, RankDecision]:
        """Decide for all layers that share the budget, as `RankController.update` says.

        Returns:
            A decision for each layer, with those first that shrink and those last that grow: who
            follows them in order never exceeds the budget either.

        Raises:
            ValueError: If a layer that has a state has no reading, or the budget does not hold the
                smallest ranks.
        """
        missing = sorted(states.keys() - readings.keys())
        if missing:
            raise ValueError(
                f"`readings` must cover all layers that share the budget, got none of {missing}."
            )
        memory = {name: states.get(name, RankState()) for name in readings}
        now = {name: reading.rank for name, reading in readings.items()}
        movable = [
            name
            for name, reading in readings.items()
            if not reading.failure and self.clock.hold(memory[name], reading.step) is None
        ]
        layers, allowance = self._layers(readings), self.allowance(readings)
        inside = now | {n: self.clock.move(now[n], now[n], readings[n].capacity) for n in movable}
        fitting = cut(layers, inside, allowance)
        traders = [n for n in movable if fitting[n] == now[n]]
        sellers = [n for n in traders if self._may_move(memory[n], readings[n].step, -1)]
        buyers = [n for n in traders if self._may_move(memory[n], readings[n].step, 1)]
        ranks = trade(layers, fitting, sellers, buyers, allowance, 1 + self.hysteresis)
        over = {name for name in now if fitting[name] < inside[name]}
        return self._decisions(memory, readings, ranks, over)

    def _decisions(
        self,
        states: Mapping[str, RankState],
        readings: Mapping[str, RankReading],
        ranks: Mapping[str, int],
        over: set[str],
    ) -> dict[str, RankDecision]:
        targets, found = self.targets(readings), {}
        for name, reading in readings.items():
            state, rank = states[name], ranks[name]
            failure = None if name in over else reading.failure
            if failure is not None:
                found[name] = self._hold(state, reading, failure)
                continue
            target = targets.get(name, float(rank))
            verdict = RankVerdict.OVER_BUDGET
            if name not in over:
                verdict = self._verdict(state, reading, rank, target)
            new = self.clock.tick(state, reading, target, rank, verdict)
            found[name] = RankDecision(new, rank, target, verdict)
        # One interval for all: a budget cannot be shared by layers that are not looked at.
        interval = min((decision.state.interval or 0 for decision in found.values()), default=0)
        shared = {
            name: decision._replace(state=replace(decision.state, interval=interval))
            for name, decision in found.items()
        }
        return dict(sorted(shared.items(), key=lambda item: _sign(item[1].rank, readings[item[0]])))

    def _verdict(
        self, state: RankState, reading: RankReading, rank: int, target: float
    ) -> RankVerdict:
        if rank != reading.rank:
            return RankVerdict.GROWN if rank > reading.rank else RankVerdict.SHRUNK
        wanted = self.clock.move(rank, target, reading.capacity)
        if wanted == rank:
            return RankVerdict.SETTLED
        blocked = RankVerdict.NO_ROOM if wanted > rank else RankVerdict.IN_DEADBAND
        return self.clock.hold(state, reading.step) or blocked

    def _may_move(self, state: RankState, step: int, direction: int) -> bool:
        return direction * state.direction >= 0 or not self.clock.has_just_turned(state, step)

    def _floor(self, reading: RankReading) -> int:
        return self.clock.bounds(reading.capacity)[0]

    def _layers(self, readings: Mapping[str, RankReading]) -> dict[str, LayerWorth]:
        return {
            name: LayerWorth(
                name=name,
                reading=reading,
                clock=self.clock,
                growth_threshold=self.growth_threshold,
            )
            for name, reading in readings.items()
        }


def _sign(rank: int, reading: RankReading) -> int:
    return (rank > reading.rank) - (rank < reading.rank)
