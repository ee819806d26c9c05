"""ASSR as its user meets it: what it touches, and that it moves what it reads."""

from typing import ClassVar

import pytest
import torch

from spectral_lightning.callbacks import ASSR, SpectralMonitor
from spectral_lightning.control import Regulator, Thermostat
from spectral_lightning.linalg import gaussian_stable_rank
from spectral_lightning.testing.models import plant_spike_, relative_stable_rank
from spectral_lightning.testing.tasks import TinyTask

pytestmark = pytest.mark.filterwarnings("ignore:ASSR finds .* outside their bands at once")


def static(floor=0.8, **settings):
    return Regulator(calibration="static", floor=floor, **settings)


def with_spike(task, size):
    """Give `net.2` a rank-one spike of `size` times its spectral norm."""
    plant_spike_(task.net[2].weight, size)
    return task


@pytest.mark.parametrize("actuator", ["spectral_cap", "log_stable_rank"])
def test_a_planted_spike_is_healed_and_left_alone_afterwards(fit, actuator):
    task = with_spike(TinyTask(num_batches=300, lr=1e-3), 8.0)
    before = relative_stable_rank(task.net[2].weight)
    bulk = torch.linalg.svdvals(task.net[2].weight.detach())[1:].square().sum()
    assr = ASSR("net.2", actuator, static(0.3, thermostat=Thermostat(strength=30.0)))
    fit(assr, task=task, max_steps=250)
    after = relative_stable_rank(task.net[2].weight)
    assert before < 0.13
    null = gaussian_stable_rank(*task.net[2].weight.shape)
    assert after * null - 1 > 1.1 * (0.3 * null - 1)
    assert assr.interventions["net.2"].side == 0
    # The energy of the spike is gone, not spread over the other directions.
    rest = torch.linalg.svdvals(task.net[2].weight.detach())[1:].square().sum()
    assert rest < 1.5 * bulk


def test_legacy_l2_does_not_move_the_reading(fit):
    task = with_spike(TinyTask(num_batches=300, lr=1e-3), 4.0)
    before = relative_stable_rank(task.net[2].weight)
    norm = task.net[2].weight.norm()
    assr = ASSR("net.2", "legacy_l2", static(0.3, thermostat=Thermostat(strength=5.0)))
    fit(assr, task=task, max_steps=100)
    assert assr.interventions["net.2"].num_interventions > 90
    assert task.net[2].weight.norm() < 0.5 * norm
    assert relative_stable_rank(task.net[2].weight) < 2 * before


def test_the_evaluation_loss_is_that_of_a_run_without_it(make_trainer):
    class Task(TinyTask):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

    found = [
        make_trainer(*callbacks, limit_val_batches=1).validate(
            with_spike(Task(), 4.0), verbose=False
        )
        for callbacks in ((), (ASSR(regulator=static(2.0)),))
    ]
    assert found[0][0]["val_loss"] == found[1][0]["val_loss"]


def test_the_loss_before_the_first_step_is_the_same(fit):
    class Losses(TinyTask):
        seen = None

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.seen = [*(self.seen or []), loss.item()]
            return loss

    tasks = [Losses(), Losses()]
    fit(task=tasks[0])
    fit(ASSR(regulator=static(2.0)), task=tasks[1])
    # The first reading is acted on after the first step.
    assert tasks[0].seen[0] == tasks[1].seen[0]
    assert tasks[0].seen[-1] != tasks[1].seen[-1]


def test_the_condition_number_is_brought_under_its_ceiling(fit):
    task = TinyTask(num_batches=60, lr=1e-3)
    U, S, Vh = torch.linalg.svd(task.net[2].weight.detach())
    S[-6:] = 1e-6
    task.net[2].weight.data.copy_(U @ torch.diag(S) @ Vh)
    regulator = Regulator(
        calibration="static",
        floor=0.01,
        condition_ceiling=50.0,
        thermostat=Thermostat(strength=1e3, smoothing=0.0, dwell=0),
    )
    fit(ASSR("net.2", regulator=regulator, spectrum_every_n_steps=5), task=task, max_steps=40)
    values = torch.linalg.svdvals(task.net[2].weight.detach())
    assert values[0] / values[-5] < 55


