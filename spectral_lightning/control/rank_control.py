"""What all rank controllers are: readings of all layers in, a rank for each layer out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple

from spectral_lightning.control.rank_clock import RankClock
from spectral_lightning.control.ranks import RankDecision, RankReading, RankState, RankVerdict

DEFAULT_CLOCK = RankClock()


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class RankController(ABC):
    """Decides the ranks of all layers at once; pure, so that it decides the same on all ranks."""

    is_global: ClassVar[bool] = False
    """Whether a decision needs the readings of all layers at once."""
    clock: RankClock = DEFAULT_CLOCK
    """When ranks may change, how far, and how often layers are checked."""

    @property
    def settings(self) -> dict[str, Any]:
        """Name and settings of the controller, for a log."""
        return {"controller": type(self).__name__, **asdict(self)}

    def is_due(self, state: RankState, step: int) -> bool:
        """Whether a layer is to be measured after this optimizer step."""
        return self.clock.is_due(state, step)

    @abstractmethod
    def target(self, reading: RankReading) -> float:
        """Components that a reading alone asks for, before smoothing, clock and bounds.

        Fed with what random factors would give, it tells what the controller would do to a layer
        that has learned nothing.

        Args:
            reading: Reading without a `failure`.
        """

    def targets(self, readings: Mapping[str, RankReading]) -> dict[str, float]:
        """`target` of several layers, of those whose reading has no failure."""
        return {n: self.target(reading) for n, reading in readings.items() if not reading.failure}

    @abstractmethod
    def update(
        self, states: Mapping[str, RankState], readings: Mapping[str, RankReading]
    ) -> dict[str, RankDecision]:
        """Decide after one reading of each layer.

        Args:
            states: State of each layer as the last decision returned it; a layer without one is
                new.
            readings: Readings of the layers to decide on.

        Returns:
            A decision for each reading. A reading with a `failure` keeps the rank, and of the state
            all but the step of the check.
        """

    def _hold(self, state: RankState, reading: RankReading, failure: RankVerdict) -> RankDecision:
        """Decision where nothing can be decided."""
        interval = self.clock.interval if state.interval is None else state.interval
        held = replace(state, checked=reading.step, interval=interval)
        target = float(reading.rank) if state.target is None else state.target
        return RankDecision(held, reading.rank, target, failure)


class Proposal(NamedTuple):
    """What a controller wants of one layer, before the clock is asked."""

    state: RankState
    wanted: float
    verdict: RankVerdict


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class LayerRankController(RankController):
    """A controller that looks at one layer at a time."""

    @abstractmethod
    def _propose(self, state: RankState, reading: RankReading, target: float) -> Proposal:
        """State with the memory of this reading, the wanted rank, and why if nothing changes."""

    def update(
        self, states: Mapping[str, RankState], readings: Mapping[str, RankReading]
    ) -> dict[str, RankDecision]:
        """Decide for each layer after its reading, as `RankController.update` says."""
        return {
            name: self._decide(states.get(name, RankState()), reading)
            for name, reading in readings.items()
        }

    def _decide(self, state: RankState, reading: RankReading) -> RankDecision:
        if reading.failure is not None:
            return self._hold(state, reading, reading.failure)
        target = self.target(reading)
        proposal = self._propose(state, reading, target)
        rank = self.clock.move(reading.rank, proposal.wanted, reading.capacity)
        low, high = self.clock.bounds(reading.capacity)
        verdict = proposal.verdict
        if rank != reading.rank:
            held = self.clock.hold(state, reading.step)
            verdict = held or (RankVerdict.GROWN if rank > reading.rank else RankVerdict.SHRUNK)
            rank = rank if held is None else reading.rank
        elif not low <= proposal.wanted <= high:
            verdict = RankVerdict.AT_BOUND
        new = self.clock.tick(proposal.state, reading, target, rank, verdict)
        return RankDecision(new, rank, target, verdict)
