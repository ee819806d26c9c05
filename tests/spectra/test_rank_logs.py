"""Logs of the scripts that this library was modelled on: read from hand-made lines."""

import json
import math
from collections import Counter
from itertools import pairwise

import pytest

from spectral_lightning.spectra import RankChange, RankPoint, RankSpread, read_rank_log

V10_FINAL = {  # whose means are 11.2, 11.2, 14.5, 22.8, 16.0, 24.0, those of the script's run
    "q": (9, 9, 10, 10, 13, 16),
    "k": (9, 10, 10, 10, 14, 14),
    "v": (9, 10, 14, 16, 18, 20),
    "o": (17, 20, 22, 23, 23, 32),
    "ffn_up": (10, 13, 16, 17, 19, 21),
    "ffn_down": (18, 22, 24, 25, 27, 28),
}


def v10_rows(num_epochs=30):
    rows = []
    for epoch in range(1, num_epochs + 1):
        final = [V10_FINAL[part][block] for block in range(6) for part in V10_FINAL]
        ranks = [max(rank, 64 - 4 * epoch) for rank in final]
        rows.append(
            {
                "epoch": epoch,
                "train_loss": 7.0 / epoch,
                "val_loss": 8.0 / epoch,
                "rank_min": min(ranks),
                "rank_max": max(ranks),
                "rank_avg": sum(ranks) / 36,
                "ranks": ranks,
                "params_millions": 37.792253,
                "time_sec": 40.2,
            }
        )
    return rows


def v18_change(layer, old, new, clobbered=None):
    step = float(new - old) if clobbered is None else clobbered
    return {
        "type": "rank_change",
        "layer": layer,
        "old_rank": old,
        "new_rank": new,
        "stable_rank": 9.5,
        "fro2": 3.0,
        "sigma2": 0.3,
        "raw_target": 14.25,
        "ema_target": 50.0,
        "delta": -14.0,
        "step": step,
    }


def v18_update(step, changed, total=36):
    numbers = {"changed_layers": changed, "total_layers": total}
    return {"type": "rank_update", "step": step, **numbers, "resize_method": "svd", "took_sec": 1.0}


def v18_step(step, loss=2.0):
    spread = {"r_min": 36, "r_mean": 39.3, "r_max": 50}
    return {"type": "train_step", "step": step, "epoch": 0, "lr": 3e-4, "loss": loss, **spread}


V18_START = {
    "type": "run_start",
    "args": {"init_rank": 64, "min_rank": 8, "change_threshold": 2.0},
    "vocab_size": 284,
}


@pytest.fixture
def read(tmp_path):
    """Read rows, or lines, as a log."""

    def reader(*rows, end=""):
        path = tmp_path / "log.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines) + end)
        return read_rank_log(path)

    return reader


def last_ranks(history):
    return {layer: points[-1].rank for layer, points in history.ranks.items()}


def test_v10_has_36_ranks_in_each_of_30_epochs(read):
    history = read(*v10_rows())
    assert (history.source, history.unit, history.loss_unit) == ("v10", "epoch", "epoch")
    assert len(history.ranks) == 36
    assert all([p.at for p in points] == [*range(1, 31)] for points in history.ranks.values())
    assert history.train_losses[30] == pytest.approx(7 / 30)
    assert history.val_losses[30] == pytest.approx(8 / 30)
    assert history.spread[30] == RankSpread(9, pytest.approx(16.6, abs=0.05), 32)
    assert history.notes == []


def test_v10_ranks_are_named_block_by_block(read):
    history = read(*v10_rows())
    assert list(history.ranks)[:7] == [
        *("blocks.0.q", "blocks.0.k", "blocks.0.v", "blocks.0.o"),
        *("blocks.0.ffn_up", "blocks.0.ffn_down", "blocks.1.q"),
    ]
    final = last_ranks(history)
    found = {
        part: tuple(final[f"blocks.{block}.{part}"] for block in range(6)) for part in V10_FINAL
    }
    assert found == V10_FINAL


def test_v10_changes_are_the_differences_of_its_lists(read):
    history = read(*v10_rows())
    assert history.changes[0] == RankChange(2, "blocks.0.q", 60, 56, -4.0)
    steps = [b.rank - a.rank for points in history.ranks.values() for a, b in pairwise(points)]
    assert Counter(c.change for c in history.changes) == Counter(filter(None, steps))


