"""The criteria of the phases that are judged on the events of mode switching."""

import math

import pytest

from spectral_lightning.dashboards import mode_findings
from spectral_lightning.dashboards.mode_findings import ModeHistory
from spectral_lightning.spectra.mode_events import (
    Condition,
    LayerAnalysis,
    ModeSettings,
    SkippedAnalysis,
)

DANGER = Condition("principal_alignment", "danger", True, 0.4)
SANE = {
    "principal_alignment": 0.2,
    "minor_alignment": 0.9,
    "reconstruction_error": 0.5,
    "subspace_angle": 0.1,
}


def settings(step=0, every=20, conditions=(DANGER,)):
    return ModeSettings(
        step=step,
        every_n_steps=every,
        policy="SeedPolicy",
        protection="block",
        conditions=tuple(conditions),
    )


def analysis(step=20, layer="a.attn", mode="full", to=None, rank=8, to_rank=None, **changes):
    """An analysis that keeps mode and rank unless it says otherwise."""
    return LayerAnalysis(
        step=step,
        layer=layer,
        mode=mode,
        rank=rank,
        num_principal=2,
        next_mode=to or mode,
        next_rank=rank if to_rank is None else to_rank,
        verdict=changes.pop("verdict", "continue_current_mode"),
        loss=1.0,
        measures={**SANE, **changes},
    )


def skipped(step=20, layer="a.attn"):
    return SkippedAnalysis(step=step, layer=layer, reason="the gradient is zero")


def history(*events, begin=None):
    return ModeHistory((settings() if begin is None else begin, *events))


def intervals(*events, last=59, begin=None):
    return mode_findings.intervals(history(*events, begin=begin), last)


def test_every_interval_needs_an_analysis_made_or_skipped_of_every_layer():
    complete = [analysis(20), skipped(40), analysis(20, "b"), analysis(40, "b")]
    assert intervals(*complete) == ("all 4 in 2 layers; 1 skipped", True)
    found = intervals(*complete[:-1])
    assert found == ("1 of 4 are missing: b at step 40; 1 skipped", False)


@pytest.mark.parametrize(("last", "passed"), [(59, True), (60, False), (39, True)])
def test_an_interval_counts_once_the_run_has_reached_it(last, passed):
    assert intervals(analysis(20), analysis(40), last=last).passed is passed


def test_a_run_shorter_than_an_interval_is_not_judged():
    found = intervals(analysis(0), last=19)
    assert found == ("the run ended before the first interval", None)


def test_a_layer_may_take_its_turn_later_in_each_interval():
    assert intervals(analysis(27), analysis(47), last=59).passed is True
    assert intervals(analysis(27), analysis(47), last=66).passed is True
    assert intervals(analysis(27), analysis(47), last=67).passed is False


def test_a_first_analysis_that_came_too_late_is_missing():
    found = intervals(analysis(40))
    assert found.value.startswith("1 of 2 are missing: a.attn at step 20")


def test_a_resumed_run_is_judged_by_the_interval_of_each_start():
    events = [analysis(20), settings(40, every=10), analysis(40), analysis(50)]
    assert intervals(*events) == ("all 3 in 1 layer; 0 skipped", True)
    assert intervals(*events[:-1]).passed is False
    assert intervals(*events[:2], analysis(50)).passed is False


def test_a_run_that_goes_on_from_a_checkpoint_has_nothing_due_at_its_first_step():
    begin = settings(40)
    assert intervals(analysis(60), begin=begin, last=79).passed is True
    assert intervals(analysis(40), analysis(60), begin=begin, last=79).passed is True


def test_intervals_without_layers_or_settings():
    assert intervals() == ("no layer was analysed or skipped", False)
    found = mode_findings.intervals(ModeHistory((analysis(20),)), 59)
    assert found == ("the events do not say how long an interval is", None)


def test_switches_are_counted_with_their_layers():
    assert mode_findings.switched(history(analysis())) == ("0 in 0 layers", False)
    events = [analysis(to="lowrank"), analysis(40, mode="lowrank", to="full")]
    assert mode_findings.switched(history(*events)) == ("2 in 1 layer", True)


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"principal_alignment": 1.0, "minor_alignment": 0.0}, True),
        ({"principal_alignment": 1 + 1e-7}, True),  # rounding
        ({"principal_alignment": 1.01}, False),
        ({"minor_alignment": -0.01}, False),
        ({"reconstruction_error": 1.2}, False),
        ({"reconstruction_error": None}, False),
        ({"subspace_angle": math.pi / 2}, True),
        ({"subspace_angle": 1.6}, False),
        ({"subspace_angle": None}, False),
        ({"subspace_angle": math.nan}, False),
        ({"intent_erosion": -30.0, "effect_erosion": None}, True),  # no limits, not always there
    ],
)
def test_sane_measures_are_inside_their_range_and_there(changes, passed):
    found = mode_findings.sane_measures(history(analysis(20), analysis(40, **changes)))
    assert found.passed is passed


def test_the_angle_may_be_missing_at_the_first_of_several_analyses_alone():
    first = analysis(20, subspace_angle=None)
    assert mode_findings.sane_measures(history(first, analysis(40))).passed is True
    found = mode_findings.sane_measures(history(first, analysis(20, "b"), analysis(40, "b")))
    assert found == ("1 missing; outside their range: none", False)


