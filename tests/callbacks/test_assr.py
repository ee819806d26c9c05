"""ASSR as its user meets it: what it touches, when, and that it moves what it reads."""

import math
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from spectral_lightning.callbacks import ASSR, SpectralMonitor
from spectral_lightning.callbacks.assr_layer import Layer
from spectral_lightning.callbacks.assr_steps import Stepper
from spectral_lightning.control import CalibrationWindow, Regulator, Thermostat
from spectral_lightning.control.regulator import RegulatorState
from spectral_lightning.control.thermostat import Band, ThermostatState
from spectral_lightning.linalg import gaussian_stable_rank, leading_eigenpairs
from spectral_lightning.spectra import Reading, VectorCache, find_targets
from spectral_lightning.testing import RefuseHostSync
from spectral_lightning.testing.tasks import TinyTask

pytestmark = pytest.mark.filterwarnings("ignore:ASSR finds .* outside their bands at once")

BROKEN = {
    "name": "net.2",
    "step": 1,
    "shape": (40, 40),
    "spectral_norm": 8.0,
    "spectral_norm_interval": (8.0, 8.0),
    "frobenius_norm": 8.8,
    "stable_rank": 1.2,
    "relative_stable_rank": 0.12,
}
STATE = RegulatorState(
    bands=(Band(floor=0.5), Band()), rank=ThermostatState(side=-1, severity=1.0, strength=5.0)
)


def static(floor=0.8, **settings):
    return Regulator(calibration="static", floor=floor, **settings)


def relative_stable_rank(weight):
    values = torch.linalg.svdvals(weight.detach().double())
    null = gaussian_stable_rank(*weight.shape)
    return (values.square().sum() / values[0] ** 2).item() / null


def with_spike(task, size):
    """Give `net.2` a rank-one spike of `size` times its spectral norm."""
    weight = task.net[2].weight.data
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(n, generator=generator) for n in weight.shape)
    edge = torch.linalg.matrix_norm(weight, 2)
    weight += size * edge * torch.outer(u / u.norm(), v / v.norm())
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


def test_the_step_does_not_depend_on_the_optimizer(fit):
    changes = []
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):

        class Task(TinyTask):
            def configure_optimizers(self, optimizer=optimizer):
                return optimizer(self.net.parameters(), lr=self.lr, weight_decay=0.0)

            def training_step(self, batch, batch_idx):
                return 0.0 * super().training_step(batch, batch_idx)  # gradients are exactly zero

        task, twin = with_spike(Task(lr=0.01), 4.0), with_spike(TinyTask(), 4.0)
        fit(ASSR("net.2", regulator=static(0.3)), task=task, max_steps=4)
        changes.append(task.net[2].weight.detach() - twin.net[2].weight.detach())
        assert relative_stable_rank(task.net[2].weight) > relative_stable_rank(twin.net[2].weight)
    assert torch.linalg.matrix_rank(changes[0], rtol=1e-3) == 1
    assert torch.equal(*changes)


def test_the_evaluation_loss_is_that_of_the_weights_alone(fit):
    task = TinyTask()
    fit(ASSR(regulator=static(2.0)), task=task)
    (batch,) = task.val_dataloader()
    twin = TinyTask()
    twin.load_state_dict(task.state_dict())
    assert task.eval().training_step(batch, 0) == twin.eval().training_step(batch, 0)


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


def test_one_step_for_each_optimizer_step_under_accumulation(fit):
    assr = ASSR("net.2", regulator=static(2.0))
    fit(assr, max_steps=4, accumulate_grad_batches=3)
    assert assr.interventions["net.2"].num_interventions == 4
    assert assr.assr_stats["steps_with_int"] == 4