def test_v10_with_ranks_that_are_not_six_per_block_is_refused(read):
    with pytest.raises(ValueError, match="must list 6 ranks for each block, got 7 in epoch 3"):
        read({"epoch": 3, "ranks": [8] * 7})


@pytest.mark.parametrize("script", ["v13", "v14"])
def test_v13_and_v14_have_the_spread_at_each_global_step(read, script):
    row = {"epoch": 2, "global_step": 400, "train_loss": 2.5, "val_loss": 2.25}
    row |= {"rank_min": 32, "rank_avg": 33.4, "rank_max": 39}
    heads = {"heads_min": 2, "heads_avg": 3.5, "heads_max": 4}
    history = read(row | heads if script == "v14" else row)
    assert (history.source, history.unit) == (script, "step")
    assert history.spread == {400: RankSpread(32, 33.4, 39)}
    assert (history.train_losses, history.val_losses) == ({400: 2.5}, {400: 2.25})
    assert not history.ranks
    assert history.notes == [f"{script} logs the ranks over all layers, not those of each."]


@pytest.mark.parametrize("is_ahead", [True, False])
def test_v8_takes_the_epoch_of_a_change_from_the_adjustment_beside_it(read, is_ahead):
    def adjusted(epoch, old):
        update = {"type": "rank_update", "layer": "fc", "old_rank": old, "new_rank": old - 4}
        update |= {"target_rank": 20, "energy_target": 0.95, "time": 0.1}
        mark = {"type": "rank_adjustment_epoch", "epoch": epoch}
        return [mark, update] if is_ahead else [update, mark]

    def summary(epoch, rank):
        spread = {"r_min": rank, "r_avg": rank, "r_max": rank}
        return {"type": "epoch_summary", "epoch": epoch, "val_loss": 3.5, **spread}

    history = read(summary(1, 64), *adjusted(4, 64), summary(4, 60), *adjusted(7, 60))
    assert (history.source, history.unit) == ("v8", "epoch")
    assert history.ranks == {
        "fc": [RankPoint(1, 64), RankPoint(4, 60, target=20), RankPoint(7, 56, target=20)]
    }
    assert history.spread[4].mean == 60


def test_v9_takes_the_epoch_of_a_change_from_the_line_before_and_says_so(read):
    change = {"layer": "fc", "shape": [8, 8], "old_rank": 64, "new_rank": 60}
    change |= {"spectral_target": 55, "energy_captured": 0.98, "loss_trend": 0}
    epochs = [{"epoch": e, "train_loss": 3.0, "val_loss": 3.0, "loss_trend": 1} for e in (5, 6, 7)]
    history = read(*epochs[:2], change, epochs[2])
    assert history.source == "v9"
    assert history.ranks == {"fc": [RankPoint(5, 64), RankPoint(6, 60, target=55)]}
    assert history.val_losses == {5: 3.0, 6: 3.0, 7: 3.0}
    assert "the epoch of the line before" in history.notes[0]


def test_v15_has_ranks_by_step_and_losses_by_epoch(read):
    update = {"type": "rank_update", "step": 500, "layer": "block0.q_proj", "old_rank": 64}
    update |= {"new_rank": 56, "spectral_rank": 30, "tail_energy": 0.01, "svd_interval": 500}
    held = update | {"step": 1000, "old_rank": 56}
    history = read(update, {"type": "epoch", "epoch": 1, "val_loss": 5.0}, held)
    assert (history.source, history.unit, history.loss_unit) == ("v15", "step", "epoch")
    assert history.ranks["block0.q_proj"] == [
        RankPoint(0, 64),
        RankPoint(500, 56, target=30),
        RankPoint(1000, 56, target=30),
    ]
    assert history.changes == [RankChange(500, "block0.q_proj", 64, 56, -8.0)]
    assert history.val_losses == {1: 5.0}


