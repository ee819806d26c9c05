"""What was measured of a model on disk, as a table for the terminal and as a JSON document."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from spectral_lightning.dashboards.table import LayerName, compact, plain_table
from spectral_lightning.spectra.names import some_names
from spectral_lightning.spectra.scan import ScannedLayer, ScanReport, ScanStatus

_COLUMNS = {
    "distance": "dist.",
    "relative_stable_rank": "rel.",
    "stable_rank": "stable\nrank",
    "spectral_norm": "spectral\nnorm",
    "frobenius_norm": "Frob.\nnorm",
}
_FULL_COLUMNS = {
    "distance": "dist.",
    "relative_stable_rank": "rel.",
    "stable_rank": "stable\nrank",
    "spectral_norm": "spec.\nnorm",
    "condition_number": "cond.",
    "relative_condition_number": "rel.\ncond.",
    "effective_rank": "eff.\nrank",
}
_STYLES = {
    ScanStatus.FAILED: "red",
    ScanStatus.ZERO: "red",
    ScanStatus.RANK_ONE: "red",
    ScanStatus.BELOW: "yellow",
    ScanStatus.ABOVE: "yellow",
}


def layer_number(layer: ScannedLayer, measure: str) -> float | None:
    """Return a number of a layer by its name.

    Args:
        layer: A layer.
        measure: ``"distance"``, or a number of `Reading`, e.g. ``"stable_rank"``.

    Returns:
        The number; NaN if it could not be computed, None if it was not measured.
    """
    value: float | None
    value = layer.distance if measure == "distance" else getattr(layer.reading, measure)
    return value


def sorted_layers(
    layers: Sequence[ScannedLayer], column: str, *, ascending: bool = False
) -> list[ScannedLayer]:
    """Sort layers by a column.

    Args:
        layers: Layers, the worst first, as `ScanReport` holds them.
        column: ``"distance"`` (the order they have), ``"name"``, ``"shape"`` (number of entries),
            ``"dtype"``, ``"status"`` or a number of `Reading`.
        ascending: Whether the smallest comes first; words come in the order of the alphabet unless
            this is set.

    Returns:
        The layers. Those without the number come last either way, but for ``"distance"``, where
        they are the worst.
    """
    words: dict[str, Callable[[ScannedLayer], str]] = {
        "name": lambda layer: layer.reading.name,
        "dtype": lambda layer: layer.dtype,
        "status": lambda layer: layer.status,
    }
    if column == "distance":
        return list(reversed(layers)) if ascending else list(layers)
    if column in words:
        return sorted(layers, key=words[column], reverse=ascending)
    if column == "shape":
        return sorted(layers, key=lambda x: math.prod(x.reading.shape), reverse=not ascending)
    numbers = [(layer_number(layer, column), layer) for layer in layers]
    known = [(x, layer) for x, layer in numbers if x is not None and not math.isnan(x)]
    known.sort(key=lambda pair: pair[0], reverse=not ascending)
    unknown = [layer for x, layer in numbers if x is None or math.isnan(x)]
    return [layer for _, layer in known] + unknown


def scan_table(
    report: ScanReport, layers: Sequence[ScannedLayer], title: str, *, full: bool = False
) -> Table:
    """Return layers of a model on disk as a table, and what was skipped below it.

    Fits a terminal of 80 columns: names are shortened, numbers never wrap.

    Args:
        report: All that was measured.
        layers: The layers to show, in this order.
        title: Title of the table.
        full: Whether to show what comes from all singular values.

    Returns:
        Table with a caption that counts all layers and names what was skipped, and why.
    """
    columns = _FULL_COLUMNS if full else _COLUMNS
    table = plain_table(title, ("shape", *columns.values(), "range"))
    for layer in layers:
        m, n = layer.reading.shape
        cells = [_cell(layer_number(layer, measure)) for measure in columns]
        name = LayerName(layer.reading.name)
        table.add_row(name, f"{m}x{n}", *cells, layer.status, style=_STYLES.get(layer.status))
    table.caption = Text("\n".join(_caption(report, len(layers))))
    return table


def scan_document(report: ScanReport, layers: Sequence[ScannedLayer]) -> dict[str, Any]:
    """Return layers of a model on disk as plain values that strict JSON can hold.

    Args:
        report: All that was measured.
        layers: The layers in the order wanted.

    Returns:
        ``summary``, ``rows`` and ``skipped``. Numbers that are not finite are the words "nan" and
        "inf"; those that were not measured are None.
    """
    return {
        "summary": {
            "matrices": len(report.layers),
            "parameters": _num_parameters(report),
            **{status.name.lower(): count for status, count in _counts(report).items()},
            "skipped": len(report.skipped),
            "vectors": report.num_vectors,
        },
        "rows": [_row(layer) for layer in layers],
        "skipped": [{"name": name, "reason": why} for name, why in report.skipped.items()],
    }


def _row(layer: ScannedLayer) -> dict[str, Any]:
    reading = layer.reading
    measures = ("spectral_norm", "frobenius_norm", "stable_rank", "relative_stable_rank")
    full = ("condition_number", "relative_condition_number", "effective_rank")
    return {
        "name": reading.name,
        "shape": list(reading.shape),
        "stored_shape": list(layer.stored_shape),
        "dtype": layer.dtype,
        "status": layer.status.name.lower(),
        "distance": _plain(layer.distance),
        **{measure: _plain(getattr(reading, measure)) for measure in measures},
        "spectral_norm_interval": [_plain(bound) for bound in reading.spectral_norm_interval],
        **{measure: _plain(getattr(reading, measure)) for measure in full},
        "failure": reading.failure,
    }


def _plain(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _cell(value: float | None) -> str:
    return "-" if value is not None and math.isnan(value) else compact(value)


def _caption(report: ScanReport, num_shown: int) -> list[str]:
    counts = _counts(report)
    parts = [f"{count} {status}" for status, count in counts.items() if count]
    healthy = report.healthy
    lines = [
        f"{num_shown} of {len(report.layers)} matrices ({_num_parameters(report):,} parameters);"
        f" relative stable rank in [{healthy.floor:g}, {healthy.ceiling:g}]: {', '.join(parts)}.",
    ]
    if report.num_vectors:
        few = "tensor has" if report.num_vectors == 1 else "tensors have"
        lines.append(f"{report.num_vectors} {few} fewer than two dimensions.")
    reasons: dict[str, list[str]] = {}
    for name, reason in report.skipped.items():
        reasons.setdefault(reason, []).append(name)
    lines += [
        f"Skipped, {reason}: {some_names(names, none='')}." for reason, names in reasons.items()
    ]
    return lines


def _counts(report: ScanReport) -> dict[ScanStatus, int]:
    counts = Counter(layer.status for layer in report.layers)
    return {status: counts[status] for status in ScanStatus}


def _num_parameters(report: ScanReport) -> int:
    return sum(math.prod(layer.reading.shape) for layer in report.layers)