def test_a_step_that_the_gradient_scaler_skips_is_skipped(fit):
    class Overflowing(TinyTask):
        def training_step(self, batch, batch_idx):
            factor = math.inf if batch_idx in (1, 3) else 1.0
            return factor * super().training_step(batch, batch_idx)

    assr = ASSR("net.2", regulator=static(2.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    task = Overflowing(lr=1e-3)
    fit(assr, task=task, max_steps=6, plugins=[plugin])
    assert assr.interventions["net.2"].num_interventions == 4
    assert torch.isfinite(task.net[2].weight).all()


def test_an_optimizer_that_handles_the_scaler_itself_is_understood():
    from spectral_lightning.callbacks.step_sizes import StepSizes

    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.5, fused=True)
    sizes = StepSizes()
    sizes.watch([optimizer])
    parameter.grad = torch.ones(2)
    for found, expected in ((1.0, 0.0), (0.0, 0.5)):
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.tensor(found)
        optimizer.step()
        assert float(sizes.of(parameter)) == expected
    sizes.close()
    assert not optimizer._optimizer_step_post_hooks


def test_the_learning_rate_is_that_of_the_step(fit):
    class Scheduled(TinyTask):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= 2))
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    assr = ASSR("net.2", regulator=static(2.0))
    task = Scheduled()
    before = task.net[2].weight.detach().clone()
    fit(assr, task=task, max_steps=2)
    torch.testing.assert_close(task.net[2].weight.detach(), before, rtol=0, atol=0)
    fit(assr := ASSR("net.2", regulator=static(2.0)), task=(task := Scheduled()), max_steps=3)
    assert not torch.equal(task.net[2].weight, before)
    assert assr.interventions["net.2"].applied > 0


def test_a_step_is_never_larger_than_allowed(fit, snapshots):
    task = with_spike(TinyTask(lr=0.1), 10.0)
    strong = static(0.5, thermostat=Thermostat(strength=1e6))
    assr = ASSR("net.2", regulator=strong, max_relative_step=0.01)

    class Still(TinyTask):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=self.lr)

        def training_step(self, batch, batch_idx):
            return 0.0 * super().training_step(batch, batch_idx)

    task = with_spike(Still(lr=0.1), 10.0)
    fit(assr, snapshots, task=task)
    weights = [snapshots.weights[step]["net.2"] for step in sorted(snapshots.weights)]
    for old, new in pairwise(weights[1:]):
        size = (new - old).norm() / old.norm()
        assert 0.009 < size < 0.01001


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


@pytest.mark.parametrize("actuator", ["spectral_cap", "log_stable_rank", "legacy_l2"])
def test_a_step_never_waits_for_the_device(actuator, monkeypatch):
    def by_products(matrix):
        values, rows = leading_eigenpairs(matrix, matrix.shape[-1])
        return values.flip(-1), rows.flip(-2).mT

    # The route of an accelerator, where `eigh` would wait for its error code.
    monkeypatch.setattr(torch.linalg, "eigh", by_products)
    task = with_spike(TinyTask(), 8.0)
    target = next(t for t in find_targets(task).targets if t.name == "net.2")
    vectors = VectorCache({"net.2": target})
    layer = Layer(target, reading=Reading(**BROKEN), state=STATE)
    stepper = Stepper(actuator, num_vectors=4, max_relative_step=0.05, hysteresis=0.1)
    before = relative_stable_rank(target.matrix())
    with RefuseHostSync():
        assert all(stepper.against_stable_rank(layer, vectors, 0.1) for _ in range(3))
    after = relative_stable_rank(target.matrix())
    assert after == pytest.approx(before, rel=1e-4) if actuator == "legacy_l2" else after > before


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


def test_frozen_and_computed_layers_are_measured_and_left_alone(fit):
    task = TinyTask()
    task.net[2].weight.requires_grad_(False)
    nn.utils.parametrizations.weight_norm(task.net[5])
    assr = ASSR(regulator=static(2.0))
    fit(assr, task=task)
    assert set(assr.interventions) == {"net.0", "net.7"}
    assert {"net.2", "net.5"} <= set(assr.names)


def test_a_layer_of_rank_one_is_named_and_left_alone(fit):
    class Frozen(TinyTask):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.0)

    task = Frozen()
    weight = task.net[2].weight.data
    weight.copy_(torch.outer(torch.ones(40), torch.arange(40.0) + 1) / 40)
    before = weight.clone()
    assr = ASSR("net.2", regulator=static(0.5))
    with pytest.warns(UserWarning, match="net.2 is exactly of rank one, and no step can revive it"):
        fit(assr, task=task)
    assert torch.equal(weight, before)
    assert assr.interventions["net.2"].num_interventions == 0


