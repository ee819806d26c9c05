import io
import math
import re
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from spectral_lightning.dashboards import MEASURES, write_heat_map, write_histograms, write_layout
from spectral_lightning.dashboards.figures import heat_map_pixels
from spectral_lightning.spectra.reading import Reading

NAMES = [
    "model.blocks.0.attn.c_q",
    "model.blocks.11.attn.c_q",
    "model.blocks.0.mlp.fc1",
    "model.blocks.0.mlp.fc10",
    "model.experts.w1[3]",
    "model.a+b",
    "model.head",
]


class Run:
    """A run on disk: write to it, then read back what TensorBoard would show."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.writer = SummaryWriter(self.folder)

    def read(self):
        self.writer.close()
        accumulator = EventAccumulator(self.folder, size_guidance={"images": 0, "histograms": 0})
        return accumulator.Reload()

    def layout(self):
        (event,) = self.read().Tensors("custom_scalars__config__")
        return layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def charts_by_category(layout):
    return {category.title: list(category.chart) for category in layout.category}


def test_layout_shows_each_layer_in_one_chart_per_measure(run):
    write_layout(run.writer, NAMES)
    charts = [chart for category in run.layout().category for chart in category.chart]
    for measure in MEASURES:
        for name in NAMES:
            tag = f"spectral/{measure}/{name}"
            matching = [
                chart.title
                for chart in charts
                if any(re.match(pattern, tag) for pattern in chart.multiline.tag)
            ]
            assert len(matching) == 1, tag


def test_layout_groups_layers_that_differ_only_in_their_number(run):
    write_layout(run.writer, NAMES)
    charts = charts_by_category(run.layout())["spectra: stable_rank of each layer"]
    assert [chart.title for chart in charts] == [
        "model.blocks.*.attn.c_q",
        "model.blocks.*.mlp.fc1",
        "model.blocks.*.mlp.fc10",
        "model.experts.w1[3]",
        "model.a+b",
        "model.head",
    ]


def test_lines_over_all_layers_do_not_appear_among_the_layers(run):
    write_layout(run.writer, NAMES)
    for category in run.layout().category:
        for chart in category.chart:
            for pattern in chart.multiline.tag:
                for tag in ("stable_rank/min", "spectral_norm_low/model.head"):
                    assert not re.match(pattern, f"spectral/{tag}")


def test_interval_of_the_spectral_norm_is_a_margin_around_the_value(run):
    write_layout(run.writer, NAMES)
    title = "spectra: spectral_norm of each layer with its interval"
    charts = charts_by_category(run.layout())[title]
    assert [chart.title for chart in charts] == NAMES
    (series,) = charts[0].margin.series
    assert series.value == "spectral/spectral_norm/model.blocks.0.attn.c_q"
    assert series.lower == "spectral/spectral_norm_low/model.blocks.0.attn.c_q"
    assert series.upper == "spectral/spectral_norm_high/model.blocks.0.attn.c_q"


def test_first_category_shows_the_range_over_all_layers(run):
    write_layout(run.writer, NAMES)
    first = run.layout().category[0]
    assert sorted(chart.title for chart in first.chart) == sorted(MEASURES)
    series = {chart.title: chart.margin.series[0] for chart in first.chart}["stable_rank"]
    assert (series.lower, series.value, series.upper) == (
        "spectral/stable_rank/min",
        "spectral/stable_rank/median",
        "spectral/stable_rank/max",
    )


def test_layout_has_no_charts_for_measures_that_are_not_logged(run):
    write_layout(run.writer, NAMES, measures=["stable_rank"])
    assert list(charts_by_category(run.layout())) == [
        "spectra: median, smallest and largest over all layers",
        "spectra: stable_rank of each layer",
    ]


def test_measures_are_fields_of_a_reading():
    assert set(MEASURES) <= set(Reading.__dataclass_fields__)


def test_heat_map_decodes_to_the_picture_that_was_drawn(run):
    grid = (["a", "b"], [0, 5], [[0.5, math.nan], [None, 0.9]])
    write_heat_map(run.writer, *grid, step=5)
    (event,) = run.read().Images("spectral/heat_map")
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert event.step == 5
    assert np.array_equal(picture, heat_map_pixels(*grid))


def test_heat_map_is_written_without_pyplot(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    write_heat_map(run.writer, ["fc"], [0], [[0.5]], step=0)
    assert run.read().Tags()["images"] == ["spectral/heat_map"]


def test_no_heat_map_is_written_before_the_first_reading(run):
    write_heat_map(run.writer, [], [], [], step=0)
    assert run.read().Tags()["images"] == []


def test_heat_map_that_does_not_fit_is_refused(run):
    with pytest.raises(ValueError, match="`rows` must have shape"):
        write_heat_map(run.writer, ["fc"], [0], [], step=0)
    run.writer.close()


def test_histograms_count_every_singular_value(run):
    values = np.linspace(3.0, 0.1, 40).tolist()
    write_histograms(run.writer, {"fc": values, "head": [1.0]}, step=7)
    events = run.read()
    (event,) = events.Histograms("spectral/values/fc")
    assert event.step == 7
    assert event.histogram_value.num == 40
    assert (event.histogram_value.min, event.histogram_value.max) == (0.1, 3.0)
    assert sum(event.histogram_value.bucket) == 40
    assert events.Tags()["histograms"] == ["spectral/values/fc", "spectral/values/head"]


def test_layers_without_a_spectrum_have_no_histogram(run):
    values = {"a": None, "b": [], "c": [1.0, math.nan], "d": [math.inf], "e": [0.0, 0.0]}
    write_histograms(run.writer, values, step=0)
    assert run.read().Tags()["histograms"] == ["spectral/values/e"]


def test_outlier_does_not_blow_up_a_histogram(run):
    values = [*np.linspace(0.0, 1e-3, 500).tolist(), 1e6]
    write_histograms(run.writer, {"fc": values}, step=0)
    (event,) = run.read().Histograms("spectral/values/fc")
    assert len(event.histogram_value.bucket) <= 70


def test_any_writer_with_these_three_methods_will_do():
    class Recorder:
        """The signatures of tensorboardX."""

        def __init__(self):
            self.calls = []

        def add_custom_scalars(self, layout):
            self.calls.append("layout")

        def add_image(self, tag, img_tensor, global_step=None, walltime=None, dataformats="CHW"):
            self.calls.append((tag, global_step, dataformats, img_tensor.dtype))

        def add_histogram(
            self, tag, values, global_step=None, bins="tensorflow", walltime=None, max_bins=None
        ):
            self.calls.append((tag, global_step, values.tolist()))

    writer = Recorder()
    write_layout(writer, ["fc"])
    write_heat_map(writer, ["fc"], [0], [[0.5]], step=3)
    write_histograms(writer, {"fc": (2.0, 1.0)}, step=3)
    assert writer.calls == [
        "layout",
        ("spectral/heat_map", 3, "HWC", np.uint8),
        ("spectral/values/fc", 3, [2.0, 1.0]),
    ]