def test_a_healthy_run_is_calibrated_and_never_touched(fit):
    regulator = Regulator(first_step=2, num_steps=10)
    assr = ASSR(regulator=regulator)
    task, twin = (TinyTask(num_batches=60, lr=1e-3) for _ in range(2))
    fit(assr, task=task, max_steps=60)
    fit(task=twin, max_steps=60)
    assert assr.assr_stats["total_int"] == 0
    for ours, plain in zip(task.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, plain)


def test_a_spike_after_calibration_is_healed(fit, after_step):
    def damage(trainer):
        if trainer.global_step == 30:
            with_spike(trainer.lightning_module, 10.0)

    regulator = Regulator(first_step=2, num_steps=10, thermostat=Thermostat(strength=30.0))
    assr = ASSR("net.[25]", regulator=regulator)
    task = TinyTask(num_batches=300, lr=1e-3)
    fit(assr, after_step(damage), task=task, max_steps=230)
    assert relative_stable_rank(task.net[2].weight) > assr.interventions["net.2"].floor
    assert assr.interventions["net.2"].num_interventions > 0
    assert assr.interventions["net.5"].num_interventions == 0


def test_monitor_and_assr_share_the_measurements(fit):
    monitor, assr = SpectralMonitor(table_rows=0), ASSR(regulator=static(2.0))
    fit(monitor, assr)
    both = monitor.spectra.num_decompositions
    alone = SpectralMonitor(table_rows=0)
    fit(alone)
    assert both == alone.spectra.num_decompositions


def test_readings_stay_within_their_intervals_while_weights_are_moved(fit):
    class Check(SpectralMonitor):
        outside = 0
        truth: ClassVar[dict] = {}

        def on_readings(self, trainer, pl_module, step):
            for name, reading in self.readings.items():
                low, high = reading.spectral_norm_interval
                truth = self.truth[step][name]
                self.outside += not low <= truth <= high

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.truth[trainer.global_step] = {
                name: torch.linalg.matrix_norm(target.matrix().double(), 2).item()
                for name, target in self.spectra.targets.items()
            }
            super().on_train_batch_end(trainer, pl_module, *args)

        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            self.truth[0] = {
                name: torch.linalg.matrix_norm(target.matrix().double(), 2).item()
                for name, target in self.spectra.targets.items()
            }

    check = Check(table_rows=0)
    strong = static(0.9, thermostat=Thermostat(strength=50.0))
    task = with_spike(TinyTask(num_batches=100), 5.0)
    fit(check, ASSR(regulator=strong), task=task, max_steps=100)
    assert check.outside == 0


def test_sampling_is_private_and_reaches_all_layers(fit):
    torch.manual_seed(3)
    fit(task=TinyTask(num_batches=40), max_steps=40)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    assr = ASSR(regulator=static(2.0), sample_ratio=0.25)
    fit(assr, task=TinyTask(num_batches=40), max_steps=40)
    done = [layer.num_interventions for layer in assr.interventions.values()]
    assert sum(done) == 40
    assert min(done) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_summaries_have_the_names_of_the_original(fit):
    assr = ASSR(regulator=static(2.0))
    fit(assr)
    assert set(assr.assr_stats) == {
        *("rank_int", "cond_int", "total_int", "total_reg_loss", "steps_with_int")
    }
    assert set(assr.get_assr_summary()) == {
        *("rank_interventions", "condition_interventions", "total_interventions"),
        *("steps_with_intervention", "intervention_rate", "total_reg_loss"),
        *("avg_reg_loss_per_step", "num_linear_layers", "config"),
    }
    assert assr.get_assr_summary()["intervention_rate"] == 1.0
    assr.reset_assr_stats()
    assert assr.assr_stats["total_int"] == 0
    assert assr.get_assr_summary()["intervention_rate"] == 0.0
