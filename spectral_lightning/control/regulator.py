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
    """Bands of stable rank and condition number in force; None while calibrating."""
    calibrated: tuple[Band, Band] | None = None
    """Bands that the window gave; None while calibrating, and for static ones."""
    drift: tuple[float, float] = (0.0, 0.0)
    """How far, in natural logarithms, those have followed the layer since."""
    rank: ThermostatState = field(default_factory=ThermostatState)
    """Thermostat of the stable rank."""
    condition: ThermostatState = field(default_factory=ThermostatState)
    """Thermostat of the condition number."""
    window_start: int | None = None
    """Optimizer step of the first reading in the window."""
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
        pairs = {name: state[name] for name in ("bands", "calibrated")}
        bands = {
            name: None if pair is None else (Band(**pair[0]), Band(**pair[1]))
            for name, pair in pairs.items()
        }
        return cls(
            **bands,
            drift=(state["drift"][0], state["drift"][1]),
            rank=ThermostatState(**state["rank"]),
            condition=ThermostatState(**state["condition"]),
            window_start=state["window_start"],
            window=(tuple(state["window"][0]), tuple(state["window"][1])),
            healthy_norm=state["healthy_norm"],
        )


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults by vars()
class Regulator:
    """Rule by which every layer is regulated; the memory is the layer's own.

    With ``calibration="window"``, the readings of `num_steps` steps give each layer its bands,
    beginning with its first reading at or after `first_step`. Bands then follow a layer that is
    inside them, slowly, and no farther than the factor `window.ratio` either way: so a slow
    collapse is stopped there. With ``"static"``, the bands are `floor` to `ceiling` and up to
    `condition_ceiling` from the first reading on. A bound that is given replaces the calibrated
    one.

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
    two_sided: bool = True
    """Whether a calibrated band of the stable rank has a ceiling too."""
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

    def adopted(self, state: RegulatorState) -> RegulatorState:
        """State that was saved under other settings, with the bands of these.

        Static bands come from the settings, calibrated ones stay but for the bounds that are given;
        a layer that was never calibrated begins to be.
        """
        if state.bands is None:
            return state
        if self.calibration == "static":
            return replace(state, bands=self._static(), calibrated=None)
        if state.calibrated is None:
            return replace(state, bands=None, window_start=None, window=((), ()))
        return replace(state, bands=self._in_force(state.calibrated, state.drift))

    def _calibrated(
        self, state: RegulatorState, step: int, reading: LayerReading
    ) -> RegulatorState:
        if self.calibration == "static":
            return replace(state, bands=self._static())
        if step < self.first_step:
            return state
        start = step if state.window_start is None else state.window_start
        ranks, conditions = state.window
        band = self.window.band(ranks)
        if step < start + self.num_steps or band is None:  # a layer that fails goes on waiting
            ranks = (*ranks, reading.stable_rank) if reading.stable_rank > 0 else ranks
            if reading.condition_number is not None:
                conditions = (*conditions, reading.condition_number)
            return replace(state, window_start=start, window=(ranks, conditions))
        calibrated = (band, self.window.band(conditions) or Band())
        bands = self._in_force(calibrated, (0.0, 0.0))
        return replace(state, bands=bands, calibrated=calibrated, window=((), ()))

    def _static(self) -> tuple[Band, Band]:
        assert self.floor is not None
        return self._with_given((static_band(1.0, ratio=self.floor), Band()))

    def _in_force(
        self, calibrated: tuple[Band, Band], drift: tuple[float, float]
    ) -> tuple[Band, Band]:
        rank, condition = (_shifted(*pair) for pair in zip(calibrated, drift, strict=True))
        ceiling = rank.ceiling if self.two_sided else math.inf
        rank = Band(floor=rank.floor, ceiling=ceiling)
        return self._with_given((rank, Band(ceiling=condition.ceiling)))

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
        """State after a healthy reading: its norm, and the bands a little nearer to it."""
        norm, old = reading.frobenius_norm, state.healthy_norm
        norm = norm if old is None else old + (norm - old) / 20
        if state.calibrated is None:
            return replace(state, healthy_norm=norm)
        log_condition = None if state.condition.side else state.condition.smoothed
        logs = (math.log(max(reading.stable_rank, 1e-12)), log_condition)
        drift = (
            self._drifted(state.calibrated[0], state.drift[0], logs[0]),
            self._drifted(state.calibrated[1], state.drift[1], logs[1]),
        )
        bands = self._in_force(state.calibrated, drift)
        return replace(state, healthy_norm=norm, drift=drift, bands=bands)

    def _drifted(self, calibrated: Band, drift: float, log_value: float | None) -> float:
        """Drift of a band a little nearer to a healthy reading."""
        floor, ceiling = calibrated.floor, calibrated.ceiling
        if log_value is None or math.isinf(ceiling) or not floor > 0:
            return drift
        centre = (math.log(floor) + math.log(ceiling)) / 2
        farthest = -math.log(self.window.ratio)
        drift += (log_value - centre - drift) / self.memory
        return min(max(drift, -farthest), farthest)


def _shifted(band: Band, drift: float) -> Band:
    factor = math.exp(drift)
    return Band(floor=band.floor * factor, ceiling=band.ceiling * factor)


def _excess(reading: LayerReading) -> float:
    """Excess of the stable rank over 1, which rounding cannot make negative; NaN stays NaN."""
    stable_rank = reading.stable_rank * reading.null
    return stable_rank if math.isnan(stable_rank) else max(stable_rank - 1, 0.0)


def _excess_band(band: Band, null: float) -> Band:
    """Band of the excess; a bound that no matrix of the shape can keep goes."""
    ceiling = band.ceiling * null - 1
    floor = max(band.floor * null - 1, 0.0)
    return Band(floor=floor, ceiling=ceiling if ceiling > floor else math.inf)
