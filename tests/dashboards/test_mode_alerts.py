"""What `ModeWatch` says about events; how the layers stand is in `test_mode_summary`."""

import io
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from spectral_lightning.dashboards.mode_alerts import AlertKind, ModeWatch
from spectral_lightning.dashboards.mode_summary import (
    distance_to_danger,
    measures_table,
    mode_document,
    mode_table,
)
from spectral_lightning.spectra import Condition, LayerAnalysis, SkippedAnalysis
from spectral_lightning.testing.mode_events import CONDITIONS, QUIET, layer_analysis, mode_settings

OPTIMAL = {"subspace_angle": 0.05, "minor_alignment": 0.7, "reconstruction_error": 0.005}


def settings(*conditions, **changes):
    return mode_settings(*(conditions or CONDITIONS), **changes)


def analysis(step=20, **changes):
    quiet = {"rank": 10, "loss": None, "verdict": "the reason of the policy"} | QUIET
    return layer_analysis(step, **quiet | changes)


def said(watch, *events):
    """Level and text of every alert on these events."""
    return [(alert.level.name, alert.text) for event in events for alert in watch.update(event)]


@pytest.fixture
def watch():
    watch = ModeWatch()
    watch.update(settings())
    return watch


def test_a_quiet_analysis_says_nothing_in_either_mode(watch):
    assert said(watch, analysis(20), analysis(40, mode="lowrank")) == []


def test_danger_is_critical_in_full_mode_where_nothing_is_protected(watch):
    assert said(watch, analysis(principal_alignment=0.43, largest_erosion=0.75)) == [
        (
            "CRITICAL",
            "danger in full mode: principal_alignment 0.43 is above 0.4 and largest_erosion 0.75 is"
            " above 0.5",
        )
    ]
    assert watch.layers["fc"].is_critical
    assert said(watch, analysis(40, mode="lowrank", principal_alignment=0.43)) == []
    assert not watch.layers["fc"].is_critical


def test_all_optimal_conditions_are_critical_only_where_a_switch_can_still_come(watch):
    text = "all optimal conditions met (3 of 3): "
    assert said(watch, analysis(20, **OPTIMAL)) == [("CRITICAL", f"{text}switch imminent")]
    assert said(watch, analysis(40, to="lowrank", to_rank=8, **OPTIMAL)) == [
        ("CRITICAL", f"{text}switching to low-rank mode"),
        ("INFO", "full mode -> low-rank mode, rank 10 -> 8: the reason of the policy"),
    ]
    assert said(watch, analysis(60, mode="lowrank", rank=8, **OPTIMAL)) == []


@pytest.mark.parametrize(
    ("value", "level"),
    [(0.3599, None), (0.3601, "WARNING"), (0.4, "WARNING"), (0.4001, "CRITICAL")],
)
def test_danger_is_near_less_than_the_margin_below_the_threshold(watch, value, level):
    levels = [level for level, _ in said(watch, analysis(principal_alignment=value))]
    assert levels == ([] if level is None else [level])


def test_the_warning_of_danger_names_measure_and_threshold(watch):
    assert said(watch, analysis(principal_alignment=0.38)) == [
        ("WARNING", "less than 10 % from danger: principal_alignment 0.38 (danger above 0.4)")
    ]
    assert said(watch, analysis(40, mode="lowrank", principal_alignment=0.38)) == []


def test_optimal_conditions_warn_when_one_is_met_and_another_one_is_near(watch):
    assert said(watch, analysis(20, subspace_angle=0.05)) == []
    assert said(watch, analysis(40, minor_alignment=0.58)) == []
    assert said(watch, analysis(60, subspace_angle=0.05, minor_alignment=0.58)) == [
        (
            "WARNING",
            "1 of 3 optimal conditions met, less than 10 % away: minor_alignment 0.58 (wanted above"
            " 0.6)",
        )
    ]


