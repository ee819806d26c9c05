"""Mode policy on measures that know their chance level, with hysteresis in both directions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from spectral_lightning.control.modes import (
    Mode,
    ModePolicy,
    ModeReading,
    ModeState,
    ModeVerdict,
    PolicyCondition,
    is_finite,
    require_size,
)


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class CalibratedPolicy(ModePolicy):
    """Protect a layer while updates erode what it has learned, and release it afterwards.

    In full mode it looks at the update really applied (*effect*): a vote for protection is an
    erosion above `enter_erosion`. In low-rank mode the applied update cannot touch the protected
    part any more, so it looks at the gradient (*intent*): a vote for release is an erosion below
    `exit_erosion`. A switch needs `patience` votes in a row and lies at least `dwell` analyses
    behind the last one.

    Erosion is measured in standard deviations of what chance gives: an update that knows nothing of
    the weight has erosion 0 with standard deviation 1, whatever the shape and ``k``, and one that
    only shrinks the weight as a whole has none. So neither noise nor weight decay locks a layer in.
    Energies of the update are not looked at: those of Muon's hardly depend on the gradient.

    Raises:
        ValueError: If a setting is out of its range.
    """

    enter_erosion: float = 4.0
    """Erosion by an update that calls for protection, above `exit_erosion`."""
    exit_erosion: float = 1.0
    """Erosion by a gradient below which the danger is over, at least 0."""
    patience: int = 2
    """Votes in a row that a switch takes, at least 1."""
    dwell: int = 3
    """Fewest analyses between two switches."""
    energy: float = 0.9
    """Share of the energy (of the gradients, or of the weight: what is decomposed) that the
    principal directions should hold, in (0, 1)."""
    max_principal: float = 0.125
    """Most principal directions, as a fraction of ``min(m, n)``, in (0, 0.5]."""
    deadband: float = 0.1
    """Relative change of the number of principal directions that is ignored."""
    warmup_steps: int = 10
    """Optimizer steps without a decision, as in the original."""

    def __post_init__(self) -> None:
        if not 0 <= self.exit_erosion < self.enter_erosion < math.inf:
            raise ValueError(
                "`exit_erosion` and `enter_erosion` must satisfy 0 <= exit_erosion < enter_erosion,"
                f" got {self.exit_erosion} and {self.enter_erosion}."
            )
        for name, least in {"patience": 1, "dwell": 0, "warmup_steps": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}.")
        if not 0 < self.energy < 1:
            raise ValueError(f"`energy` must be in (0, 1), got {self.energy}.")
        if not 0 < self.max_principal <= 0.5:
            raise ValueError(f"`max_principal` must be in (0, 0.5], got {self.max_principal}.")
        if not 0 <= self.deadband < 1:
            raise ValueError(f"`deadband` must be in [0, 1), got {self.deadband}.")

    @property
    def needs_all_values(self) -> bool:
        """False: the leading ones are enough."""
        return False

    @property
    def conditions(self) -> tuple[PolicyCondition, ...]:
        """The thresholds of both directions."""
        return (
            PolicyCondition("effect_erosion", "danger", True, self.enter_erosion),
            PolicyCondition("intent_erosion", "release", False, self.exit_erosion),
        )

    def most_principal(self, size: int) -> int:
        """`max_principal` of all, at least 1."""
        require_size(size)
        return max(1, int(self.max_principal * size))

    def num_principal(
        self, state: ModeState, values: Sequence[float], frobenius_norm: float, size: int
    ) -> int:
        """Directions that hold `energy`; the present number inside the deadband.

        Args:
            state: State.
            values: Leading singular values, descending.
            frobenius_norm: ``||W||_F``, positive.
            size: ``min(m, n)``.
        """
        most = min(self.most_principal(size), len(values))
        wanted, held = 0, 0.0
        while wanted < most and held < self.energy * frobenius_norm**2:
            held += values[wanted] ** 2
            wanted += 1
        wanted = max(1, wanted)
        now = wanted if state.rank is None else min(size - state.rank, most)
        return now if abs(wanted - now) <= self.deadband * now else wanted

    def update(self, state: ModeState, reading: ModeReading) -> tuple[ModeState, ModeVerdict]:
        """Decide after one reading.

        Args:
            state: State that the last update returned.
            reading: Reading, with the number of principal directions that `num_principal` gave.

        Returns:
            The next state, whose rank is the reading's, and the reason.
        """
        dwelt = None if state.dwelt is None else state.dwelt + 1
        held = replace(state, rank=reading.size - reading.num_principal, dwelt=dwelt)
        if reading.step < self.warmup_steps:
            return held, ModeVerdict.WARMUP
        wants = self._wants_other_mode(state.mode, reading)
        if wants is None:
            return held, ModeVerdict.CONTINUE
        if not wants:
            return replace(held, votes=0), ModeVerdict.CONTINUE
        held = replace(held, votes=state.votes + 1)
        if held.votes < self.patience:
            return held, ModeVerdict.VOTING
        if dwelt is not None and dwelt < self.dwell:
            return held, ModeVerdict.DWELLING
        entering = state.mode is Mode.FULL
        new = replace(
            held,
            mode=Mode.LOW_RANK if entering else Mode.FULL,
            votes=0,
            dwelt=0,
            num_switches=state.num_switches + 1,
        )
        return new, ModeVerdict.CLOBBERING if entering else ModeVerdict.RELEASED

    def _wants_other_mode(self, mode: Mode, reading: ModeReading) -> bool | None:
        """Whether a reading votes for the other mode; None if it cannot say."""
        if not is_finite(reading):
            return None
        if mode is Mode.LOW_RANK:
            return reading.intent_erosion < self.exit_erosion
        if reading.effect_erosion is None:
            return None
        return reading.effect_erosion > self.enter_erosion


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class ScheduledPolicy(ModePolicy):
    """Switch at given steps, whatever is measured: to protect a phase of training, or to test.

    Raises:
        ValueError: If `principal` is out of its range, or a mode is unknown.
    """

    schedule: Mapping[int, str]
    """Mode from the first analysis at or after an optimizer step on; full mode before."""
    principal: float = 0.125
    """Principal directions, as a fraction of ``min(m, n)``, in (0, 1)."""

    def __post_init__(self) -> None:
        if not 0 < self.principal < 1:
            raise ValueError(f"`principal` must be in (0, 1), got {self.principal}.")
        for mode in self.schedule.values():
            if mode not in list(Mode):
                raise ValueError(f"`schedule` must give {' or '.join(Mode)}, got {mode!r}.")

    @property
    def needs_all_values(self) -> bool:
        """False."""
        return False

    @property
    def conditions(self) -> tuple[PolicyCondition, ...]:
        """None: nothing is compared."""
        return ()

    def most_principal(self, size: int) -> int:
        """`principal` of all, at least 1 and less than all."""
        require_size(size)
        return min(max(1, int(self.principal * size)), size - 1)

    def num_principal(
        self, state: ModeState, values: Sequence[float], frobenius_norm: float, size: int
    ) -> int:
        """Always the same."""
        return self.most_principal(size)

    def update(self, state: ModeState, reading: ModeReading) -> tuple[ModeState, ModeVerdict]:
        """Follow the schedule."""
        due = [step for step in self.schedule if step <= reading.step]
        mode = Mode(self.schedule[max(due)]) if due else Mode.FULL
        switches = state.num_switches + (mode is not state.mode)
        rank = reading.size - reading.num_principal
        return replace(state, mode=mode, rank=rank, num_switches=switches), ModeVerdict.SCHEDULED