def test_measures_that_nobody_took_are_not_judged():
    bare = LayerAnalysis(**{name: getattr(analysis(), name) for name in analysis().__slots__})
    object.__setattr__(bare, "measures", {"principal_alignment": 0.5})
    found = mode_findings.sane_measures(history(bare))
    assert found.passed is None
    assert found.value == (
        "not among the measures: minor_alignment, reconstruction_error, subspace_angle"
    )
    assert mode_findings.sane_measures(history(skipped())) == ("no layer was analysed", None)


def test_a_layer_that_was_always_skipped_was_not_analysed():
    found = mode_findings.layers_analysed(history(analysis(), skipped(layer="b"), skipped(40, "b")))
    assert found == ("1 of 2; never: b", False)
    assert mode_findings.layers_analysed(history(analysis(), skipped(40))) == ("1 of 1", True)
    assert mode_findings.layers_analysed(history()).passed is False


def test_all_attention_layers_have_to_switch_and_others_need_not():
    events = [analysis(to="lowrank"), analysis(layer="a.mlp"), analysis(layer="self_attention.q")]
    found = mode_findings.attention_switches(history(*events))
    assert found == ("1 of 2; never: self_attention.q", False)
    assert mode_findings.attention_switches(history(*events[:2])) == ("1 of 1", True)
    assert mode_findings.attention_switches(history(events[1])).passed is None


@pytest.mark.parametrize(("alignment", "passed"), [(0.41, True), (0.4, False), (None, None)])
def test_clobbering_is_a_danger_condition_that_is_met(alignment, passed):
    found = mode_findings.clobbering(history(analysis(principal_alignment=alignment)))
    assert found.passed is passed


def test_clobbering_is_also_the_verdict_of_a_policy_without_a_danger_condition():
    begin = settings(conditions=[Condition("effect_lift", "optimal", True, 1.5)])
    calm = analysis(effect_lift=1.0)
    assert mode_findings.clobbering(history(calm, begin=begin)) == ("none", False)
    alarmed = analysis(effect_lift=2.0, verdict="gradient_clobbering_risk")
    found = mode_findings.clobbering(history(calm, alarmed, begin=begin))
    assert found == ("1 in 1 layer", True)


def test_a_policy_that_looks_at_nothing_cannot_detect_clobbering():
    assert (
        mode_findings.clobbering(history(analysis(), begin=settings(conditions=()))).passed is None
    )


def test_clobbering_is_judged_by_the_thresholds_in_force():
    strict = DANGER._replace(threshold=0.1)
    later = settings(40, conditions=[strict])
    events = [analysis(20), later, analysis(40)]
    assert [x.step for x in history(*events).detections] == [40]


def test_the_rank_falls_from_the_first_analysis_to_behind_the_last():
    up_and_down = [analysis(20, rank=8, to_rank=12), analysis(40, rank=12, to_rank=8)]
    assert mode_findings.rank_falls(history(*up_and_down)) == ("0 of 1", False)
    falling = analysis(20, "b", rank=8, to_rank=6)
    found = mode_findings.rank_falls(history(*up_and_down, falling, skipped(layer="c")))
    assert found == ("1 of 2, e.g. b 8 to 6", True)
    assert mode_findings.rank_falls(history(skipped())).passed is None


@pytest.mark.parametrize(("num_falling", "passed"), [(1, False), (2, False), (3, True)])
def test_most_layers_are_more_than_half(num_falling, passed):
    events = [
        analysis(layer=str(number), to_rank=6 if number < num_falling else 8) for number in range(4)
    ]
    assert mode_findings.rank_falls(history(*events), 0.5).passed is passed


def eroding(full, low, change=None):
    """A layer in both modes, with its erosion in each."""
    return history(
        analysis(20, effect_erosion=full, to="lowrank"),
        analysis(40, mode="lowrank", effect_erosion=low, protected_change=change),
    )


@pytest.mark.parametrize(
    ("full", "low", "change", "passed"),
    [
        (4.0, 0.1, 1e-7, True),
        (4.0, 2.0, 1e-7, True),
        (4.0, 2.1, 1e-7, False),
        (4.0, -5.0, None, True),  # growth is no erosion
        (4.0, 0.0, 0.02, False),
        (4.0, 0.0, 0.01, True),
        (-3.0, -3.0, 1e-7, True),  # nothing eroded in full mode: the change alone is judged
        (-3.0, -3.0, 0.02, False),
        (-3.0, -3.0, None, None),
        (0.3, 0.3, None, None),  # no more than chance
        (None, 0.0, None, None),
        (4.0, None, None, None),
        (None, None, 1e-7, True),
    ],
)
def test_prevention_is_a_part_that_stays_and_less_erosion(full, low, change, passed):
    assert mode_findings.prevention(eroding(full, low, change)).passed is passed


def test_prevention_compares_only_layers_that_were_in_both_modes():
    events = eroding(1.0, 0.6).events
    others = [
        analysis(20, "b", effect_erosion=9.0),
        analysis(20, "c", "lowrank", effect_erosion=0.0),
    ]
    found = mode_findings.prevention(ModeHistory((*events, *others)))
    assert found == ("erosion of 0.6 in low-rank mode, 1 in full mode", False)


def test_prevention_needs_an_analysis_in_low_rank_mode():
    found = mode_findings.prevention(history(analysis(protected_change=1e-7)))
    assert found == ("no protected_change or effect_erosion in low-rank mode", None)