def test_without_a_margin_nothing_is_near():
    watch = ModeWatch(warn_margin=0)
    watch.update(settings())
    assert said(watch, analysis(principal_alignment=0.4, subspace_angle=0.05)) == []


def course(measure, values, steps=None, **changes):
    steps = range(20, 20 * len(values) + 1, 20) if steps is None else steps
    pairs = zip(steps, values, strict=True)
    return [analysis(step, **{measure: value}, **changes) for step, value in pairs]


def test_a_trend_is_told_in_optimizer_steps_however_unequal_the_intervals_are(watch):
    # 0.12 in 400 steps, and 0.08 to go; the original told the number of analyses as one of steps.
    values, steps = [0.2, 0.21, 0.22, 0.29, 0.32], [100, 120, 200, 300, 500]
    assert said(watch, *course("principal_alignment", values, steps=steps)) == [
        ("INFO", "principal_alignment 0.32 is rising, danger above 0.4 in about 267 step(s)")
    ]


def test_trends_end_at_the_threshold_of_the_right_side(watch):
    events = course("subspace_angle", [0.9, 0.8, 0.7, 0.6, 0.5])
    assert said(watch, *events) == [
        ("INFO", "subspace_angle 0.5 is falling, optimal below 0.1 in about 80 step(s)")
    ]
    assert said(watch, analysis(120, subspace_angle=0.55)) == []


def test_release_is_what_low_rank_mode_trends_to(watch):
    events = course("intent_lift", [3.0, 2.8, 2.6, 2.4, 2.2], mode="lowrank")
    assert said(watch, *events) == [
        ("INFO", "intent_lift 2.2 is falling, release below 1.2 in about 100 step(s)")
    ]
    assert said(ModeWatch(), settings(), *course("intent_lift", [3.0, 2.8, 2.6, 2.4, 2.2])) == []


@pytest.mark.parametrize(
    "values",
    [
        [0.2, 0.21, 0.21, 0.22, 0.23],
        [0.24, 0.23, 0.22, 0.21, 0.2],
        [0.2, 0.21, None, 0.22, 0.23],
        [0.2, 0.2001, 0.2002, 0.2003, 0.2004],
    ],
    ids=["a pause", "away", "a gap", "too far ahead"],
)
def test_no_trend(watch, values):
    assert said(watch, *course("principal_alignment", values)) == []


def test_a_trend_does_not_reach_across_a_switch(watch):
    values = [0.2, 0.21, 0.22, 0.23, 0.24]
    *before, last = course("principal_alignment", values, mode="lowrank")
    assert said(watch, *before, analysis(last.step, principal_alignment=0.24)) == []


def test_the_trend_is_shown_up_to_the_reach_of_the_history():
    events = course("principal_alignment", [0.2, 0.21, 0.22, 0.23, 0.24])  # 320 steps to go
    for every_n_steps, num_alerts in [(15, 0), (17, 1)]:
        watch = ModeWatch(history_size=20)
        assert len(said(watch, settings(every_n_steps=every_n_steps), *events)) == num_alerts


def test_switches_and_changes_of_rank_are_told_with_their_reason(watch):
    assert said(
        watch,
        analysis(20, to="lowrank"),
        analysis(40, mode="lowrank", to_rank=8),
        analysis(60, mode="lowrank", rank=9),  # chosen before it measured
        analysis(80, mode="lowrank", rank=9, to="full"),
    ) == [
        ("INFO", "full mode -> low-rank mode, rank 10: the reason of the policy"),
        ("INFO", "rank 10 -> 8: the reason of the policy"),
        ("INFO", "rank 8 -> 9: the reason of the policy"),
        ("INFO", "low-rank mode -> full mode, rank 9: the reason of the policy"),
    ]
    assert watch.layers["fc"].num_switches == 2


