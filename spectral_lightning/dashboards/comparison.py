"""Two runs side by side, as tables for the terminal and as a JSON document."""

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from spectral_lightning.dashboards.mode_findings import ModeHistory
from spectral_lightning.dashboards.pairs import (
    PACE,
    TRAINING_LOSS,
    VALIDATION,
    ValidationPairs,
    common_values,
    config_differences,
    pairing_warnings,
    relative_difference,
    training_speed,
)
from spectral_lightning.dashboards.phases import PhaseReport
from spectral_lightning.dashboards.runs import RunRecord
from spectral_lightning.dashboards.table import LayerName, plain_table
from spectral_lightning.spectra.mode_events import MODE_EVENTS_FILE, LayerAnalysis

_VERDICTS = {True: "passed", False: "failed", None: "unknown"}
_STYLES = {True: None, False: "red", None: "yellow"}
_MOST_SWITCHES = 20  # rows of the table of switches
_HEADERS = ("baseline", "run", "difference", "relative")


def summary_table(baseline: RunRecord, run: RunRecord) -> Table:
    """Return both runs at their last common steps, with the speed and what the modes did.

    Args:
        baseline: The run to compare with.
        run: The run to judge.

    Returns:
        Table with a caption that names both folders and says where the speeds come from.
    """
    table = _table("Two runs", "", ("step", *_HEADERS))
    table.add_row(
        "last step", "", *(str(record.last_step(PACE)) for record in (baseline, run)), "", ""
    )
    for tag, title in {TRAINING_LOSS: "training loss", **VALIDATION}.items():
        points = common_values(baseline, run, tag)
        if points:
            step, first, second = points[-1]
            table.add_row(title, str(step), *_cells(first, second))
        else:
            missing = [
                "" if record.scalars.get(tag) else "not logged" for record in (baseline, run)
            ]
            table.add_row(title, "", *missing, "", "")
    speeds = [training_speed(record) for record in (baseline, run)]
    numbers = [speed.tokens_per_second for speed in speeds]
    table.add_row("tokens per second", "", *_rates(*numbers))
    counts = [_mode_counts(record) for record in (baseline, run)]
    for name in ("analyses", "skipped", "switches", "detections") if any(counts) else ():
        cells = ["-" if count is None else str(count[name]) for count in counts]
        table.add_row(f"mode {name}", "", *cells, "", "")
    lines = []
    for title, record, speed in zip(("baseline", "run"), (baseline, run), speeds, strict=True):
        without = f", without {MODE_EVENTS_FILE}" if record.events is None else ""
        lines += [f"{title}: {record.folder}{without}", f"{title}'s speed: {speed.source}"]
    table.caption = Text("\n".join(lines))
    return table


def validation_table(pairs: ValidationPairs) -> Table:
    """Return the paired difference at every common validation step."""
    table = _table(f"{VALIDATION[pairs.tag].capitalize()}, paired", "step", _HEADERS)
    for step, first, second in pairs.points:
        table.add_row(str(step), *_cells(first, second))
    return table


def switches_table(run: RunRecord) -> Table | None:
    """Return the mode switches of a run in their order; None if there were none."""
    switches = ModeHistory(run.events or ()).switches
    if not switches:
        return None
    table = plain_table("Mode switches of the run", ("step", "from", "to", "rank", "reason"))
    for switch in switches[:_MOST_SWITCHES]:
        table.add_row(
            LayerName(switch.layer),
            str(switch.step),
            switch.mode,
            switch.next_mode,
            f"{switch.rank} to {switch.next_rank}",
            switch.verdict,
        )
    more = len(switches) - _MOST_SWITCHES
    if more > 0:
        table.caption = Text(f"{more} more are not shown.")
    return table


def criteria_table(report: PhaseReport) -> Table:
    """Return the criteria of a phase with what was found and the verdict."""
    table = _table(f"Criteria of {report.phase}", "criterion", ("target", "found", "verdict"))
    for column in table.columns[1:3]:
        column.justify, column.no_wrap = "left", False
    for criterion in report.criteria:
        table.add_row(
            criterion.name,
            criterion.target,
            criterion.value,
            _VERDICTS[criterion.passed],
            style=_STYLES[criterion.passed],
        )
    if report.not_judged:
        table.caption = Text(f"Not judged, because no logs show it: {report.not_judged}.")
    return table


def comparison_document(
    baseline: RunRecord, run: RunRecord, pairs: ValidationPairs, report: PhaseReport | None
) -> dict[str, Any]:
    """Return a comparison as plain values that strict JSON can hold.

    Args:
        baseline: The run to compare with.
        run: The run to judge.
        pairs: The validations that both have in common.
        report: The criteria, if there are any.

    Returns:
        Numbers that are not finite are the words "nan", "inf" and "-inf".
    """
    differences = config_differences(baseline, run)
    return {
        "baseline": _record(baseline),
        "run": _record(run),
        "warnings": pairing_warnings(baseline, run),
        "config_differences": {key: [str(x) for x in pair] for key, pair in differences.items()},
        "training_loss": _points(common_values(baseline, run, TRAINING_LOSS)),
        "validation": {"tag": pairs.tag, "points": _points(pairs.points)},
        "criteria": None if report is None else _report(report),
    }


def _table(title: str, first: str, headers: Sequence[str]) -> Table:
    table = plain_table(title, headers)
    table.columns[0].header = first
    return table


def _cells(first: float, second: float) -> list[str]:
    numbers = [f"{first:.5g}", f"{second:.5g}", f"{second - first:+.4g}"]
    return [*numbers, _percent(relative_difference(first, second))]


def _rates(first: float | None, second: float | None) -> list[str]:
    cells = ["not logged" if rate is None else f"{rate:,.0f}" for rate in (first, second)]
    if first is None or second is None:
        return [*cells, "", ""]
    return [*cells, f"{second - first:+,.0f}", _percent(relative_difference(first, second))]


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:+.2f} %"


def _mode_counts(record: RunRecord) -> dict[str, int] | None:
    if record.events is None:
        return None
    history = ModeHistory(record.events)
    return {
        "layers": len(history.layers),
        "analyses": len(history.analyses),
        "skipped": len(history.skipped),
        "switches": len(history.switches),
        "detections": len(history.detections),
    }


def _record(record: RunRecord) -> dict[str, Any]:
    speed = training_speed(record)
    return {
        "folder": str(record.folder),
        "last_step": record.last_step(PACE),
        "config_file": None if record.config is None else record.config_file,
        "tokens_per_second": speed.tokens_per_second,
        "tokens_per_second_source": speed.source,
        "checkpoints": [str(path) for path in record.checkpoints],
        "samples": dict(record.samples),
        "modes": _mode_counts(record),
        "switches": [_switch(analysis) for analysis in ModeHistory(record.events or ()).switches],
    }


def _switch(analysis: LayerAnalysis) -> dict[str, Any]:
    names = ("step", "layer", "mode", "next_mode", "rank", "next_rank", "verdict")
    return {name: getattr(analysis, name) for name in names}


def _points(points: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {
            "step": point.step,
            "baseline": _plain(point.baseline),
            "run": _plain(point.run),
            "difference": _plain(point.difference),
            "relative_difference": _plain(point.relative_difference),
        }
        for point in points
    ]


def _report(report: PhaseReport) -> dict[str, Any]:
    names = ("name", "target", "value", "passed")
    return {
        "phase": report.phase.value,
        "passed": report.passed,
        "criteria": [{name: getattr(x, name) for name in names} for x in report.criteria],
        "not_judged": report.not_judged,
    }


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
