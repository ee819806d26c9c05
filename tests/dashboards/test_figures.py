import math
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest

from spectral_lightning.dashboards import heat_map, spectrum_figure
from spectral_lightning.dashboards.figures import heat_map_pixels, render

NAN = math.nan


def layer_names(num_layers):
    return [
        f"model.model.layers.{i // 4}.self_attn.{'qkvo'[i % 4]}_proj" for i in range(num_layers)
    ]


def random_rows(num_layers, num_columns, seed=0):
    rng = np.random.default_rng(seed)
    return np.exp(rng.uniform(np.log(0.1), 0.0, (num_layers, num_columns))).tolist()


def cell_pixels(figure, row, num_rows, column, num_columns):
    """Pixels of one cell of a heat map."""
    pixels = render(figure)
    box = figure.axes[0].get_window_extent()
    top, left = len(pixels) - box.y1, box.x0
    y = [top + box.height * (row + part) / num_rows for part in (0.2, 0.8)]
    x = [left + box.width * (column + part) / num_columns for part in (0.2, 0.8)]
    return pixels[round(y[0]) : round(y[1]), round(x[0]) : round(x[1])].reshape(-1, 3)


def is_grey(colours):
    return bool((colours == colours[:, :1]).all() and (colours < 255).all())


@pytest.mark.parametrize("num_layers", [1, 3, 57, 400])
def test_nothing_of_a_heat_map_is_clipped(num_layers):
    names, steps = layer_names(num_layers), range(0, 500, 10)
    figure = heat_map(names, steps, random_rows(num_layers, 50))
    render(figure)
    page, drawn = figure.bbox, figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert page.x0 <= drawn.x0 < drawn.x1 <= page.x1
    assert page.y0 <= drawn.y0 < drawn.y1 <= page.y1
    assert figure.get_figheight() <= 16.2


@pytest.mark.parametrize("num_layers", [1, 3, 57, 400])
def test_row_labels_do_not_overlap(num_layers):
    figure = heat_map(layer_names(num_layers), [0, 1], random_rows(num_layers, 2))
    render(figure)
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))


