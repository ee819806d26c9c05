"""A run of ours in the log formats of the scripts that this library was modelled on."""

import json
import math
from dataclasses import replace

import pytest

from spectral_lightning.spectra import (
    EpochLosses,
    LayerSize,
    RankCheck,
    RankHistory,
    RankSettings,
    RankSummary,
    SkippedCheck,
    rank_log_lines,
    read_rank_log,
)

FINAL = {  # whose means are 11.2, 11.2, 14.5, 22.8, 16.0, 24.0, those of v10's run
    "q": (9, 9, 10, 10, 13, 16),
    "k": (9, 10, 10, 10, 14, 14),
    "v": (9, 10, 14, 16, 18, 20),
    "o": (17, 20, 22, 23, 23, 32),
    "ffn_up": (10, 13, 16, 17, 19, 21),
    "ffn_down": (18, 22, 24, 25, 27, 28),
}
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
EPOCHS = [EpochLosses(1, 20, 2.5, 2.25, 1.5), EpochLosses(2, 60, 2.0, None, 1.5)]
OTHER = 1000
COUNTS = [12 * 48 + 24 * 96 + OTHER, 10 * 48 + 24 * 96 + OTHER]


def rows_of(script, events=EVENTS, epochs=EPOCHS, **arguments):
    lines = rank_log_lines(events, script, epochs, **arguments)
    assert all(line.endswith("\n") for line in lines)
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def of_type(rows, kind):
    return [row for row in rows if row["type"] == kind]


def test_v10_lines_have_the_true_number_of_parameters_of_their_epoch():
    rows = rows_of("v10")
    assert [row["params_millions"] for row in rows] == [count / 1e6 for count in COUNTS]
    assert rows[0] == {
        "epoch": 1,
        "train_loss": 2.5,
        "val_loss": 2.25,
        "rank_min": 12,
        "rank_max": 24,
        "rank_avg": 18.0,
        "ranks": [12, 24],
        "params_millions": COUNTS[0] / 1e6,
        "time_sec": 1.5,
    }
    assert rows[1]["ranks"] == [10, 24]


def test_v10_lines_of_its_configuration_count_as_in_its_accounts():
    """37,792,253 parameters at rank 64, of which 3,538,944 are those of factors."""
    shapes = {"q": (512, 512), "k": (512, 512), "v": (512, 512), "o": (512, 512)}
    shapes |= {"ffn_up": (2048, 512), "ffn_down": (512, 2048)}
    sizes = {
        f"blocks.{block}.{part}": LayerSize(shape, 64, 64)
        for block in range(6)
        for part, shape in shapes.items()
    }
    events = [replace(SETTINGS, layers=sizes)]
    for block in range(6):
        for part, ranks in FINAL.items():
            events.append(check(6000, f"blocks.{block}.{part}", 64, ranks[block]))
    other = 37_792_253 - 3_538_944
    rows = rows_of("v10", events, [EpochLosses(0, 0), EpochLosses(30, 6000)], num_other=other)
    assert rows[0]["params_millions"] == 37.792253
    # The run's 980,992 of factors come from ranks of which only the means are known.
    assert rows[1]["params_millions"] == pytest.approx((other + 980_992) / 1e6, abs=0.005)
    assert rows[1]["rank_avg"] == pytest.approx(16.6, abs=0.05)


def test_number_of_other_parameters_may_be_given():
    rows = rows_of("v10", EVENTS[:-1], num_other=OTHER)
    assert [row["params_millions"] for row in rows] == [count / 1e6 for count in COUNTS]


@pytest.mark.parametrize("events", [EVENTS[:-1], EVENTS[1:]])
def test_v10_lines_need_a_number_of_parameters(events):
    with pytest.raises(ValueError, match="`num_other` must be given for v10 unless"):
        rows_of("v10", events)


def test_v13_lines_have_the_spread_of_ranks_at_the_epochs_step():
    rows = rows_of("v13")
    keys = ["epoch", "global_step", "train_loss", "val_loss", "rank_min", "rank_avg", "rank_max"]
    assert list(rows[0]) == [*keys, "epoch_time_sec"]
    assert [list(row.values())[4:7] for row in rows] == [[12, 18.0, 24], [10, 17.0, 24]]


