import csv
import io
import math
import re

import numpy as np
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from spectral_lightning.callbacks import SpectralMonitor
from spectral_lightning.dashboards import MEASURES
from spectral_lightning.dashboards.figures import heat_map_pixels
from spectral_lightning.spectra import read_history
from spectral_lightning.testing.tasks import TinyNetwork, TinySteps, TinyTask, quiet_settings

LAYERS = ["net.0", "net.2", "net.5", "net.7"]
PARTS = ["min", "median", "max"]


class Logged(TinyTask):
    """Logs its loss, for the x-axis of Lightning itself."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def rows_with(path, column):
    with path.open() as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row[column]}


def events(folder):
    size = dict.fromkeys(["images", "histograms", "scalars", "tensors"], 0)
    return EventAccumulator(str(folder), size_guidance=size).Reload()


def scalars(accumulator, tag):
    return {event.step: event.value for event in accumulator.Scalars(tag)}


def test_csv_has_a_column_per_layer_on_the_axis_of_the_other_metrics(fit, after_step, tmp_path):
    monitor, read = SpectralMonitor(spectrum_every_n_steps=None), {}

    def keep(_):
        reading = monitor.readings["net.2"]
        read[reading.step] = reading.stable_rank

    logger = CSVLogger(tmp_path, name="", version="")
    fit(monitor, after_step(keep), task=Logged(), logger=logger, log_every_n_steps=2)
    path = tmp_path / "metrics.csv"
    logged = rows_with(path, "spectral/stable_rank/net.2")
    # Batch 1 made the weights of step 2; the initial ones stand before the axis.
    assert list(logged) == [1, 3, 5] == list(rows_with(path, "loss"))
    assert logged[1] == read[2]
    assert logged[5] == monitor.readings["net.2"].stable_rank
    for layer in LAYERS:
        low = rows_with(path, f"spectral/spectral_norm_low/{layer}")[5]
        high = rows_with(path, f"spectral/spectral_norm_high/{layer}")[5]
        assert low <= rows_with(path, f"spectral/spectral_norm/{layer}")[5] <= high
    layers = [rows_with(path, f"spectral/relative_stable_rank/{layer}")[3] for layer in LAYERS]
    assert rows_with(path, "spectral/relative_stable_rank/max")[3] == max(layers)


def test_own_log_interval_goes_before_that_of_the_trainer(fit, tmp_path):
    monitor = SpectralMonitor(spectrum_every_n_steps=None, log_every_n_steps=4)
    fit(monitor, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    # Steps 4 and, since it is the last one, 6.
    logged = rows_with(tmp_path / "metrics.csv", "spectral/stable_rank/net.2")
    assert list(logged) == [3, 5]


def test_spectra_are_logged_whatever_the_log_interval(fit, tmp_path):
    monitor = SpectralMonitor(spectrum_every_n_steps=3, log_every_n_steps=50)
    fit(monitor, logger=CSVLogger(tmp_path, name="", version=""), max_steps=7)
    path = tmp_path / "metrics.csv"
    # Steps 3 and 6 by the interval, step 7 since it is the last one.
    for measure in ("condition_number", "relative_condition_number", "effective_rank"):
        assert list(rows_with(path, f"spectral/{measure}/net.2")) == [2, 5, 6]
    assert list(rows_with(path, "spectral/stable_rank/net.2")) == [2, 5, 6]


def test_accumulated_batches_are_not_steps_on_the_axis(fit, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    settings = {"accumulate_grad_batches": 3, "max_steps": 4}
    fit(SpectralMonitor(), task=Logged(), logger=logger, **settings)
    path = tmp_path / "metrics.csv"
    assert list(rows_with(path, "spectral/stable_rank/net.2")) == [0, 1, 2, 3]


def test_tensorboard_needs_no_set_up(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    monitor = SpectralMonitor(spectrum_every_n_steps=2)
    fit(monitor, logger=logger, limit_val_batches=1, check_val_every_n_epoch=1)
    found = events(tmp_path)
    for layer in LAYERS:
        logged = scalars(found, f"spectral/stable_rank/{layer}")
        assert list(logged) == [0, 1, 2, 3, 4, 5]
        assert logged[5] == pytest.approx(monitor.readings[layer].stable_rank)
        assert list(scalars(found, f"spectral/effective_rank/{layer}")) == [1, 3, 5]
        assert [h.step for h in found.Histograms(f"spectral/values/{layer}")] == [1, 3, 5]
    for part in PARTS:
        assert len(found.Scalars(f"spectral/stable_rank/{part}")) == 6
    (layout,) = found.Tensors("custom_scalars__config__")
    text = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    patterns = [
        tag for category in text.category for c in category.chart for tag in c.multiline.tag
    ]
    logged_tags = found.Tags()["scalars"]
    assert len(patterns) == len(MEASURES)
    assert all(any(re.search(pattern, tag) for tag in logged_tags) for pattern in patterns)
    after_validation, at_the_end = found.Images("spectral/heat_map")
    assert after_validation.step == at_the_end.step == 5
    assert Image.open(io.BytesIO(at_the_end.encoded_image_string)).width > 800


def test_the_heat_map_shows_the_measure_of_ones_choice(fit, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(SpectralMonitor(heat_map="frobenius_norm"), logger=logger)
    history = read_history(tmp_path / "spectral_history.jsonl")
    rows = [[entry.readings[layer].frobenius_norm for entry in history] for layer in LAYERS]
    steps = [entry.step for entry in history]
    (image,) = events(tmp_path).Images("spectral/heat_map")
    drawn = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert np.array_equal(drawn, heat_map_pixels(LAYERS, steps, rows, "frobenius_norm"))


def test_every_logger_gets_the_same_values(fit, tmp_path):
    loggers = [
        TensorBoardLogger(tmp_path / "board", name="", version=""),
        CSVLogger(tmp_path / "table", name="", version=""),
    ]
    fit(SpectralMonitor(), logger=loggers)
    tag = "spectral/stable_rank/net.2"
    table = rows_with(tmp_path / "table/metrics.csv", tag)
    assert scalars(events(tmp_path / "board"), tag) == pytest.approx(table)
    assert (tmp_path / "board/spectral_history.jsonl").exists()
    assert not (tmp_path / "table/spectral_history.jsonl").exists()


def test_loggers_of_the_older_package_get_everything(tmp_path):
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Task(TinySteps, pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.num_batches, self.lr = TinyNetwork(), 6, 0.01

    logger = pytorch_lightning.loggers.TensorBoardLogger(tmp_path, name="", version="")
    settings = quiet_settings(tmp_path, SpectralMonitor(), logger=logger, max_steps=4)
    pytorch_lightning.Trainer(**settings).fit(Task())
    found = events(tmp_path)
    assert list(scalars(found, "spectral/stable_rank/net.2")) == [0, 1, 2, 3]
    assert len(found.Tensors("custom_scalars__config__")) == 1
    assert len(found.Images("spectral/heat_map")) == 1
    assert len(read_history(tmp_path / "spectral_history.jsonl")) == 5


def test_history_holds_the_readings_as_they_were(fit, tmp_path):
    monitor = SpectralMonitor(spectrum_every_n_steps=4)
    fit(monitor, logger=CSVLogger(tmp_path, name="", version=""))
    history = read_history(tmp_path / "spectral_history.jsonl")
    assert [entry.step for entry in history] == [0, 1, 2, 3, 4, 5, 6]
    assert history[-1].readings == monitor.readings
    assert [entry.readings["net.2"].spectrum_step for entry in history] == [0, 0, 0, 0, 4, 4, 6]


def test_another_run_in_the_same_folder_sets_the_history_aside(fit, tmp_path):
    for max_steps in (3, 2):
        logger = TensorBoardLogger(tmp_path, name="", version="")
        fit(SpectralMonitor(), logger=logger, max_steps=max_steps)
    assert len(read_history(tmp_path / "spectral_history.jsonl")) == 3
    assert len(read_history(tmp_path / "spectral_history.1.jsonl")) == 4


def test_failures_are_in_the_history_and_not_in_the_scalars(fit, tmp_path):
    task = TinyTask()
    task.net[2].requires_grad_(False)
    task.net[2].weight.data.zero_()
    fit(SpectralMonitor(), task=task, logger=CSVLogger(tmp_path, name="", version=""))
    for entry in read_history(tmp_path / "spectral_history.jsonl"):
        assert "the weight is zero" in entry.readings["net.2"].failure
        assert math.isnan(entry.readings["net.2"].stable_rank)
        assert not entry.readings["net.2"].trainable
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "spectral/stable_rank/net.5" in header
    assert not [column for column in header if column.endswith("net.2")]


def test_the_table_at_the_end_lists_the_layers(fit, capsys):
    fit(SpectralMonitor())
    lines = capsys.readouterr().out.splitlines()
    assert "Layers whose stable rank is farthest from random" in lines[0]
    assert sorted(line.split()[0] for line in lines if line.startswith("net.")) == LAYERS
    assert "4 of 4 layers; 0 could not be measured." in lines[-1]


def test_no_table_on_request(fit, capsys):
    fit(SpectralMonitor(table_rows=0))
    assert capsys.readouterr().out == ""


def test_a_run_can_stop_early_on_a_spectrum(fit):
    stop = EarlyStopping("spectral/stable_rank/min", stopping_threshold=100.0, mode="min")
    trainer = fit(SpectralMonitor(), stop, task=TinyTask(num_batches=2), limit_val_batches=1)
    assert trainer.global_step == 2


def test_checkpoints_can_be_chosen_by_a_spectrum(fit, tmp_path, after_step):
    monitor, values = SpectralMonitor(), {}

    def keep(trainer):
        values[trainer.global_step] = trainer.callback_metrics["spectral/spectral_norm/max"].item()

    best = ModelCheckpoint(
        tmp_path / "best",
        "{step}",
        monitor="spectral/spectral_norm/max",
        mode="max",
        every_n_train_steps=1,
    )
    fit(monitor, after_step(keep), best, enable_checkpointing=True)
    assert best.best_model_path.endswith(f"step={max(values, key=values.get)}.ckpt")
    assert best.best_model_score.item() == pytest.approx(max(values.values()))


def test_metrics_are_there_soon_after_a_resume(fit, after_step, tmp_path):
    trainer = fit(SpectralMonitor(log_every_n_steps=50), max_steps=2)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    found = []
    check = after_step(
        lambda trainer: found.append("spectral/stable_rank/min" in trainer.callback_metrics)
    )
    fit(SpectralMonitor(log_every_n_steps=50), check, ckpt_path=tmp_path / "run.ckpt")
    assert found == [True] * 4


@pytest.mark.parametrize(
    ("name", "value", "rule"), [("log_every_n_steps", 0, ">= 1"), ("table_rows", -1, ">= 0")]
)
def test_settings_out_of_range_are_refused_at_construction(name, value, rule):
    with pytest.raises(ValueError, match=rf"`{name}` must be {rule}, got {value}\."):
        SpectralMonitor(**{name: value})


def test_a_heat_map_of_what_is_not_measured_at_every_reading_is_refused():
    message = r"`heat_map` must be one of relative_stable_rank, .*, got 'condition_number'\."
    with pytest.raises(ValueError, match=message):
        SpectralMonitor(heat_map="condition_number")
