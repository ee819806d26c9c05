"""How the layers of a run with mode switching stand, as tables and as plain values."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from enum import StrEnum
from typing import Any

from rich.table import Table
from rich.text import Text

from spectral_lightning.dashboards.mode_alerts import Alert, ModeWatch, WatchedLayer
from spectral_lightning.dashboards.table import LayerName, compact, plain_table
from spectral_lightning.spectra.mode_events import Condition
from spectral_lightning.spectra.names import some_names

_SAFE, _CLOSE = 0.1, 0.05  # from the script that this replaces, for alignments in [0, 1]
_CAPTION_WIDTH = 60  # a caption is as wide as its table, which may have one column of numbers
_JOINED = {"danger": " or ", "optimal": " and ", "release": " and "}
_NUMBERS = (
    *("step", "mode", "rank", "prin-\ncipal", "to\ndanger", "", "opti-\nmal"),
    *("swit-\nches", "skip-\nped"),
)


class Margin(StrEnum):
    """How far a layer is from the danger condition that it is nearest to.

    Absolute, in the measure's own units: ``SAFE`` above 0.1, ``CLOSE`` above 0.05.
    """

    SAFE = "SAFE"
    CLOSE = "CLOSE"
    DANGER = "DANGER"
    UNKNOWN = "UNKNOWN"
    """There is no danger condition whose measure has a value."""


def distance_to_danger(layer: WatchedLayer) -> float | None:
    """How far a layer's newest values are from the danger condition that they are nearest to.

    Args:
        layer: A layer, in either mode.

    Returns:
        Smallest distance over the danger conditions whose measures have a value, in the units of
        that measure, negative beyond the threshold; None if there is none.
    """
    distances = map(layer.distance, layer.of_role("danger"))
    return min((distance for distance in distances if distance is not None), default=None)


def margin(distance: float | None) -> Margin:
    """Put a distance to danger in a word.

    Args:
        distance: Distance in the measure's own units, or None.

    Example:
        >>> margin(0.2).value, margin(0.1).value, margin(0.05).value, margin(None).value
        ('SAFE', 'CLOSE', 'DANGER', 'UNKNOWN')
    """
    if distance is None:
        return Margin.UNKNOWN
    if distance > _SAFE:
        return Margin.SAFE
    return Margin.CLOSE if distance > _CLOSE else Margin.DANGER


def mode_table(watch: ModeWatch, title: str = "Modes") -> Table:
    """Return each layer's mode and ranks at its newest analysis, and how near it is to a switch.

    Critical layers come first, then those nearest to danger. Fits a terminal of 80 columns: names
    are shortened, numbers never wrap. Print it with ``rich.console.Console().print(table)``.

    Args:
        watch: What is known of the run.
        title: Title of the table.

    Returns:
        Table with a caption that explains its columns and names the critical layers.
    """
    table = plain_table(title, _NUMBERS)
    layers = _ordered(watch)
    for layer in layers:
        table.add_row(LayerName(layer.name), *_cells(layer), style=_style(layer))
    critical = [layer.name for layer in layers if layer.is_critical]
    lines = [f"{len(layers)} layers; critical at their latest analysis: {_named(critical)}."]
    if watch.settings is not None:
        lines[0] += f" Policy: {watch.settings.policy}; protection: {watch.settings.protection}."
    if any(layer.latest is not None and layer.latest.switches for layer in layers):
        lines.append("-> is the mode that a layer switched to at its latest analysis.")
    if watch.settings is None or not watch.settings.conditions:
        lines.append("The run names no conditions, so nothing is compared with a threshold.")
    lines.append(
        "rank: minor directions; optimal: conditions met; danger: distance to the nearest"
        f" condition, SAFE above {_SAFE}, CLOSE above {_CLOSE}."
    )
    table.caption = Text("\n".join(lines))
    return table


def measures_table(watch: ModeWatch, title: str = "Measures of the conditions") -> Table | None:
    """Return the newest value of every measure that a condition compares with a threshold.

    Fits a terminal of 80 columns up to six measures.

    Args:
        watch: What is known of the run.
        title: Title of the table.

    Returns:
        Table with a caption that spells out the conditions of the latest settings and names the
        measures that some layer has no value of; None before the first analysis, and where no
        condition names a measure.
    """
    layers = [layer for layer in _ordered(watch) if layer.latest is not None]
    conditions = watch.settings.conditions if watch.settings is not None else ()
    measures = _measures([*conditions, *(c for layer in layers for c in layer.conditions)])
    if not (layers and measures):
        return None
    table = plain_table(title, [_header(measure) for measure in measures])
    table.min_width = _CAPTION_WIDTH
    for layer in layers:
        cells = [compact(layer.value(measure)) for measure in measures]
        table.add_row(LayerName(layer.name), *cells, style=_style(layer))
    lines = [
        f"{role}: {joint.join(_condition(c) for c in conditions if c.role == role)}."
        for role, joint in _JOINED.items()
        if any(c.role == role for c in conditions)
    ]
    missing = {m: [layer.name for layer in layers if layer.value(m) is None] for m in measures}
    lines += [f"{m} was not measured (-): {_named(missing[m])}." for m in measures if missing[m]]
    table.caption = Text("\n".join(lines))
    return table


def mode_document(watch: ModeWatch, alerts: Iterable[Alert]) -> dict[str, Any]:
    """Return what the tables show, and alerts, as plain values that strict JSON can hold.

    Args:
        watch: What is known of the run.
        alerts: Alerts, in the order wanted.

    Returns:
        ``run`` (its latest settings, None before the first), ``alerts`` and ``summary``, one row
        per layer in the order of the tables. What was not measured is None.
    """
    run = None
    if watch.settings is not None:
        conditions = [condition._asdict() for condition in watch.settings.conditions]
        run = {**asdict(watch.settings), "conditions": conditions}
    return {
        "run": run,
        "alerts": [{"level": str(alert.level), **asdict(alert)} for alert in alerts],
        "summary": [_row(layer) for layer in _ordered(watch)],
    }


def _row(layer: WatchedLayer) -> dict[str, Any]:
    latest, distance = layer.latest, distance_to_danger(layer)
    optimal, measures = layer.of_role("optimal"), _measures(layer.conditions)
    keys = ("step", "mode", "rank", "num_principal", "next_mode", "next_rank")
    return {
        "layer": layer.name,
        **{key: None if latest is None else getattr(latest, key) for key in keys},
        "measures": {measure: layer.value(measure) for measure in measures},
        "not_measured": [measure for measure in measures if layer.value(measure) is None],
        "distance_to_danger": distance,
        "margin": str(margin(distance)),
        "num_optimal": len(optimal),
        "num_optimal_met": sum(map(layer.is_met, optimal)),
        "num_switches": layer.num_switches,
        "num_skipped": layer.num_skipped,
        "critical": layer.is_critical,
    }


def _ordered(watch: ModeWatch) -> list[WatchedLayer]:
    def urgency(layer: WatchedLayer) -> tuple[bool, bool, float]:
        distance = distance_to_danger(layer)
        return not layer.is_critical, distance is None, distance or 0.0

    return sorted(watch.layers.values(), key=urgency)


def _cells(layer: WatchedLayer) -> list[str]:
    latest, distance = layer.latest, distance_to_danger(layer)
    counts = [str(layer.num_switches), str(layer.num_skipped)]
    if latest is None:
        return ["-"] * 7 + counts
    optimal = layer.of_role("optimal")
    return [
        str(latest.step),
        f"->{latest.next_mode}" if latest.switches else latest.mode,
        str(latest.rank),
        str(latest.num_principal),
        compact(distance),
        "-" if distance is None else str(margin(distance)),
        f"{sum(map(layer.is_met, optimal))}/{len(optimal)}" if optimal else "-",
        *counts,
    ]


def _style(layer: WatchedLayer) -> str | None:
    if layer.is_critical:
        return "red"
    near = margin(distance_to_danger(layer)) in (Margin.CLOSE, Margin.DANGER)
    # In low-rank mode the principal directions are protected, however near the danger is.
    return "yellow" if near and layer.latest is not None and layer.latest.mode == "full" else None


def _measures(conditions: Iterable[Condition]) -> list[str]:
    return list(dict.fromkeys(condition.measure for condition in conditions))


def _header(measure: str) -> str:
    words = measure.split("_")
    return "\n".join(word if len(word) <= 9 else f"{word[:8]}." for word in words)


def _condition(condition: Condition) -> str:
    sign = ">" if condition.above else "<"
    return f"{condition.measure} {sign} {condition.threshold:.4g}"


def _named(names: Sequence[str]) -> str:
    return some_names(names, none="none")
