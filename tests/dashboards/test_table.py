import io
import math
import re

import pytest
from rich.console import Console

from spectral_lightning.dashboards import worst_layers_table
from spectral_lightning.spectra.reading import Reading

NAN = math.nan


def make_reading(name="fc", *, ratio=0.5, norm=12.3456, interval=(12.34, 12.36), **changes):
    fields = {
        "step": 12345,
        "shape": (512, 2048),
        "spectral_norm": norm,
        "spectral_norm_interval": interval,
        "frobenius_norm": 30.0,
        "stable_rank": 210.75,
        "relative_stable_rank": ratio,
    }
    return Reading(name=name, **(fields | changes))


def failed_reading(name):
    nans = dict.fromkeys(("norm", "ratio", "frobenius_norm", "stable_rank"), NAN)
    return make_reading(name, interval=(NAN, NAN), failure="The weight holds a NaN.", **nans)


def printed(table, width=80, encoding="utf-8"):
    buffer = io.BytesIO()
    with io.TextIOWrapper(buffer, encoding=encoding, newline="") as file:
        Console(file=file, width=width, color_system=None, legacy_windows=False).print(table)
        file.flush()
        return buffer.getvalue().decode(encoding)


def rows(text, marker="512x2048"):
    return [line.split() for line in text.splitlines() if marker in line]


def test_layers_farthest_from_random_come_first():
    ratios = {"near": 0.9, "twice": 2.1, "low": 0.4, "lowest": 0.01, "one": 1.0}
    table = worst_layers_table([make_reading(n, ratio=r) for n, r in ratios.items()], num_rows=4)
    names = [row[0] for row in rows(printed(table))]
    assert names == ["lowest", "low", "twice", "near"]


def test_failed_layers_come_first_with_their_reason():
    readings = [make_reading("low", ratio=0.01), failed_reading("broken")]
    text = printed(worst_layers_table(readings))
    first, second = rows(text)
    assert first == ["broken", "512x2048", "failed", "-", "-", "-", "-", "12345"]
    assert second[0] == "low"
    assert "2 of 2 layers; 1 could not be measured." in text
    assert "broken: The weight holds a NaN." in text
    assert "nan" not in text.replace("a NaN.", "")


def test_row_holds_every_number_of_the_reading():
    reading = make_reading(condition_number=1234567.0, effective_rank=234.5)
    (row,) = rows(printed(worst_layers_table([reading])))
    assert " ".join(row) == "fc 512x2048 12.35 +-0.01 210.8 0.5 1.2e+06 234 12345"


def test_spectrum_that_was_not_measured_yet_is_a_dash_and_a_singular_matrix_infinite():
    (row,) = rows(printed(worst_layers_table([make_reading()])))
    assert row[-3:] == ["-", "-", "12345"]
    (row,) = rows(printed(worst_layers_table([make_reading(condition_number=math.inf)])))
    assert row[-3] == "inf"


@pytest.mark.parametrize(
    ("norm", "interval"),
    [
        (12.3456, (12.3456, 12.3456)),
        (1.0, (1.0, 1.0)),
        (0.1, (0.0999, 0.1015)),
        (98765.4, (98765.4, 98765.5)),
        (3e-12, (2.9e-12, 3.33e-12)),
        (1.0, (1.0, math.inf)),
    ],
)
def test_printed_interval_holds_the_interval_of_the_reading(norm, interval):
    table = worst_layers_table([make_reading(norm=norm, interval=interval)])
    (row,) = rows(printed(table, width=120))
    value, radius = float(row[2]), float(row[3].removeprefix("+-"))
    assert value - radius <= interval[0] * (1 + 1e-12)
    assert value + radius >= interval[1] * (1 - 1e-12)


def test_eighty_columns_hold_all_numbers_and_tell_the_layers_apart():
    readings = [
        make_reading(
            f"model.model.layers.{i}.self_attn.{kind}_proj",
            shape=(50257, 4096),
            ratio=0.0123,
            norm=0.00123456,
            interval=(0.00123, 0.00124),
            condition_number=1.5e16,
            effective_rank=2345.6,
            step=123456,
        )
        for i in range(10, 15)
        for kind in "qk"
    ]
    text = printed(worst_layers_table(readings))
    found = rows(text, "50257x4096")
    assert len(found) == 10
    assert all(row[1:] == found[0][1:] for row in found)
    numbers = " ".join(found[0][1:])
    assert numbers == "50257x4096 0.001235 +-5e-06 210.8 0.0123 1.5e+16 2346 123456"
    assert len({row[0] for row in found}) == 10
    assert max(map(len, text.splitlines())) <= 80


def test_wide_terminal_shows_whole_names():
    name = "model.transformer.encoder.layers.11.attention.self.query_key_value"
    assert rows(printed(worst_layers_table([make_reading(name)]), width=160))[0][0] == name


def test_output_is_plain_text_outside_a_terminal():
    table = worst_layers_table([make_reading("[bold]a[/]"), failed_reading("b")])
    text = printed(table)
    assert "\x1b" not in text
    assert "[bold]a[/]" in text
    assert printed(table, encoding="ascii").isascii()


def test_failed_layer_is_red_in_a_terminal():
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system="standard")
    console.print(worst_layers_table([failed_reading("broken")]))
    assert re.search(r"\x1b\[31mbroken", file.getvalue())


def test_caption_counts_all_layers_however_few_are_shown():
    readings = [make_reading(f"layer{i}") for i in range(57)]
    text = printed(worst_layers_table(readings, num_rows=3))
    assert len(rows(text)) == 3
    assert "3 of 57 layers; 0 could not be measured." in text


def test_no_layers_make_an_empty_table():
    assert "0 of 0 layers" in printed(worst_layers_table([]))


def test_table_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"`num_rows` must be >= 1, got 0\."):
        worst_layers_table([], num_rows=0)