def test_each_of_57_layers_has_its_label_on_its_row():
    names = layer_names(57)
    axes = heat_map(names, [0, 1], random_rows(57, 2)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert list(axes.get_yticks()) == [row + 0.5 for row in range(57)]
    assert axes.get_ylim() == (57, 0), "the first layer is on top"


def test_labels_are_thinned_evenly_when_there_are_too_many():
    names = layer_names(400)
    axes = heat_map(names, [0], random_rows(400, 1)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == names[::4]


def test_columns_stand_at_their_steps():
    axes = heat_map(["fc"], [10, 20, 40], [[0.1, 0.5, 1.0]]).axes[0]
    assert axes.get_xlim() == (10, 60)
    figure = axes.figure
    first, third = cell_pixels(figure, 0, 1, 0, 5), cell_pixels(figure, 0, 1, 4, 5)
    assert len(np.unique(first, axis=0)) == len(np.unique(third, axis=0)) == 1
    assert (first[0] != third[0]).any()
    assert (cell_pixels(figure, 0, 1, 3, 5)[0] == third[0]).all()


def test_failed_cells_are_hatched_and_unmeasured_cells_are_white():
    rows = [[0.5, NAN, None, math.inf, 0.0, -1.0]]
    figure = heat_map(["fc"], range(6), rows)
    good, *failed = (cell_pixels(figure, 0, 1, c, 6) for c in (0, 1, 3, 4, 5))
    assert not is_grey(good)
    for cell in failed:
        assert is_grey(cell)
        assert len(np.unique(cell, axis=0)) == 2
    assert (cell_pixels(figure, 0, 1, 2, 6) == 255).all()
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "measurement failed"


def test_legend_of_failures_appears_only_with_a_failure():
    assert heat_map(["fc"], [0, 1], [[0.5, None]]).axes[0].get_legend() is None


@pytest.mark.parametrize("column", [0, 1234, 4999])
def test_one_failure_among_thousands_of_columns_is_visible(column):
    rows = [[0.5] * 5000]
    without = heat_map_pixels(["fc"], range(5000), rows)
    rows[0][column] = NAN
    differing = (heat_map_pixels(["fc"], range(5000), rows) != without).any(axis=2)
    rows_below_the_legend = differing[60:]
    assert rows_below_the_legend.any(axis=0).sum() >= 2


def test_outlier_does_not_stretch_the_colour_scale():
    rows = random_rows(57, 50)
    limits = heat_map(layer_names(57), range(50), rows).axes[1].get_ylim()
    rows[3][7] = 1e-9
    assert heat_map(layer_names(57), range(50), rows).axes[1].get_ylim() == pytest.approx(
        limits, rel=0.05
    )


def test_flat_readings_do_not_look_like_change():
    low, high = heat_map(["fc"], [0, 1], [[0.7, 0.7000001]]).axes[1].get_ylim()
    assert high / low == pytest.approx(1.25)
    assert low < 0.7 < high


def test_colour_bar_names_its_quantity_and_values():
    bar = heat_map(layer_names(8), [0, 1], random_rows(8, 2)).axes[1]
    assert bar.get_ylabel() == "ratio (1 = random)"
    labels = [float(label.get_text()) for label in bar.get_yticklabels()]
    assert labels == pytest.approx(list(bar.get_yticks()), rel=0.01)
    assert len(labels) == 5


@pytest.mark.parametrize(
    ("measure", "title", "unit"),
    [
        ("stable_rank", "Stable rank", "dimensionless"),
        ("spectral_norm", "Spectral norm", "in the weight's own units"),
        ("frobenius_norm", "Frobenius norm", "in the weight's own units"),
    ],
)
def test_heat_map_says_what_it_shows_and_in_which_unit(measure, title, unit):
    axes, bar = heat_map(["fc"], [0], [[0.5]], measure).axes
    assert axes.get_title("left") == title
    assert bar.get_ylabel() == unit


def test_unknown_measure_is_refused():
    message = r"`measure` must be one of relative_stable_rank, .*, frobenius_norm, got 'rank'\."
    with pytest.raises(ValueError, match=message):
        heat_map(["fc"], [0], [[0.5]], "rank")


def test_heat_map_of_failures_alone_is_drawn():
    assert render(heat_map(["fc"], [0], [[NAN]])).shape[2] == 3


def test_pixels_are_those_of_the_figure_also_when_labels_are_reused():
    names, steps = layer_names(12), range(7)
    for seed in (0, 1):
        rows = random_rows(12, 7, seed)
        expected = render(heat_map(names, steps, rows))
        assert np.array_equal(heat_map_pixels(names, steps, rows), expected)


def test_any_layer_name_can_be_drawn():
    names = ["a$b$", "sch\u00f6n", "\u5c42.0", "", "x" * 300, r"\frac{1}", "a_b^c"]
    figure = heat_map(names, [0], [[0.5]] * len(names))
    render(figure)
    texts = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert texts[:2] == ["a$b$", r"sch\xf6n"]
    assert max(map(len, texts)) == 40


def test_pictures_do_not_depend_on_the_style_of_the_user():
    def draw():
        heat_map_and_spectrum = (
            heat_map(["a_b"], [0, 1], [[0.5, NAN]]),
            spectrum_figure([1.0], (1, 1)),
        )
        return [*map(render, heat_map_and_spectrum), heat_map_pixels(["a_b"], [0], [[0.5]])]

    expected = draw()
    theirs = {"axes.grid": True, "font.size": 20, "text.usetex": True, "figure.autolayout": True}
    with matplotlib.rc_context(theirs):
        assert all(map(np.array_equal, draw(), expected))
        assert matplotlib.rcParams["font.size"] == 20


def test_drawing_works_without_pyplot(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    heat_map_pixels(["fc"], [0], [[0.5]])
    render(spectrum_figure([1.0, 0.5], (2, 2)))


@pytest.mark.parametrize(
    ("names", "steps", "rows"),
    [
        ([], [], []),
        (["a"], [], [[]]),
        (["a"], [0, 1], [[1.0]]),
        (["a", "b"], [0], [[1.0]]),
        (["a", "b"], [0, 1], [[1.0, 1.0], [1.0]]),
    ],
)
def test_rows_that_do_not_fit_are_refused(names, steps, rows):
    with pytest.raises(ValueError, match=r"`rows` must have shape .* of at least \(1, 1\), got"):
        heat_map(names, steps, rows)


def test_histogram_of_a_spectrum_integrates_to_one():
    values = np.linspace(0.1, 2.0, 64)
    axes = spectrum_figure(values.tolist(), (128, 64)).axes[0]
    density, edges, _ = axes.patches[0].get_data()
    assert (density * np.diff(edges)).sum() == pytest.approx(1.0)
    assert edges[0] == 0.0
    assert edges[-1] == 2.0
    assert axes.get_title("left") == "64 singular values of a 128 x 64 matrix"


def test_null_curve_is_drawn_over_the_histogram():
    figure = spectrum_figure([1.0, 0.5], (2, 2), null=([0.0, 1.0, 2.0], [0.0, 1.0, 0.0]))
    (line,) = figure.axes[0].get_lines()
    assert line.get_xydata().tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == [
        "this matrix",
        "random matrix",
    ]


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-30, 1e-31], [1e30, 1.0]])
def test_unusual_spectra_are_drawn_unclipped(values):
    figure = spectrum_figure(values, (len(values), len(values)))
    render(figure)
    page, drawn = figure.bbox, figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert page.x0 <= drawn.x0 < drawn.x1 <= page.x1
    assert page.y0 <= drawn.y0 < drawn.y1 <= page.y1


@pytest.mark.parametrize(("values", "counts"), [([], "0 of which 0"), ([1.0, NAN], "2 of which 1")])
def test_spectrum_without_finite_values_is_refused(values, counts):
    with pytest.raises(ValueError, match=f"`values` must be one or more finite .* got {counts}"):
        spectrum_figure(values, (2, 2))
