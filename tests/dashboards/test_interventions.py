"""The table of what a controller did, as it is printed."""

import io

import pytest
from rich.console import Console

from spectral_lightning.dashboards import Interventions, interventions_table


def done(name, **changes):
    values = {
        "relative_stable_rank": 0.5,
        "floor": 0.3,
        "side": 0,
        "severity": 0.0,
        "strength": 0.0,
        "num_interventions": 0,
        "num_skipped": 0,
        "applied": 0.0,
    }
    return Interventions(name=name, **values | changes)


def printed(*layers, num_rows=10):
    console = Console(file=io.StringIO(), width=100)
    console.print(interventions_table(layers, num_rows))
    return console.file.getvalue()


def test_layers_are_sorted_by_what_was_done_to_them_and_the_rest_is_counted():
    text = printed(
        done("calm"),
        done("little", num_interventions=3, applied=0.01),
        done("much", num_interventions=2, applied=0.4, side=-1),
        done("broken", num_skipped=7),
    )
    rows = [line.split() for line in text.splitlines() if line.startswith(("l", "m", "b", "c"))]
    assert [row[0] for row in rows if row[0] != "layer"] == ["much", "little", "broken"]
    assert ["much", "0.5", "0.3", "2", "0.4", "raising"] in rows
    assert rows[-1][-2:] == ["7", "failed"]
    assert (
        "2 of 4 layers were acted on, 1 left alone; 1 could not be measured at times."
        in " ".join(text.split())
    )


def test_rows_that_are_left_out_are_counted():
    layers = [done(f"layer{i}", num_interventions=1, applied=0.1) for i in range(5)]
    text = printed(*layers, num_rows=2)
    assert "layer1" in text
    assert "layer2" not in text
    assert " ".join(text.split()).endswith("3 more are not shown.")


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match=r"`num_rows` must be >= 1, got 0\."):
        interventions_table([done("a")], 0)