def test_a_weight_that_breaks_is_skipped_counted_and_named(fit, after_step):
    def damage(trainer):
        if trainer.global_step == 3:
            trainer.lightning_module.net[2].weight.data[0, 0] = math.nan

    assr = ASSR("net.2", regulator=static(2.0))
    with pytest.warns(UserWarning, match="net.2 is skipped, as the weight has a NaN"):
        fit(assr, after_step(damage), task=TinyTask(num_batches=10), max_steps=8)
    assert assr.interventions["net.2"].num_skipped > 0


def test_a_layer_that_starts_at_zero_is_held_until_it_moves(fit):
    task = TinyTask()
    nn.init.zeros_(task.net[7].weight)
    assr = ASSR(regulator=static(0.01))
    fit(assr, task=task)  # a warning would be an error
    assert torch.isfinite(task.net[7].weight).all()
    assert task.net[7].weight.any()
    assert assr.interventions["net.7"].num_skipped == 0


def test_bf16_weights_are_warned_about_and_still_move(fit):
    task = with_spike(TinyTask(num_batches=100, lr=1e-3), 4.0)
    assr = ASSR("net.2", regulator=static(0.3, thermostat=Thermostat(strength=30.0)))
    with pytest.warns(UserWarning, match="ASSR acts on 1 layers in half precision"):
        fit(assr, task=task, max_steps=100, precision="bf16-true")
    assert relative_stable_rank(task.net[2].weight) > 0.25


def test_a_run_that_ends_before_calibration_says_so(fit):
    with pytest.warns(UserWarning, match="the run ended before they were calibrated"):
        fit(ASSR())


def test_a_checkpoint_of_another_model_is_refused(fit, make_trainer, tmp_path):
    trainer = fit(ASSR("net.0", regulator=static(2.0)))
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    path = tmp_path / "other.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    states = checkpoint["callbacks"]
    (key,) = (key for key in states if key.startswith("ASSR"))
    states[key]["layers"] = {"model.encoder": states[key]["layers"]["net.0"]}
    torch.save(checkpoint, path)
    again = make_trainer(ASSR("net.0", regulator=static(2.0)), max_steps=8)
    with pytest.raises(ValueError, match="ASSR state must be of this model, got layers such as"):
        again.fit(TinyTask(), ckpt_path=path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"actuator": "l2"}, "`actuator` must be one of spectral_cap, log_stable_rank, legacy_l2"),
        ({"max_relative_step": 0.0}, r"`max_relative_step` must be in \(0, 1\], got 0.0"),
        ({"sample_ratio": 1.5}, r"`sample_ratio` must be in \(0, 1\], got 1.5"),
        ({"num_vectors": 0}, "`num_vectors` must be >= 1, got 0"),
        ({"table_rows": -1}, "`table_rows` must be >= 0, got -1"),
        ({"log_every_n_steps": 0}, "`log_every_n_steps` must be >= 1, got 0"),
        ({"every_n_steps": 0}, "`every_n_steps` must be >= 1, got 0"),
    ],
)
def test_a_wrong_argument_is_refused_at_construction(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        ASSR(**arguments)


def test_settings_that_cannot_work_together_are_refused():
    with pytest.raises(ValueError, match="`ceiling` needs an actuator that can lower"):
        ASSR(actuator="spectral_cap", regulator=static(0.1, ceiling=2.0))
    with pytest.raises(ValueError, match="`condition_ceiling` needs exact spectra"):
        ASSR(regulator=static(0.1, condition_ceiling=10.0), spectrum_every_n_steps=None)
    with pytest.raises(ValueError, match=r"`floor` must be below `ceiling`, got 0.5 and 0.1"):
        static(0.5, ceiling=0.1)
    with pytest.raises(ValueError, match="`calibration='static'` needs a `floor`"):
        Regulator(calibration="static")
    with pytest.raises(ValueError, match="`calibration` must be 'window' or 'static', got 'warm'"):
        Regulator(calibration="warm")
    with pytest.raises(ValueError, match="`strength` must be >= 0 and finite, got -1"):
        Thermostat(strength=-1)
    with pytest.raises(ValueError, match=r"`ratio` must be in \(0, 1\), got 1.5"):
        CalibrationWindow(ratio=1.5)
