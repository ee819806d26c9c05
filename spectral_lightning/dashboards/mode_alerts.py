"""What in a run with mode switching asks for attention, event by event; opens no file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from spectral_lightning.spectra.mode_events import (
    Condition,
    LayerAnalysis,
    ModeEvent,
    ModeSettings,
    SkippedAnalysis,
)

_TREND_LENGTH = 5  # analyses in a row, from the script that this replaces
_MODES = {"full": "full mode", "lowrank": "low-rank mode"}


class AlertLevel(StrEnum):
    """How urgent an alert is."""

    CRITICAL = "CRITICAL"
    WARNING = "WARNING"
    INFO = "INFO"


class AlertKind(StrEnum):
    """What an alert is about; of each there is one per layer and step."""

    DANGER = "danger"
    OPTIMAL = "optimal"
    NEAR_DANGER = "near_danger"
    NEAR_OPTIMAL = "near_optimal"
    TREND = "trend"
    SWITCH = "switch"
    RANK = "rank"
    SKIPPED = "skipped"


_LEVELS = {
    AlertKind.DANGER: AlertLevel.CRITICAL,
    AlertKind.OPTIMAL: AlertLevel.CRITICAL,
    AlertKind.NEAR_DANGER: AlertLevel.WARNING,
    AlertKind.NEAR_OPTIMAL: AlertLevel.WARNING,
    AlertKind.SKIPPED: AlertLevel.WARNING,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """One thing to know about one layer."""

    kind: AlertKind
    """What it is about."""
    step: int
    """Optimizer steps done when it was seen."""
    layer: str
    """Name of the layer."""
    text: str
    """One line in words, without the layer's name."""

    @property
    def level(self) -> AlertLevel:
        """How urgent it is."""
        return _LEVELS.get(self.kind, AlertLevel.INFO)


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchedLayer:
    """What is known of one layer."""

    name: str
    """Name of the layer."""
    conditions: tuple[Condition, ...] = ()
    """Thresholds in force at the latest analysis."""
    history: tuple[LayerAnalysis, ...] = ()
    """Latest analyses, the newest last."""
    num_switches: int = 0
    """Changes of mode so far."""
    num_skipped: int = 0
    """Analyses that could not be made so far."""
    is_critical: bool = False
    """Whether the latest analysis was critical."""

    @property
    def latest(self) -> LayerAnalysis | None:
        """Newest analysis; None if there was none."""
        return self.history[-1] if self.history else None

    def value(self, measure: str) -> float | None:
        """Newest value of a measure, in its own units; None if not measured or not finite."""
        return _value(self.latest, measure) if self.latest is not None else None

    def distance(self, condition: Condition) -> float | None:
        """How far the newest value is from meeting a condition, in the measure's own units.

        Negative beyond the threshold, zero on it, None if the measure has no value.
        """
        value = self.value(condition.measure)
        return None if value is None else _distance(condition, value)

    def is_met(self, condition: Condition) -> bool:
        """Whether the newest value meets a condition."""
        return condition.is_met(self.value(condition.measure))

    def of_role(self, role: str) -> list[Condition]:
        """Conditions of a role: ``"danger"``, ``"optimal"`` or ``"release"``."""
        return [condition for condition in self.conditions if condition.role == role]


