"""How many components a low-rank layer should have: what all rank controllers share.

Lives here: readings, states, verdicts, and what they say of energy and floors. Does not live here:
when a rank may change and by how much (`rank_clock`), the rules (`stable_rank_control`,
`energy_control`, `scheduled_rank`, `rank_budget`), how readings are made, and changing a layer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import NamedTuple


class RankVerdict(StrEnum):
    """Why a rank is changed or kept."""

    GROWN = "more components are needed"
    SHRUNK = "fewer components are enough"
    OVER_BUDGET = "the ranks did not fit into the budget"
    SETTLED = "the rank is where it should be"
    IN_DEADBAND = "the target is inside the deadband"
    AT_BOUND = "the target lies beyond a bound of the rank"
    NO_ROOM = "the budget is spent where it is worth more"
    VOTING = "the next readings have to agree first"
    WARMUP = "the warm-up is not over"
    COOLING = "the last change is too recent"
    FROZEN = "ranks no longer change"
    NOT_FINITE = "the reading is not a number, so nothing is done"
    NO_ENERGY = "the layer has no energy yet, so nothing is done"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReading:
    """What is measured of one low-rank layer ``W = U V``.

    Raises:
        ValueError: If the rank, the capacity and the number of values do not fit together.
    """

    step: int
    """Optimizer steps done."""
    shape: tuple[int, int]
    """``(m, n)`` of ``W``."""
    rank: int
    """Active components, in ``[1, capacity]``."""
    capacity: int
    """Most components that the layer's storage allows."""
    values: Sequence[float]
    """The `rank` singular values of the active product, descending, in the weight's own units; or,
    where the layer's inputs are known, the roots of the components' output energies. Empty if they
    could not be measured."""
    growth: float | None = None
    """Energy of the averaged gradient outside of what the factors can reach, over what averaging
    unrelated gradients would leave there: 1 is noise, ``N`` a gradient that stayed the same over
    ``N`` steps. None if it is not measured."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= self.capacity:
            raise ValueError(f"`rank` must be in [1, capacity={self.capacity}], got {self.rank}.")
        if len(self.values) not in {0, self.rank}:
            raise ValueError(
                f"`values` must hold one value for each of {self.rank} components, or none, got"
                f" {len(self.values)}."
            )

    @property
    def unit_cost(self) -> int:
        """Parameters of one component, which are also its multiplications per token: ``m + n``."""
        return sum(self.shape)

    @property
    def failure(self) -> RankVerdict | None:
        """Why nothing can be decided from this reading; None if something can."""
        numbers = self.values if self.growth is None else (*self.values, self.growth)
        if not all(math.isfinite(number) for number in numbers):
            return RankVerdict.NOT_FINITE
        return None if any(value > 0 for value in self.values) else RankVerdict.NO_ENERGY


@dataclass(frozen=True, kw_only=True, slots=True)
class RankState:
    """Memory of a controller for one layer; plain numbers, so that a checkpoint holds it as it is.

    The rank is not part of it: the layer has it, and readings bring it along.
    """

    smoothed: float | None = None
    """Exponential mean of the target, for a controller that smooths; None before the first."""
    target: float | None = None
    """Target of the last check."""
    checked: int | None = None
    """Optimizer step of the last check."""
    changed: int | None = None
    """Optimizer step of the last change of rank."""
    interval: int | None = None
    """Optimizer steps from one check to the next."""
    votes: int = 0
    """Checks in a row that asked for growth (positive) or for shrinking (negative)."""
    direction: int = 0
    """1 if the last change was a growth, -1 if it was not, 0 if there was none."""
    turned: int | None = None
    """Optimizer step of the last change that went against the one before."""
    num_reversals: int = 0
    """Changes in a row that took the one before back; where the need is constant, too many."""
    num_changes: int = 0
    """Changes of rank so far."""


class RankDecision(NamedTuple):
    """What a controller decided for one layer."""

    state: RankState
    """State for the next update."""
    rank: int
    """Components from now on."""
    target: float
    """Components that the reading alone asks for, before smoothing, clock and bounds."""
    verdict: RankVerdict
    """Why."""


def energy_shares(values: Sequence[float]) -> list[float]:
    """Share of each component in a layer's energy.

    Args:
        values: Singular values, finite, not negative, at least one of them positive.

    Returns:
        ``values**2`` over their sum: dimensionless, with sum 1.

    Example:
        >>> energy_shares([1.0, 1.0])
        [0.5, 0.5]
    """
    largest = max(values)  # values near the ends of the floating-point range have squares too
    energies = [(value / largest) ** 2 for value in values]
    total = sum(energies)
    return [energy / total for energy in energies]


def energy_rank(values: Sequence[float], energy: float) -> int:
    """Fewest leading components that hold a share of the energy.

    Args:
        values: Singular values, descending, as for `energy_shares`.
        energy: Share, in (0, 1).

    Returns:
        Number of components, in ``[1, len(values)]``.

    Example:
        >>> energy_rank([3.0, 1.0], 0.9), energy_rank([3.0, 1.0], 0.95)
        (1, 2)
    """
    held = list(accumulate(energy_shares(values)))
    return 1 + sum(share < energy * held[-1] for share in held)


def layers_at_floor(ranks: Mapping[str, int], floor: int, slack: float = 0.0) -> tuple[str, ...]:
    """Layers whose rank is no finding, because it lies where the controller would stop anyway.

    Args:
        ranks: Rank of each layer.
        floor: Smallest rank that the controller allows.
        slack: How far above it the controller may come to rest: the dead band of a
            `StableRankController`, else 0.

    Returns:
        Names, in the order of `ranks`.

    Example:
        >>> layers_at_floor({"query": 9, "key": 8, "up": 24}, floor=8, slack=2.0)
        ('query', 'key')
    """
    return tuple(name for name, rank in ranks.items() if rank <= floor + slack)
