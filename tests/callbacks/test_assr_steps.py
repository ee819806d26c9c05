"""When ASSR takes a step, and how large it is."""

import math
from itertools import pairwise

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from spectral_lightning.callbacks import ASSR
from spectral_lightning.callbacks.assr_layer import Layer
from spectral_lightning.callbacks.assr_steps import Stepper
from spectral_lightning.control import Regulator, Thermostat
from spectral_lightning.control.regulator import RegulatorState
from spectral_lightning.control.thermostat import Band, ThermostatState
from spectral_lightning.linalg import leading_eigenpairs
from spectral_lightning.spectra import Reading, VectorCache, find_targets
from spectral_lightning.testing import RefuseHostSync
from spectral_lightning.testing.models import plant_spike_, relative_stable_rank
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


def with_spike(task, size):
    """Give `net.2` a rank-one spike of `size` times its spectral norm."""
    plant_spike_(task.net[2].weight, size)
    return task


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
