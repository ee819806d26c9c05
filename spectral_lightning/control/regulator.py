"""One layer's regulator: calibrate on its own readings, then keep two sensors in their bands.

Lives here: how calibration, stable rank and condition number go together. Does not live here: the
thermostat of one sensor, and statistics of the window.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

from spectral_lightning.control.calibration import CalibrationWindow, static_band
from spectral_lightning.control.thermostat import (
    Band,
    Thermostat,
    ThermostatState,
    ThermostatVerdict,
)

Calibration = Literal["window", "static"]


class LayerReading(NamedTuple):
    """What a regulator looks at."""

    stable_rank: float
    """Relative to a Gaussian matrix of the shape; NaN if it could not be measured."""
    null: float
    """Stable rank of that Gaussian matrix; 1 if the stable rank could not be measured."""
    frobenius_norm: float
    """Frobenius norm, in the weight's own units."""
    condition_number: float | None = None
    """Condition number; None where none was measured at this step."""


class LayerVerdict(NamedTuple):
    """What to do about a layer."""

    stable_rank: ThermostatVerdict
    condition_number: ThermostatVerdict | None
    """None where none was measured at this step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegulatorState:
    """Memory of one layer's regulator; plain numbers, so that a checkpoint holds it as it is."""

    bands: tuple[Band, Band] | None = None
    """Bands of stable rank and condition number; None while calibrating."""
    rank: ThermostatState = field(default_factory=ThermostatState)
    """Thermostat of the stable rank."""
    condition: ThermostatState = field(default_factory=ThermostatState)
    """Thermostat of the condition number."""
    window: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    """Stable ranks and condition numbers seen while calibrating."""
    healthy_norm: float | None = None
    """Exponential mean of the Frobenius norm while the stable rank was inside its band."""

    def to_dict(self) -> dict[str, Any]:
        """State as plain containers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "RegulatorState":
        """State from what `to_dict` returned, also after a round trip through JSON."""
        bands, window = state["bands"], state["window"]
        return cls(
            bands=None if bands is None else (Band(**bands[0]), Band(**bands[1])),
            rank=ThermostatState(**state["rank"]),
            condition=ThermostatState(**state["condition"]),
            window=(tuple(window[0]), tuple(window[1])),
            healthy_norm=state["healthy_norm"],
        )


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class Regulator:
    """Rule by which every layer is regulated; the memory is the layer's own.

    With ``calibration="window"``, the readings of steps ``first_step <= step < first_step +
    num_steps`` give each layer its bands, which then follow its readings slowly while it is inside
    them. With ``"static"``, the bands are `floor` to `ceiling` and up to `condition_ceiling` from
    the first reading on. A bound that is given replaces the calibrated one.

    The thermostat of the stable rank looks at its excess over 1, the energy outside the leading
    direction over that inside it: the stable rank itself cannot tell a spike of 3 times the
    spectral norm from one of 30, both being close to 1.

    Raises:
        ValueError: If a setting is out of its range.
    """

    calibration: Calibration = "window"
    """Where the bands come from."""
    first_step: int = 100
    """Optimizer step at which the window begins: after the warm-up of the learning rate."""
    num_steps: int = 200
    """Length of the window in optimizer steps (specified as 200 with the method)."""
    floor: float | None = None
    """Smallest healthy relative stable rank; None for the calibrated one."""
    ceiling: float | None = None
    """Largest healthy relative stable rank; None for the calibrated one."""
    condition_ceiling: float | None = None
    """Largest healthy condition number; None for the calibrated one."""
    memory: float = 2000.0
    """Readings in which a calibrated band follows a layer that is inside it, by a factor e."""
    window: CalibrationWindow = field(default_factory=CalibrationWindow)
    """How bands follow from the window."""
    thermostat: Thermostat = field(default_factory=Thermostat)
    """How a sensor outside its band is answered; the same for both sensors."""

    def __post_init__(self) -> None:
        if self.calibration not in get_args(Calibration):
            raise ValueError(
                f"`calibration` must be 'window' or 'static', got {self.calibration!r}."
            )
        if self.first_step < 0:
            raise ValueError(f"`first_step` must be >= 0, got {self.first_step}.")
        if self.num_steps < 1:
            raise ValueError(f"`num_steps` must be >= 1, got {self.num_steps}.")
        if not self.memory >= 1:
            raise ValueError(f"`memory` must be >= 1, got {self.memory}.")
        if self.condition_ceiling is not None and not self.condition_ceiling > 1:
            raise ValueError(f"`condition_ceiling` must be above 1, got {self.condition_ceiling}.")
        if self.calibration == "static" and self.floor is None:
            raise ValueError(
                "`calibration='static'` needs a `floor`, the smallest healthy stable rank relative"
                " to a random matrix, got None; give one such as 0.1."
            )
        self._with_given((Band(), Band()))  # checks floor and ceiling against each other

    def update(
        self, state: RegulatorState, step: int, reading: LayerReading
    ) -> tuple[RegulatorState, LayerVerdict | None]:
        """Decide after the readings of one layer at one optimizer step.

        Args:
            state: State that the last update returned.
            step: Optimizer step of the reading.
            reading: Sensors' values.

        Returns:
            The next state, and the verdict; None while calibrating.
        """
        if state.bands is None:
            state = self._calibrated(state, step, reading)
            if state.bands is None:
                return state, None
        rank, verdict = self.thermostat.update(
            state.rank, _excess_band(state.bands[0], reading.null), _excess(reading)
        )
        condition, condition_verdict = state.condition, None
        if reading.condition_number is not None:
            condition, condition_verdict = self.thermostat.update(
                condition, state.bands[1], reading.condition_number
            )
        state = replace(state, rank=rank, condition=condition)
        if verdict is ThermostatVerdict.INSIDE:
            state = self._followed(state, reading)
        return state, LayerVerdict(verdict, condition_verdict)

    def _calibrated(
        self, state: RegulatorState, step: int, reading: LayerReading
    ) -> RegulatorState:
        if self.calibration == "static":
            assert self.floor is not None
            bands = static_band(1.0, ratio=self.floor), Band()
            return replace(state, bands=self._with_given(bands))
        ranks, conditions = state.window
        if self.first_step <= step < self.first_step + self.num_steps:
            ranks = (*ranks, reading.stable_rank)
            if reading.condition_number is not None:
                conditions = (*conditions, reading.condition_number)
            return replace(state, window=(ranks, conditions))
        band = self.window.band(ranks)
        if step < self.first_step or band is None:
            return state  # a layer without a usable reading in the window goes on waiting
        ceiling = (self.window.band(conditions) or Band()).ceiling
        bands = self._with_given((band, Band(ceiling=ceiling)))
        return replace(state, bands=bands, window=((), ()))

    def _with_given(self, bands: tuple[Band, Band]) -> tuple[Band, Band]:
        """Bands with the bounds that the user has given; a calibrated one in conflict goes."""
        rank, condition = bands
        floor = rank.floor if self.floor is None else self.floor
        ceiling = rank.ceiling if self.ceiling is None else self.ceiling
        if self.ceiling is None and floor >= ceiling:
            ceiling = math.inf
        if self.floor is None and floor >= ceiling:
            floor = 0.0
        rank = Band(floor=floor, ceiling=ceiling)
        if self.condition_ceiling is not None:
            condition = Band(ceiling=self.condition_ceiling)
        return rank, condition

    def _followed(self, state: RegulatorState, reading: LayerReading) -> RegulatorState:
        """State after a healthy reading: its norm, and the band a little nearer to it."""
        norm, old = reading.frobenius_norm, state.healthy_norm
        norm = norm if old is None else old + (norm - old) / 20
        state = replace(state, healthy_norm=norm)
        assert state.bands is not None
        rank, condition = state.bands
        if self.calibration == "static" or math.isinf(rank.ceiling) or not rank.floor > 0:
            return state
        centre = (math.log(rank.floor) + math.log(rank.ceiling)) / 2
        factor = math.exp((math.log(max(reading.stable_rank, 1e-12)) - centre) / self.memory)
        moved = Band(floor=rank.floor * factor, ceiling=rank.ceiling * factor)
        return replace(state, bands=self._with_given((moved, condition)))


def _excess(reading: LayerReading) -> float:
    """Excess of the stable rank over 1, which rounding cannot make negative; NaN stays NaN."""
    stable_rank = reading.stable_rank * reading.null
    return stable_rank if math.isnan(stable_rank) else max(stable_rank - 1, 0.0)


def _excess_band(band: Band, null: float) -> Band:
    """Band of the excess; a bound that no matrix of the shape can keep goes."""
    ceiling = band.ceiling * null - 1
    floor = max(band.floor * null - 1, 0.0)
    return Band(floor=floor, ceiling=ceiling if ceiling > floor else math.inf)
