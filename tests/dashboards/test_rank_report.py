"""What is said of the ranks that layers came to."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from spectral_lightning.dashboards.rank_report import (
    projection_type,
    rank_document,
    rank_table,
    rank_types,
)
from spectral_lightning.linalg import product_singular_values
from spectral_lightning.spectra import (
    LayerSize,
    RankCheck,
    RankHistory,
    RankSettings,
    RankSummary,
    SkippedCheck,
    null_product_values,
    read_rank_log,
)

V10_FINAL = {  # whose means are 11.2, 11.2, 14.5, 22.8, 16.0, 24.0, those of the script's run
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
    settings={"change_threshold": 2.0, "clock": {"rank_min": 8}},
    resize="svd",
    layers={
        "b.0.q": LayerSize((32, 16), 16, 16),
        "b.1.q": LayerSize((32, 16), 16, 16),
        "b.0.up": LayerSize((64, 32), 32, 32),
    },
)


def check(layer, rank, target=None, null_target=None, step=20):
    return RankCheck(
        step=step,
        layer=layer,
        rank=SETTINGS.layers[layer].rank,
        next_rank=rank,
        verdict="settled",
        target=target,
        null_target=null_target,
    )


EVENTS = [
    SETTINGS,
    check("b.0.q", 10, 9.0, 12.0),
    check("b.1.q", 12, 11.0, 13.0),
    check("b.0.up", 24, 20.0, 19.0),
    check("b.1.q", 11, step=40),
]
SUMMARY = RankSummary(step=40, num_stored=0, num_active=0, num_dense=0, num_other=12345)


@pytest.fixture(scope="module")
def v10(tmp_path_factory):
    """A log of v10 with the means of the script's own run."""
    path = tmp_path_factory.mktemp("logs") / "v10.jsonl"
    with path.open("w") as file:
        for epoch in range(1, 31):
            ranks = [V10_FINAL[part][block] for block in range(6) for part in V10_FINAL]
            ranks = [max(rank, 64 - 4 * epoch) for rank in ranks]
            row = {"epoch": epoch, "train_loss": 2.0, "val_loss": 2.0, "ranks": ranks}
            file.write(json.dumps(row) + "\n")
    return read_rank_log(path)


def printed(table, width=80):
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(table)
    return file.getvalue()


def words(table):
    return " ".join(printed(table).split())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks.0.attn.q_proj", "q_proj"),
        ("transformer.h.11.attn.c_q", "c_q"),
        ("net.0", "net.0"),
        ("up", "up"),
        ("blocks.3.ff.0.1", "ff.0.1"),
        ("3", "3"),
    ],
)
def test_type_is_the_last_part_of_a_name(name, kind):
    assert projection_type(name) == kind


def test_v10_log_has_its_means_and_11_of_36_layers_at_the_floor(v10):
    types = rank_types(v10, floor=10)
    means = {found.type: round(found.mean, 1) for found in types}
    assert means == {"q": 11.2, "k": 11.2, "v": 14.5, "o": 22.8, "ffn_up": 16.0, "ffn_down": 24.0}
    assert [len(found.layers) for found in types] == [6] * 6
    assert sum(len(found.at_floor) for found in types) == 11
    text = words(rank_table(v10, floor=10))
    assert "11 of 36 layers are at the controller's floor (rank <= 10): that says something" in text
    assert "about the controller, not about the layer." in text
    assert "all 36 16.6 9 32 - - - 11" in text
    assert "Ranks at epoch 30" in text


def test_v10_log_does_not_tell_its_floor(v10):
    assert all(found.at_floor == () for found in rank_types(v10))
    text = words(rank_table(v10))
    assert "The controller's smallest rank is not known, so no floor is flagged." in text
    assert "all 36 16.6 9 32 - - - -" in text


def test_types_are_summed_up_over_blocks():
    query, up = rank_types(RankHistory.of(EVENTS))
    assert (query.type, query.layers) == ("q", ("b.0.q", "b.1.q"))
    assert (query.mean, query.lowest, query.highest) == (10.5, 10, 11)
    assert query.share == pytest.approx((10 / 16 + 11 / 16) / 2)
    assert (query.target, query.null_target) == (10.0, 12.5)
    assert query.at_floor == ("b.0.q",)
    assert (up.mean, up.share, up.at_floor) == (24.0, 0.75, ())


def test_table_has_a_row_per_type_and_one_for_all():
    rows = [line.split() for line in printed(rank_table(RankHistory.of(EVENTS))).splitlines()]
    assert ["q", "2", "10.5", "10", "11", "66%", "10", "12.5", "1"] in rows
    assert ["up", "1", "24.0", "24", "24", "75%", "20", "19", "0"] in rows
    assert ["all", "3", "15.0", "10", "24", "69%", "13.3", "14.7", "1"] in rows


