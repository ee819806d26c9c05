"""Ranks over the time of a run, from our events."""

import math
from dataclasses import replace

import pytest

from spectral_lightning.spectra import (
    LayerSize,
    RankChange,
    RankCheck,
    RankEventWriter,
    RankHistory,
    RankPoint,
    RankSettings,
    RankSummary,
    SkippedCheck,
    read_rank_log,
)
from spectral_lightning.spectra.rank_history import controller_floor

SETTINGS = RankSettings(
    step=0,
    every_n_steps=20,
    controller="StableRankController",
    settings={"change_threshold": 2.0, "clock": {"rank_min": 8}, "limit": math.inf},
    resize="fade, moments: carry",
    layers={"b.0.q": LayerSize((32, 16), 16, 16), "b.0.up": LayerSize((64, 32), 24, 24)},
)


def check(step, layer, rank, next_rank, **changes):
    verdict = "settled"
    return RankCheck(
        step=step, layer=layer, rank=rank, next_rank=next_rank, verdict=verdict, **changes
    )


EVENTS = [
    SETTINGS,
    check(20, "b.0.q", 16, 12, target=9.5, null_target=9.0, loss=2.0, milliseconds=2.0),
    check(20, "b.0.up", 24, 24, target=30.0, null_target=12.0, loss=2.0, milliseconds=3.0),
    check(40, "b.0.q", 12, 10, energy_kept=0.75, stable_rank=6.0, loss=math.nan),
    SkippedCheck(step=40, layer="b.0.up", reason="the factors are not finite"),
    RankSummary(step=60, num_stored=2000, num_active=1900, num_dense=2560, num_other=1000),
]


def test_events_become_a_history():
    history = RankHistory.of(EVENTS)
    assert history.ranks["b.0.q"] == [
        RankPoint(0, 16),
        RankPoint(20, 12, 9.5, 9.0),
        RankPoint(40, 10),
    ]
    assert history.changes == [
        RankChange(20, "b.0.q", 16, 12, -4.0),
        RankChange(40, "b.0.q", 12, 10, -2.0),
    ]
    assert history.train_losses == {20: 2.0}
    assert history.floor == 10.0
    assert history.begins == [0]
    assert history.summary == EVENTS[-1]
    assert history.notes == ["1 check was skipped, of b.0.up."]


def test_ranks_at_a_time_are_those_of_the_last_point_before():
    history = RankHistory.of(EVENTS)
    found = [history.ranks_at(at)["b.0.q"] for at in (-5, 0, 19, 20, 39, 40, 1000)]
    assert found == [16, 16, 16, 12, 12, 10, 10]


def test_a_resumed_run_keeps_the_rank_that_was_decided_while_it_fades_in():
    layers = SETTINGS.layers | {"b.1.q": LayerSize((32, 16), 16, 4)}
    history = RankHistory.of([*EVENTS[:2], replace(SETTINGS, step=30, layers=layers)])
    assert [point.rank for point in history.ranks["b.0.q"]] == [16, 12]
    assert history.ranks["b.1.q"] == [RankPoint(30, 4)]
    assert history.begins == [0, 30]


@pytest.mark.parametrize(
    ("settings", "floor"),
    [
        ({}, None),
        ({"rank_min": 8}, 8.0),
        ({"min_rank": 8, "change_threshold": 2.0}, 10.0),
        ({"clock": {"rank_min": 4}, "change_threshold": 0.5}, 4.5),
        ({"clock": None, "change_threshold": 0.5}, None),
    ],
)
def test_floor_is_the_smallest_rank_and_the_dead_band(settings, floor):
    assert controller_floor(settings) == floor


def test_our_events_are_read_as_a_history_too(tmp_path):
    path = tmp_path / "rank_events.jsonl"
    events = [replace(SETTINGS, settings={"rank_min": 8}), *EVENTS[1:3]]
    RankEventWriter(path).append(*events)
    assert read_rank_log(path) == RankHistory.of(events)
    with path.open("a") as file:
        file.write('{"event": "check", "st')
    assert read_rank_log(path).notes == ["Line 4, the last, is cut off and was left out."]


def test_active_entries_are_those_of_factors_at_their_rank():
    history = RankHistory.of(EVENTS)
    found = [history.num_active(at) for at in (0, 20, 60)]
    assert found == [16 * 48 + 24 * 96, 12 * 48 + 24 * 96, 10 * 48 + 24 * 96]
    assert RankHistory.of(EVENTS[1:]).num_active(20) is None
