"""Low-rank tasks and a controller that does as it is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from spectral_lightning.control import (
    RankClock,
    RankController,
    RankDecision,
    RankReading,
    RankState,
    RankVerdict,
)
from spectral_lightning.nn import factorize
from spectral_lightning.testing.tasks import TinyNetwork, TinyTask

EVERY_STEP = RankClock(warmup_steps=0, cooldown_steps=0, quantum=1, interval=1, interval_max=1)
"""Checks after every optimizer step, and no reason to wait."""


def low_rank_task(
    rank: int = 8, capacity: int = 16, mode: str = "sliced", **settings: Any
) -> TinyTask:
    """A `TinyTask` whose layers ``net.2`` and ``net.5`` are low-rank ones."""
    net = TinyNetwork()
    factorize(net, ["2", "5"], rank=rank, capacity=capacity, mode=mode)
    return TinyTask(net, **settings)


@dataclass(frozen=True, kw_only=True)
class Plan(RankController):
    """Gives every layer the rank that is planned for a step, whatever is measured."""

    clock: RankClock = EVERY_STEP
    ranks: dict[int, int] = field(default_factory=dict)
    """Rank from an optimizer step on."""

    @override
    def target(self, reading: RankReading) -> float:
        return float(self.ranks.get(reading.step, reading.rank))

    @override
    def update(
        self, states: Mapping[str, RankState], readings: Mapping[str, RankReading]
    ) -> dict[str, RankDecision]:
        found = {}
        for name, reading in readings.items():
            state = RankState(checked=reading.step, interval=1)
            rank = int(self.target(reading))
            found[name] = RankDecision(state, rank, float(rank), RankVerdict.SETTLED)
        return found