def test_one_type_needs_no_row_for_all():
    history = RankHistory.of([check("b.0.q", 10), check("b.1.q", 12)])
    rows = [line.split()[:2] for line in printed(rank_table(history)).splitlines() if line.split()]
    assert ["q", "2"] in rows
    assert ["all", "2"] not in rows


def test_targets_like_those_of_random_factors_are_named():
    query, up = rank_types(RankHistory.of(EVENTS))
    assert not query.is_like_random
    assert up.is_like_random
    text = words(rank_table(RankHistory.of(EVENTS)))
    assert "Target within 10% of the null target, so that by itself it says nothing of" in text
    assert "what was learned: up." in text


def test_an_untrained_model_is_said_to_have_targets_like_random_factors():
    """v10's rule, 1.5 times the stable rank, shrinks random factors of rank 64 too."""

    def target(values):
        return 1.5 * sum(value**2 for value in values) / values[0] ** 2

    generator = torch.Generator().manual_seed(1)
    sizes = {"b.0.q": LayerSize((512, 512), 64, 64), "b.0.up": LayerSize((2048, 512), 64, 64)}
    events = [replace(SETTINGS, layers=sizes)]
    for name, (shape, _, rank) in sizes.items():
        factors = ((shape[0], rank), (rank, shape[1]))
        left, right = (torch.randn(size, generator=generator) for size in factors)
        found = product_singular_values(left, right).tolist()
        aims = {"target": target(found), "null_target": target(null_product_values(shape, rank))}
        event = RankCheck(step=20, layer=name, rank=64, next_rank=60, verdict="settled", **aims)
        events.append(event)
    query, up = rank_types(RankHistory.of(events))
    assert query.target == pytest.approx(query.null_target, rel=0.05)
    assert up.target == pytest.approx(up.null_target, rel=0.05)
    assert max(query.target, up.target) < 60
    assert "nothing of what was learned: q, up." in words(rank_table(RankHistory.of(events)))


def test_parameters_are_counted_where_sizes_are_known():
    text = words(rank_table(RankHistory.of([*EVENTS, SUMMARY])))
    active = 10 * 48 + 11 * 48 + 24 * 96
    stored, dense = 2 * 16 * 48 + 32 * 96, 2 * 32 * 16 + 64 * 32
    assert f"{active:,} active of {stored:,} stored, {dense:,} if dense." in text
    assert "Other parameters of the model: 12,345." in text
    assert "Other parameters" not in words(rank_table(RankHistory.of(EVENTS)))
    assert "Parameters" not in words(rank_table(RankHistory.of(EVENTS[1:])))


def test_no_layer_at_the_floor_is_said_too():
    assert "No layer is at the controller's floor (rank <= 5)." in words(
        rank_table(RankHistory.of(EVENTS), floor=5)
    )


def test_skipped_checks_are_said():
    skipped = SkippedCheck(step=40, layer="b.0.up", reason="the factors are not finite")
    assert "1 check was skipped, of b.0.up." in words(
        rank_table(RankHistory.of([*EVENTS, skipped]))
    )


def test_without_ranks_of_layers_there_is_no_table():
    history = RankHistory(source="v13")
    assert rank_table(history) is None
    assert rank_types(history) == []
    document = rank_document(history)
    assert (document["types"], document["layers"], document["parameters"]) == ([], [], None)


def test_table_fits_eighty_columns():
    layer = (
        "model.transformer.encoder.layers.11.attention.self.query_key_value_and_more_projections"
    )
    sizes = {layer: LayerSize((100_000, 100_000), 99_999, 99_999)}
    check = RankCheck(
        step=10**7,
        layer=layer,
        rank=99_999,
        next_rank=99_998,
        verdict="",
        target=99_998.5,
        null_target=99_997.5,
    )
    settings = RankSettings(
        step=0, every_n_steps=1, controller="C", settings={}, resize="", layers=sizes
    )
    text = printed(rank_table(RankHistory.of([settings, check])))
    assert max(map(len, text.splitlines())) <= 80
    assert "\u2026" not in text


def test_document_is_strict_json_with_types_and_layers():
    history = RankHistory.of([*EVENTS, check("b.0.up", 26, math.nan, math.inf, step=60), SUMMARY])
    document = rank_document(history)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["run"] == {
        "source": "events",
        "unit": "step",
        "at": 60,
        "floor": 10.0,
        "num_shrinks": 5,
        "num_growths": 0,
    }
    query, up = document["types"]
    assert query["at_floor"] == ["b.0.q"]
    assert (up["target"], up["is_like_random"]) == (20.0, True)
    assert document["parameters"]["other"] == 12345
    assert document["layers"][0] == {
        "layer": "b.0.q",
        "type": "q",
        "rank": 10,
        "first_rank": 16,
        "shape": [32, 16],
        "capacity": 16,
        "target": 9.0,
        "null_target": 12.0,
        "at_floor": True,
    }