def test_a_skipped_analysis_warns_with_its_reason_in_one_line(watch):
    event = SkippedAnalysis(step=20, layer="fc", reason="the gradient\nhas a NaN.")
    assert said(watch, event) == [("WARNING", "analysis skipped: the gradient has a NaN")]
    assert watch.layers["fc"].num_skipped == 1
    assert watch.layers["fc"].latest is None


def test_an_event_is_told_once(watch):
    event = analysis(to="lowrank", principal_alignment=0.5)
    alerts = watch.update(event)
    assert [(a.layer, a.step, a.kind) for a in alerts] == [
        ("fc", 20, AlertKind.DANGER),
        ("fc", 20, AlertKind.SWITCH),
    ]
    assert watch.update(event) == []
    assert watch.layers["fc"].num_switches == 1


def test_layers_are_apart(watch):
    events = course("principal_alignment", [0.2, 0.21, 0.22, 0.23, 0.24])
    others = course("intent_lift", [3.0] * 5, layer="other")
    pairs = zip(events, others, strict=True)
    alerts = [alert for pair in pairs for event in pair for alert in watch.update(event)]
    assert [(alert.layer, alert.kind) for alert in alerts] == [("fc", AlertKind.TREND)]


def test_thresholds_are_those_of_the_latest_settings(watch):
    event = analysis(40, principal_alignment=0.3)
    assert said(watch, analysis(20, principal_alignment=0.3)) == []
    relaxed = Condition("principal_alignment", "danger", above=True, threshold=0.25)
    assert [level for level, _ in said(watch, settings(relaxed, step=20), event)] == ["CRITICAL"]


def test_without_settings_switches_are_told_and_nothing_is_compared():
    watch = ModeWatch()
    assert [text for _, text in said(watch, analysis(to="lowrank", principal_alignment=0.9))] == [
        "full mode -> low-rank mode, rank 10: the reason of the policy"
    ]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_was_not_measured_meets_and_approaches_nothing(watch, value):
    assert said(watch, *course("principal_alignment", [value] * 5)) == []
    missing = dict.fromkeys(QUIET, value)
    assert said(watch, analysis(200, **missing)) == []
    assert distance_to_danger(watch.layers["fc"]) is None


VALUES = st.none() | st.floats() | st.sampled_from([0.1, 0.4, 0.5, 0.6])
EVENTS = st.lists(
    st.builds(
        lambda step, mode, to, rank, measures: LayerAnalysis(
            step=step, layer="fc", mode=mode, rank=rank, num_principal=3, next_mode=to,
            next_rank=rank + 1, verdict="", loss=None, measures=measures,
        ),
        st.integers(0, 60), *[st.sampled_from(["full", "lowrank"])] * 2, st.integers(1, 3),
        st.dictionaries(st.sampled_from(list(QUIET)), VALUES),
    )
    | st.builds(SkippedAnalysis, step=st.integers(0, 60), layer=st.just("fc"), reason=st.text()),
    max_size=30,
)  # fmt: skip


@given(EVENTS)
def test_whatever_was_measured_no_alert_comes_twice_and_the_document_is_strict_json(events):
    watch = ModeWatch()
    alerts = [alert for event in [settings(), *events] for alert in watch.update(event)]
    keys = [(alert.layer, alert.step, alert.kind) for alert in alerts]
    assert len(set(keys)) == len(keys)
    assert not any(re.search(r"\b(nan|inf|None)\b", a.text) for a in alerts)
    json.dumps(mode_document(watch, alerts), allow_nan=False)
    Console(file=io.StringIO()).print(mode_table(watch), measures_table(watch))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"warn_margin": -0.1}, r"`warn_margin` must be finite and >= 0, got -0\.1\."),
        ({"warn_margin": math.nan}, r"`warn_margin` must be finite and >= 0, got nan\."),
        ({"history_size": 4}, r"`history_size` must be >= 5, got 4\."),
    ],
)
def test_a_setting_out_of_its_range_is_refused(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModeWatch(**setting)