class ModeWatch:
    """Turn the events of a run into alerts, by the thresholds in the run's own settings.

    In full mode, where nothing is protected:

    - critical: a danger condition is met; or all optimal conditions are, so that a switch to
      low-rank mode is imminent;
    - warning: a danger condition is missed by less than `warn_margin`, none being met; or at
      least one optimal condition is met, and another one missed by less than that.

    In either mode, a warning for an analysis that was skipped, and for information:

    - a switch of mode with its reason, and a change of rank;
    - a trend: a measure moved strictly towards a threshold in five analyses in a row. The straight
      line through the first and the last of them says in how many optimizer steps it gets there.
      Looked at are the thresholds of danger and optimal conditions in full mode and of release
      conditions in low-rank mode; shown is what is less than ``history_size * every_n_steps``
      steps ahead, for a line is not worth following further than what is remembered reaches back.

    A measure that is missing, None or not finite was not measured: it meets and approaches
    nothing. Before the first settings there are no thresholds. An event of a layer, step and type
    that was taken before is ignored. For a run that went back to an earlier step, make a new watch.

    Args:
        warn_margin: Largest distance to a threshold that is called near, as a share of the
            threshold, >= 0: measures have different units. The default is about that of the script
            that this replaces, 0.05 at thresholds of 0.4 to 0.6.
        history_size: Analyses of each layer that are remembered, >= 5.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> watch = ModeWatch()
        >>> condition = Condition("principal_alignment", "danger", above=True, threshold=0.4)
        >>> watch.update(ModeSettings(
        ...     step=0, every_n_steps=20, policy="SeedPolicy", protection="two_sided",
        ...     conditions=(condition,),
        ... ))
        []
        >>> (alert,) = watch.update(LayerAnalysis(
        ...     step=20, layer="fc", mode="full", rank=6, num_principal=2, next_mode="full",
        ...     next_rank=6, verdict="", loss=None, measures={"principal_alignment": 0.5},
        ... ))
        >>> alert.level.value, alert.text
        ('CRITICAL', 'danger in full mode: principal_alignment 0.5 is above 0.4')
    """

    def __init__(self, warn_margin: float = 0.1, history_size: int = 20) -> None:
        if not (math.isfinite(warn_margin) and warn_margin >= 0):
            raise ValueError(f"`warn_margin` must be finite and >= 0, got {warn_margin}.")
        if history_size < _TREND_LENGTH:
            raise ValueError(f"`history_size` must be >= {_TREND_LENGTH}, got {history_size}.")
        self.warn_margin = warn_margin
        self.history_size = history_size
        self.settings: ModeSettings | None = None
        self._layers: dict[str, WatchedLayer] = {}
        self._taken: set[tuple[str, str, int]] = set()

    @property
    def layers(self) -> dict[str, WatchedLayer]:
        """Every layer seen so far, by name."""
        return dict(self._layers)

    def update(self, event: ModeEvent) -> list[Alert]:
        """Take one event, and return what it gives rise to, the most urgent first."""
        if isinstance(event, ModeSettings):
            self.settings = event
            return []
        key = (event.event, event.layer, event.step)
        if key in self._taken:
            return []
        self._taken.add(key)
        layer = self._layers.get(event.layer, WatchedLayer(name=event.layer))
        if isinstance(event, SkippedAnalysis):
            self._layers[event.layer] = replace(layer, num_skipped=layer.num_skipped + 1)
            found = {AlertKind.SKIPPED: f"analysis skipped: {_sentence(event.reason)}"}
        else:
            layer = replace(
                layer,
                conditions=self.settings.conditions if self.settings else (),
                history=(*layer.history, event)[-self.history_size :],
                num_switches=layer.num_switches + event.switches,
            )
            found = self._findings(layer, event)
            critical = any(_LEVELS.get(kind) is AlertLevel.CRITICAL for kind in found)
            self._layers[event.layer] = replace(layer, is_critical=critical)
        alerts = [Alert(kind=k, step=event.step, layer=event.layer, text=found[k]) for k in found]
        return sorted(alerts, key=lambda alert: list(AlertLevel).index(alert.level))

    def _findings(self, layer: WatchedLayer, event: LayerAnalysis) -> dict[AlertKind, str]:
        found: dict[AlertKind, str] = {}
        if event.mode == "full":
            found |= self._danger(layer) | self._optimal(layer, event)
        if trends := self._trends(layer, event):
            found[AlertKind.TREND] = "; ".join(trends)
        # A policy may choose the rank before it measures, so that only the next event tells.
        before = layer.history[-2].next_rank if len(layer.history) > 1 else event.rank
        changes = before != event.next_rank
        rank = f"rank {before} -> {event.next_rank}" if changes else f"rank {before}"
        reason = _sentence(event.verdict)
        if event.switches:
            modes = " -> ".join(_MODES.get(mode, mode) for mode in (event.mode, event.next_mode))
            found[AlertKind.SWITCH] = f"{modes}, {rank}: {reason}"
        elif changes:
            found[AlertKind.RANK] = f"{rank}: {reason}"
        return found

    def _danger(self, layer: WatchedLayer) -> dict[AlertKind, str]:
        danger = layer.of_role("danger")
        if met := [condition for condition in danger if layer.is_met(condition)]:
            text = " and ".join(f"{_now(layer, c)} is {_side(c)}" for c in met)
            return {AlertKind.DANGER: f"danger in full mode: {text}"}
        if near := [condition for condition in danger if self._is_near(layer, condition)]:
            text = " and ".join(f"{_now(layer, c)} (danger {_side(c)})" for c in near)
            return {AlertKind.NEAR_DANGER: f"less than {self._margin()} from danger: {text}"}
        return {}

    def _optimal(self, layer: WatchedLayer, event: LayerAnalysis) -> dict[AlertKind, str]:
        optimal = layer.of_role("optimal")
        num_met = sum(map(layer.is_met, optimal))
        if optimal and num_met == len(optimal):
            what = "switching to low-rank mode" if event.switches else "switch imminent"
            met = f"optimal conditions met ({num_met} of {num_met})"
            return {AlertKind.OPTIMAL: f"all {met}: {what}"}
        near = [condition for condition in optimal if self._is_near(layer, condition)]
        if num_met and near:
            text = " and ".join(f"{_now(layer, c)} (wanted {_side(c)})" for c in near)
            met = f"{num_met} of {len(optimal)} optimal conditions met"
            return {AlertKind.NEAR_OPTIMAL: f"{met}, less than {self._margin()} away: {text}"}
        return {}

    def _trends(self, layer: WatchedLayer, event: LayerAnalysis) -> list[str]:
        if self.settings is None:
            return []
        horizon = self.history_size * self.settings.every_n_steps
        window = layer.history[-_TREND_LENGTH:]
        if len(window) < _TREND_LENGTH or any(past.mode != event.mode for past in window):
            return []
        roles = ("danger", "optimal") if event.mode == "full" else ("release",)
        trends = []
        for condition in (c for c in layer.conditions if c.role in roles):
            eta = _steps_until(window, condition)
            if eta is not None and 0 < eta < horizon:
                course = "rising" if condition.above else "falling"
                goal = f"{condition.role} {_side(condition)} in about {max(1, round(eta))} step(s)"
                trends.append(f"{_now(layer, condition)} is {course}, {goal}")
        return trends

    def _margin(self) -> str:
        return f"{100 * self.warn_margin:.4g} %"

    def _is_near(self, layer: WatchedLayer, condition: Condition) -> bool:
        distance = layer.distance(condition)
        return distance is not None and 0 <= distance < self.warn_margin * abs(condition.threshold)