def test_v15_lines_are_updates_and_epochs_in_the_order_of_steps():
    rows = rows_of("v15")
    assert [row["type"] for row in rows] == ["rank_update", "epoch", "rank_update", "epoch"]
    assert rows[0] | {"tail_energy": 0.25} == {
        "type": "rank_update",
        "step": 20,
        "layer": "b.0.q",
        "old_rank": 16,
        "new_rank": 12,
        "spectral_rank": 9.5,
        "tail_energy": 0.25,
        "svd_interval": 20,
        "svals_len": 16,
    }
    assert [row["tail_energy"] for row in of_type(rows, "rank_update")] == [None, 0.25]


def test_v18_lines_keep_the_step_of_a_change():
    rows = rows_of("v18")
    kinds = ["run_start", "train_step", "rank_change", "rank_update", "eval"]
    assert [row["type"] for row in rows[:5]] == kinds
    changes = of_type(rows, "rank_change")
    assert [(row["step"], row["change"]) for row in changes] == [(20, -4), (40, -2)]
    assert changes[0] | {"stable_rank": 6.0} == {
        "type": "rank_change",
        "step": 20,
        "layer": "b.0.q",
        "old_rank": 16,
        "new_rank": 12,
        "change": -4,
        "stable_rank": 6.0,
        "raw_target": 9.5,
        "delta": -6.5,
    }


def test_v18_lines_tell_settings_losses_updates_and_the_end():
    rows = rows_of("v18")
    (start,) = of_type(rows, "run_start")
    assert start["args"]["controller"] == "StableRankController"
    assert start["args"]["limit"] is None
    assert start["rank_stats"] == {"r_min": 16, "r_mean": 20.0, "r_max": 24}
    train = of_type(rows, "train_step")
    assert [(row["step"], row["loss"]) for row in train] == [(20, 2.0), (40, None)]
    assert train[0]["ppl"] == pytest.approx(math.exp(2.0))
    updates = of_type(rows, "rank_update")
    assert [(row["changed_layers"], row["took_sec"]) for row in updates] == [(1, 0.005), (1, None)]
    assert {(row["total_layers"], row["resize_method"]) for row in updates} == {
        (2, "fade, moments: carry")
    }
    (found,) = of_type(rows, "eval")
    assert (found["step"], found["val_ppl"]) == (20, pytest.approx(math.exp(2.25)))
    assert rows[-1] == {"type": "run_end", "step": 60}


def test_a_diverged_loss_has_no_perplexity():
    rows = rows_of("v18", [SETTINGS, check(20, "b.0.q", 16, 16, loss=1e4)])
    assert of_type(rows, "train_step")[0]["ppl"] is None


@pytest.mark.parametrize("script", ["v10", "v13", "v15", "v18"])
def test_written_lines_are_read_as_logs_of_their_script(tmp_path, script):
    path = tmp_path / "log.jsonl"
    sizes = {f"b.0.{name}": LayerSize((32, 16), 16, 16) for name in "qkvoud"}
    events = [replace(SETTINGS, layers=sizes), *(check(20, name, 16, 12) for name in sizes)]
    path.write_text("".join(rank_log_lines(events, script, EPOCHS, num_other=0)))
    history = read_rank_log(path)
    assert history.source == script
    assert history.val_losses == {{"v10": 1}.get(script, 20): 2.25}
    if script == "v10":
        assert set(history.ranks_at(100).values()) == {12}
    if script in ("v15", "v18"):
        assert history.changes == RankHistory.of(events).changes
        assert history.ranks_at(100) == dict.fromkeys(sizes, 12)


def test_unknown_scripts_are_refused():
    with pytest.raises(ValueError, match="`script` must be one of v10, v13, v15, v18, got 'v8'"):
        rank_log_lines(EVENTS, "v8")


def test_events_without_any_rank_are_refused():
    with pytest.raises(ValueError, match="`events` must hold the rank of at least one layer"):
        rank_log_lines(EVENTS[-1:], "v13")
