"""When a layer's principal directions are protected: what all mode policies share.

In full mode a weight trains freely; in low-rank mode its ``k`` principal singular directions are
protected and the ``rank = min(m, n) - k`` minor ones go on learning. Lives here: readings, states
and verdicts. Does not live here: the rules (`seed_mode`, `calibrated_mode`), and protecting.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Mode(StrEnum):
    """How a layer trains."""

    FULL = "full"
    LOW_RANK = "lowrank"


class ModeVerdict(StrEnum):
    """Why a mode is entered, left or kept; the first six are the words of the original."""

    WARMUP = "warmup_period"
    INITIAL = "initial_svd_computation"
    CLOBBERING = "gradient_clobbering_risk"
    OPTIMAL = "optimal_lowrank_conditions"
    UNSAFE = "reconstruction_unsafe"
    CONTINUE = "continue_current_mode"
    RELEASED = "erosion_has_ended"
    VOTING = "waiting_for_more_votes"
    DWELLING = "last_switch_is_too_recent"
    SCHEDULED = "scheduled"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeReading:
    """What is measured of a layer at one analysis, with ``k`` principal directions.

    `None` stands for what there is no measurement of yet; a measurement that failed gives no
    reading at all.
    """

    step: int
    """Optimizer steps done."""
    size: int
    """``min(m, n)``."""
    num_principal: int
    """``k``, in ``[1, size - 1]``."""
    values: Sequence[float]
    """Singular values, descending, weight's own units: all for a policy that needs all."""
    previous_values: Sequence[float] | None
    """Those of the analysis before; None at the first."""
    subspace_angle: float | None
    """Largest angle between the principal left subspaces of two analyses, radians."""
    principal_alignment: float
    """``||U_k^T G||_F / ||G||_F`` of the gradient, in [0, 1]."""
    minor_alignment: float
    """``||U_minor^T G||_F / ||G||_F``, in [0, 1]."""
    reconstruction_error: float
    """``||W - W_k||_F / ||W||_F``, in [0, 1]."""
    intent_lift: float
    """Gradient energy in the protected part, over chance."""
    intent_erosion: float
    """How strongly a step down the gradient would shrink ``W_k`` beside the rest, in standard
    deviations of chance: ``cos(G, W_k) sqrt(m n)``, both without their component along ``W``."""
    effect_lift: float | None
    """Energy of the applied update in the protected part, over chance."""
    effect_erosion: float | None
    """`intent_erosion` with the applied update in place of the step: positive shrinks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeState:
    """Memory of a policy for one layer; plain numbers, so that a checkpoint holds it as it is."""

    mode: Mode = Mode.FULL
    """Mode from now on."""
    rank: int | None = None
    """Minor directions from now on; None before a policy has chosen."""
    votes: int = 0
    """Analyses in a row that asked for the other mode."""
    dwelt: int | None = None
    """Analyses since the last switch; None if there was none."""
    num_switches: int = 0
    """Switches so far, in both directions."""


class PolicyCondition(NamedTuple):
    """A threshold of a policy, for those who watch a run."""

    measure: str
    role: str
    above: bool
    threshold: float


class ModePolicy(ABC):
    """Decides the mode of a layer; pure, so that it decides the same on all ranks."""

    @property
    @abstractmethod
    def needs_all_values(self) -> bool:
        """Whether `update` looks at all singular values, and not only at the principal ones."""

    @property
    @abstractmethod
    def conditions(self) -> tuple[PolicyCondition, ...]:
        """The thresholds."""

    @abstractmethod
    def most_principal(self, size: int) -> int:
        """Most principal directions that it would ever choose, of ``min(m, n) = size``."""

    @abstractmethod
    def num_principal(
        self, state: ModeState, values: Sequence[float], frobenius_norm: float, size: int
    ) -> int:
        """Principal directions to measure with, and to protect if it comes to that."""

    @abstractmethod
    def update(self, state: ModeState, reading: ModeReading) -> tuple[ModeState, ModeVerdict]:
        """Decide after one reading."""


def require_size(size: int) -> None:
    """Refuse a matrix that is too small to be split.

    Raises:
        ValueError: If its smaller side is below 4.
    """
    if size < 4:
        raise ValueError(
            f"`size` must be >= 4, got {size}; leave such small matrices out by `layers`."
        )


def is_finite(reading: ModeReading) -> bool:
    """Whether all numbers of a reading can be compared."""
    numbers = (
        reading.subspace_angle,
        reading.principal_alignment,
        reading.minor_alignment,
        reading.reconstruction_error,
        reading.intent_lift,
        reading.intent_erosion,
        reading.effect_lift,
        reading.effect_erosion,
    )
    return all(math.isfinite(number) for number in numbers if number is not None)
