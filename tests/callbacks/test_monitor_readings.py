import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from spectral_lightning.callbacks import SpectralMonitor
from spectral_lightning.testing.tasks import TinyNetwork, TinyTask


class Planted(nn.Module):
    """Has layers that are not used, so that their weights may be anything."""

    def __init__(self, *weights):
        super().__init__()
        self.net = TinyNetwork()
        self.odd = nn.ModuleList()
        for weight in weights:
            layer = nn.Linear(1, 1, bias=False)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.odd.append(layer)

    def forward(self, x):
        return self.net(x)


def failing_warnings(recorded):
    return [str(w.message) for w in recorded if "could not measure" in str(w.message)]


@pytest.mark.parametrize("lr", [0.001, 0.1])
def test_every_reading_is_that_of_the_weight_at_its_step(fit, after_step, snapshots, lr):
    monitor, found = SpectralMonitor(spectrum_every_n_steps=2), []
    collect = after_step(lambda trainer: found.extend(monitor.readings.values()))
    fit(snapshots, monitor, collect, task=TinyTask(lr=lr, num_batches=30), max_steps=30)
    found.extend(monitor.readings.values())
    assert len(found) == 4 * 31
    for reading in found:
        weight = snapshots.weights[reading.step][reading.name].double()
        values = torch.linalg.svdvals(weight)
        low, high = reading.spectral_norm_interval
        assert low <= values[0].item() <= high
        assert reading.spectral_norm == pytest.approx(values[0].item(), rel=1e-3)
        assert reading.frobenius_norm == pytest.approx(weight.norm().item(), rel=1e-6)
        stable_rank = (weight.norm() / values[0]).square().item()
        assert reading.stable_rank == pytest.approx(stable_rank, rel=2e-3)
        assert reading.trainable
        assert reading.failure is None


def test_the_exact_spectrum_is_that_of_its_own_step(fit, after_step, snapshots):
    monitor, found = SpectralMonitor(spectrum_every_n_steps=4), []
    collect = after_step(lambda trainer: found.append(monitor.readings["net.2"]))
    fit(snapshots, monitor, collect)
    assert [reading.spectrum_step for reading in found] == [0, 0, 0, 0, 4, 4]
    for reading in found:
        weight = snapshots.weights[reading.spectrum_step]["net.2"].double()
        values = torch.linalg.svdvals(weight)
        shares = values / values.sum()
        assert reading.values == pytest.approx(values.tolist(), rel=1e-4, abs=1e-6)
        assert reading.condition_number == pytest.approx((values[0] / values[-1]).item(), rel=0.01)
        entropy = -(shares * shares.log()).sum()
        assert reading.effective_rank == pytest.approx(entropy.exp().item(), rel=1e-4)


def test_readings_are_one_step_late_and_complete_after_fit(fit, after_step):
    monitor, late = SpectralMonitor(), []

    def check(trainer):
        readings = monitor.readings
        late.append({trainer.global_step - reading.step for reading in readings.values()})
        smallest = min(reading.stable_rank for reading in readings.values())
        metrics = trainer.callback_metrics
        assert metrics["spectral/stable_rank/min"].item() == pytest.approx(smallest)

    assert monitor.readings == {}
    fit(monitor, after_step(check))
    assert late == [{1}] * 6
    assert {name: r.step for name, r in monitor.readings.items()} == dict.fromkeys(
        ["net.0", "net.2", "net.5", "net.7"], 6
    )


def test_the_last_step_is_measured_whatever_the_intervals(fit):
    monitor = SpectralMonitor(every_n_steps=50, spectrum_every_n_steps=100)
    fit(monitor)
    assert {(r.step, r.spectrum_step) for r in monitor.readings.values()} == {(6, 6)}


def test_no_spectrum_is_taken_when_not_asked_for(fit):
    monitor = SpectralMonitor(spectrum_every_n_steps=None)
    fit(monitor)
    for reading in monitor.readings.values():
        assert reading.condition_number is reading.effective_rank is reading.values is None
    assert monitor.spectra.num_decompositions == 4 * 7


@pytest.mark.parametrize(
    ("value", "reason"),
    [(math.nan, "NaN or infinite"), (math.inf, "NaN or infinite"), (0.0, "the weight is zero")],
)
def test_a_weight_that_breaks_mid_run_is_a_failure_and_one_warning(fit, after_step, value, reason):
    monitor = SpectralMonitor(spectrum_every_n_steps=2)
    task = TinyTask(Planted(torch.ones(5, 7)))

    def break_weight(trainer):
        if trainer.global_step == 3:
            task.net.odd[0].weight.data.mul_(value)

    with pytest.warns(UserWarning, match="could not measure") as recorded:
        trainer = fit(monitor, after_step(break_weight), task=task, max_steps=10)
    assert trainer.global_step == 10
    (warning,) = failing_warnings(recorded)
    assert warning.startswith("SpectralMonitor could not measure net.odd.0 at step 4: ")
    assert warning.endswith("Training goes on; the readings carry `failure`.")
    reading = monitor.readings["net.odd.0"]
    assert reason in warning
    assert reason in reading.failure
    assert math.isnan(reading.stable_rank)
    assert monitor.readings["net.net.0"].failure is None


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(0, 7), "the weight is empty, of shape (0, 7)"),
        (torch.full((5, 7), math.nan), "NaN or infinite entry"),
    ],
    ids=["empty", "nan"],
)
def test_a_weight_without_a_spectrum_is_named_in_one_warning(fit, weight, reason):
    monitor = SpectralMonitor(spectrum_every_n_steps=2)
    with pytest.warns(UserWarning, match="could not measure") as recorded:
        fit(monitor, task=TinyTask(Planted(weight)))
    (warning,) = failing_warnings(recorded)
    assert warning.startswith("SpectralMonitor could not measure net.odd.0 at step 0: ")
    assert reason in warning
    assert reason in monitor.readings["net.odd.0"].failure
    assert monitor.readings["net.odd.0"].step == 6