@pytest.mark.parametrize("is_ahead", [True, False])
def test_v18_step_of_a_change_is_the_change_and_its_time_is_that_of_the_update(read, is_ahead):
    def update(step, *changes):
        mark = v18_update(step, len(changes))
        return [mark, *changes] if is_ahead else [*changes, mark]

    history = read(
        V18_START,
        v18_step(0),
        *update(1184),
        v18_step(1200),
        *update(2368, v18_change("h.0.q", 64, 60), v18_change("h.0.k", 64, 61, -4.0)),
        *update(3552, v18_change("h.0.q", 60, 58)),
        v18_step(3600),
        {"type": "eval", "step": 3600, "val_loss": 1.5, "val_ppl": 4.48},
    )
    assert (history.source, history.unit) == ("v18", "step")
    assert history.changes == [
        RankChange(2368, "h.0.q", 64, 60, -4.0),
        RankChange(2368, "h.0.k", 64, 61, -4.0),
        RankChange(3552, "h.0.q", 60, 58, -2.0),
    ]
    assert history.ranks["h.0.q"][0] == RankPoint(0, 64)
    assert history.ranks["h.0.q"][-1] == RankPoint(3552, 58, target=14.25)
    assert history.train_losses == {0: 2.0, 1200: 2.0, 3600: 2.0}
    assert history.val_losses == {3600: 1.5}
    assert history.floor == 10.0


def test_v18_has_all_229_changes(read):
    rows = [V18_START, v18_step(0)]
    ranks = {f"h.{i // 6}.{'qkvoud'[i % 6]}": 64 for i in range(36)}
    for number in range(1, 8):
        layers = list(ranks)[: 229 - 36 * (number - 1)]
        for layer in layers:
            rows.append(v18_change(layer, ranks[layer], ranks[layer] - 4))
            ranks[layer] -= 4
        rows += [v18_update(1184 * number, len(layers)), v18_step(1184 * number + 16)]
    history = read(*rows)
    assert len(history.changes) == 229
    assert {change.change for change in history.changes} == {-4.0}
    assert {change.at for change in history.changes} == {1184 * number for number in range(1, 8)}
    assert last_ranks(history) == ranks


def test_v18_changes_of_a_run_killed_in_an_update_have_the_last_steps_time(read):
    history = read(V18_START, v18_step(1150), v18_change("h.0.q", 64, 60))
    assert history.changes == [RankChange(1150, "h.0.q", 64, 60, -4.0)]


def test_v18_resumed_in_its_log_keeps_the_later_ranks(read):
    def update(step, old, new):
        return [v18_change("h.0.q", old, new), v18_update(step, 1)]

    history = read(V18_START, *update(10, 64, 60), *update(20, 60, 56), *update(20, 60, 58))
    assert [point[:2] for point in history.ranks["h.0.q"]] == [
        (10, 64),
        (10, 60),
        (20, 56),
        (20, 58),
    ]
    history = read(V18_START, *update(10, 64, 60), *update(30, 60, 56), *update(20, 60, 58))
    assert [point[:2] for point in history.ranks["h.0.q"]] == [(10, 64), (10, 60), (20, 58)]


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_last_line_that_is_cut_off_is_left_out_and_said(read, cut):
    rows = v10_rows(3)
    history = read(*rows[:2], end=json.dumps(rows[2])[:cut])
    assert max(history.train_losses) == 2
    assert history.notes == ["Line 3, the last, is cut off and was left out."]


def test_a_last_line_without_line_break_that_is_whole_counts(read):
    rows = v10_rows(3)
    history = read(*rows[:2], end=json.dumps(rows[2]))
    assert max(history.train_losses) == 3
    assert not history.notes


@pytest.mark.parametrize("line", ['{"epoch": 2, "ran', "[1, 2]"])
def test_a_broken_line_before_the_last_is_refused(read, line):
    rows = v10_rows(2)
    with pytest.raises(ValueError, match="one JSON object per line, but its line 2 is none"):
        read(rows[0], line, rows[1])


@pytest.mark.parametrize("rows", [[], [{"loss": 1.0}], [{"type": "sample", "text": "a"}]])
def test_a_file_of_none_of_the_scripts_is_refused(read, rows):
    with pytest.raises(ValueError, match="must be a log of v8, v9, v10, v13, v14, v15 or v18"):
        read(*rows)


def test_losses_that_are_not_finite_are_left_out(read):
    row = v10_rows(1)[0] | {"train_loss": math.nan, "val_loss": None}
    history = read(row)
    assert not history.train_losses
    assert not history.val_losses