def _value(analysis: LayerAnalysis, measure: str) -> float | None:
    value = analysis.measures.get(measure)
    return value if value is not None and math.isfinite(value) else None


def _distance(condition: Condition, value: float) -> float:
    return condition.threshold - value if condition.above else value - condition.threshold


def _steps_until(window: Sequence[LayerAnalysis], condition: Condition) -> float | None:
    """Optimizer steps until a threshold is reached; None where a measure does not approach it."""
    distances, steps = [], [analysis.step for analysis in window]
    for analysis in window:
        value = _value(analysis, condition.measure)
        if value is None:
            return None
        distances.append(_distance(condition, value))
    pairs = zip(range(len(window) - 1), range(1, len(window)), strict=True)
    if not all(distances[j] < distances[i] and steps[j] > steps[i] for i, j in pairs):
        return None
    return distances[-1] * (steps[-1] - steps[0]) / (distances[0] - distances[-1])


def _now(layer: WatchedLayer, condition: Condition) -> str:
    return f"{condition.measure} {layer.value(condition.measure):.4g}"


def _side(condition: Condition) -> str:
    return f"{'above' if condition.above else 'below'} {condition.threshold:.4g}"


def _sentence(text: str) -> str:
    """One line without a full stop; a reason may be the message of an error."""
    return " ".join(text.split()).rstrip(".") or "no reason given"