def test_a_weight_that_starts_at_zero_is_a_failure_without_a_warning(fit, after_step):
    """As the second factor of a LoRA layer does, or the last layer of a residual block."""
    monitor, failures = SpectralMonitor(), []
    task = TinyTask()
    task.net[7].weight.data.zero_()
    collect = after_step(lambda _: failures.append(monitor.readings["net.7"].failure))
    fit(monitor, collect, task=task)
    assert "the weight is zero" in failures[0]
    assert failures[1:] == [None] * 5


def test_a_warning_of_many_layers_names_three(fit):
    task = TinyTask(Planted(*[torch.full((2, 3), math.nan)] * 4))
    names = "net.odd.0, net.odd.1, net.odd.2 and 1 more at step 0: the weight has a NaN"
    with pytest.warns(UserWarning, match=f"could not measure {names}"):
        fit(SpectralMonitor(), task=task)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_a_single_row_or_column_has_stable_rank_one(fit, shape):
    weight = torch.arange(1.0, 10.0)[: max(shape)].reshape(shape)
    monitor = SpectralMonitor("net.odd.*")
    fit(monitor, task=TinyTask(Planted(weight)))
    reading = monitor.readings["net.odd.0"]
    assert reading.spectral_norm == pytest.approx(weight.norm().item(), rel=1e-6)
    assert reading.stable_rank == pytest.approx(1.0)
    assert reading.condition_number == 1.0


def test_frozen_layers_are_measured_and_marked(fit):
    monitor = SpectralMonitor()
    task = TinyTask()
    task.net[2].requires_grad_(False)
    fit(monitor, task=task)
    trainable = {name: reading.trainable for name, reading in monitor.readings.items()}
    assert trainable == {"net.0": True, "net.2": False, "net.5": True, "net.7": True}


def test_embeddings_are_measured_on_request(fit, make_embedding_task):
    with_tables, without = SpectralMonitor(embeddings=True), SpectralMonitor()
    fit(with_tables, task=make_embedding_task())
    fit(without, task=make_embedding_task())
    assert with_tables.names == ("net.embed", "net.head")
    assert with_tables.readings["net.embed"].shape == (10, 4)
    assert without.names == ("net.head",)


def test_layers_built_in_configure_model_are_found(fit):
    class Late(TinyTask):
        def __init__(self):
            super().__init__(nn.Identity())

        def configure_model(self):
            if isinstance(self.net, nn.Identity):
                self.net = TinyNetwork()

    monitor, usual = SpectralMonitor(), SpectralMonitor()
    fit(monitor, task=Late())
    fit(usual)
    assert monitor.readings == usual.readings


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_layers_keep_their_names_and_readings(fit, in_place):
    task = TinyTask()
    if in_place:
        task.net.compile(backend="eager")
    else:
        task.net = torch.compile(task.net, backend="eager")
    monitor, usual = SpectralMonitor(), SpectralMonitor()
    fit(monitor, task=task)
    fit(usual)
    assert monitor.readings == usual.readings


def test_a_parameter_that_is_replaced_is_read_from_then_on(fit, after_step):
    monitor, norms = SpectralMonitor("net.odd.0"), []
    task = TinyTask(Planted(torch.ones(5, 7)))

    def replace(trainer):
        norms.append(monitor.readings["net.odd.0"].spectral_norm)
        if trainer.global_step == 2:
            task.net.odd[0].weight = nn.Parameter(2 * torch.ones(5, 7), requires_grad=False)

    fit(monitor, after_step(replace), task=task)
    assert norms == pytest.approx([35**0.5] * 3 + [2 * 35**0.5] * 3, rel=1e-3)


def test_a_second_fit_of_the_trainer_sees_the_second_model_only(make_trainer):
    monitor = SpectralMonitor()
    trainer = make_trainer(monitor)
    trainer.fit(TinyTask())
    trainer.fit_loop.epoch_loop.max_steps = 9
    trainer.fit(TinyTask(nn.Sequential(nn.Linear(12, 6))))
    assert {name: (r.shape, r.step) for name, r in monitor.readings.items()} == {
        "net.0": ((6, 12), 9)
    }


def test_manual_optimization_with_two_optimizers_is_read_after_each_batch(fit, after_step):
    class Manual(TinyTask):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.net, self.net[0])]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    monitor, steps = SpectralMonitor(), []
    fit(monitor, after_step(lambda _: steps.append(monitor.readings["net.0"].step)), task=Manual())
    assert steps == [0, 2, 4]
    assert monitor.readings["net.0"].step == 6


def test_barebones_training_is_measured_without_complaint():
    monitor = SpectralMonitor(table_rows=0)
    trainer = pl.Trainer(barebones=True, accelerator="cpu", max_steps=3, callbacks=[monitor])
    trainer.fit(TinyTask())
    assert {reading.step for reading in monitor.readings.values()} == {3}
