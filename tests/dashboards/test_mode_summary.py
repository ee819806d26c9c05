"""How the layers of a run with mode switching are said to stand."""

import io

import pytest
from rich.console import Console

from spectral_lightning.dashboards.mode_alerts import ModeWatch
from spectral_lightning.dashboards.mode_summary import (
    Margin,
    margin,
    measures_table,
    mode_document,
    mode_table,
)
from spectral_lightning.spectra import SkippedAnalysis
from spectral_lightning.testing.mode_events import CONDITIONS, QUIET, layer_analysis, mode_settings

OPTIMAL = {"subspace_angle": 0.05, "minor_alignment": 0.7, "reconstruction_error": 0.005}


def settings(*conditions, **changes):
    return mode_settings(*(conditions or CONDITIONS), **changes)


def analysis(step=20, **changes):
    quiet = {"rank": 10, "loss": None, "verdict": "the reason of the policy"} | QUIET
    return layer_analysis(step, **quiet | changes)


def printed(table, width=80):
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(table)
    return file.getvalue()


@pytest.fixture
def watch():
    """One layer near danger, one critical and switching, one never analysed."""
    watch = ModeWatch()
    watch.update(settings())
    watch.update(analysis(20, layer="near", principal_alignment=0.33, subspace_angle=None))
    watch.update(analysis(20, layer="bad", to="lowrank", principal_alignment=0.5, **OPTIMAL))
    watch.update(SkippedAnalysis(step=20, layer="blind", reason="no gradient"))
    return watch


def test_the_table_shows_where_each_layer_stands_the_most_urgent_first(watch):
    rows = [line.split() for line in printed(mode_table(watch)).splitlines()]
    start = next(index for index, row in enumerate(rows) if row[:1] == ["bad"])
    assert rows[start : start + 3] == [
        ["bad", "20", "->lowrank", "10", "6", "-0.1", "DANGER", "3/3", "1", "0"],
        ["near", "20", "full", "10", "6", "0.07", "CLOSE", "0/3", "0", "0"],
        ["blind", "-", "-", "-", "-", "-", "-", "-", "0", "1"],
    ]
    text = " ".join(printed(mode_table(watch)).split())
    assert "3 layers; critical at their latest analysis: bad. Policy: SeedPolicy;" in text


def test_the_measures_are_shown_with_all_conditions_and_what_is_missing(watch):
    text = " ".join(printed(measures_table(watch)).split())
    assert " bad 0.5 0.1 0.05 0.7 0.005 3 " in text
    assert " near 0.33 0.1 - 0.3 0.9 3 " in text
    assert "danger: principal_alignment > 0.4 or largest_erosion > 0.5." in text
    assert "subspace_angle < 0.1 and minor_alignment > 0.6 and reconstruction_error < 0.01" in text
    assert "release: intent_lift < 1.2. subspace_angle was not measured (-): near." in text


def test_tables_fit_eighty_columns():
    watch = ModeWatch()
    watch.update(settings())
    name = "model.transformer.encoder.layers.11.attention.self.query_key_value"
    event = analysis(123456, layer=name, to="lowrank", rank=10000, principal_alignment=0.0000123)
    watch.update(event)
    for table in (mode_table(watch), measures_table(watch)):
        text = printed(table)
        assert max(map(len, text.splitlines())) <= 80
        assert "\u2026" not in text
    assert "123456 ->lowrank 10000 " in printed(mode_table(watch))


@pytest.mark.parametrize(
    ("distance", "word"),
    [(0.11, "SAFE"), (0.1, "CLOSE"), (0.051, "CLOSE"), (0.05, "DANGER"), (-1, "DANGER")],
)
def test_the_margin_is_a_word_for_the_distance(distance, word):
    assert margin(distance) is Margin[word]


def test_the_document_holds_alerts_and_rows(watch):
    alerts = watch.update(analysis(40, layer="near"))
    alerts += watch.update(SkippedAnalysis(step=40, layer="near", reason="no gradient"))
    document = mode_document(watch, alerts)
    assert document["run"]["policy"] == "SeedPolicy"
    assert document["run"]["conditions"][0]["threshold"] == 0.4
    assert document["alerts"] == [
        {
            "level": "WARNING",
            "kind": "skipped",
            "step": 40,
            "layer": "near",
            "text": "analysis skipped: no gradient",
        }
    ]
    rows = {row["layer"]: row for row in document["summary"]}
    assert list(rows) == ["bad", "near", "blind"]
    assert rows["near"]["measures"] == QUIET
    assert rows["near"]["distance_to_danger"] == pytest.approx(0.2)
    assert (rows["near"]["margin"], rows["blind"]["margin"]) == ("SAFE", "UNKNOWN")
    assert (rows["bad"]["mode"], rows["bad"]["next_mode"]) == ("full", "lowrank")
    assert (rows["bad"]["num_optimal_met"], rows["bad"]["num_optimal"]) == (3, 3)
    assert [row["critical"] for row in rows.values()] == [True, False, False]
    assert rows["blind"]["step"] is None


def test_a_policy_without_conditions_has_no_table_of_measures():
    watch = ModeWatch()
    watch.update(analysis(20))
    assert measures_table(watch) is None
    text = " ".join(printed(mode_table(watch)).split())
    assert "The run names no conditions, so nothing is compared with a threshold." in text


def test_before_the_first_analysis_the_table_is_empty():
    watch = ModeWatch()
    watch.update(settings())
    assert measures_table(watch) is None
    assert "0 layers; critical at their latest analysis: none." in printed(mode_table(watch))


def test_the_caption_has_room_below_a_single_measure():
    watch = ModeWatch()
    watch.update(settings(CONDITIONS[0]))
    watch.update(analysis(20))
    assert "danger: principal_alignment > 0.4." in printed(measures_table(watch))
