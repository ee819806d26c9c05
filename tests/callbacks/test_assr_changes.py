"""ASSR in runs that change: layers freeze and thaw, settings differ on resume, weights break."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from spectral_lightning.callbacks import ASSR
from spectral_lightning.control import ASSRConfig, Regulator, Thermostat
from spectral_lightning.testing.tasks import TinyTask

pytestmark = pytest.mark.filterwarnings("ignore:ASSR finds .* outside their bands at once")


def static(floor=2.0, **settings):
    thermostat = Thermostat(strength=30.0)
    return Regulator(calibration="static", floor=floor, thermostat=thermostat, **settings)


def test_a_layer_that_is_frozen_in_the_run_is_left_alone_from_then_on(fit, after_step):
    kept = []

    def freeze(trainer):
        weight = trainer.lightning_module.net[2].weight
        if trainer.global_step == 4:
            weight.requires_grad_(False)
            weight.grad = None
            kept.append(weight.clone())

    task, assr = TinyTask(num_batches=20), ASSR(regulator=static())
    fit(assr, after_step(freeze), task=task, max_steps=20)
    assert torch.equal(task.net[2].weight, kept[-1])
    assert assr.interventions["net.5"].num_interventions == 20


def test_a_layer_that_thaws_in_the_run_is_regulated_from_then_on(fit, caplog):
    class Thaw(pl.Callback):
        def on_train_batch_start(self, trainer, task, *args):
            if trainer.global_step == 5 and not task.net[2].weight.requires_grad:
                task.net[2].requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": task.net[2].parameters()})

    class Task(TinyTask):
        def configure_optimizers(self):
            self.net[2].requires_grad_(False)
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=self.lr)

    assr = ASSR(regulator=static())
    with caplog.at_level("INFO"):
        fit(Thaw(), assr, task=Task(num_batches=20), max_steps=15)
    assert "net.2 is measured but left alone, since it is frozen" in caplog.text
    assert "net.2 is trained from now on, and regulated" in caplog.text
    assert 5 <= assr.interventions["net.2"].num_interventions < 15
    assert assr.interventions["net.5"].num_interventions == 15


def test_bounds_given_on_resume_replace_those_of_the_checkpoint(fit, tmp_path):
    path = tmp_path / "run.ckpt"
    first = ASSR("net.2", regulator=static(0.01))
    fit(first, max_steps=3).save_checkpoint(path)
    assert first.interventions["net.2"].num_interventions == 0
    second = ASSR("net.2", regulator=static(2.0))
    fit(second, ckpt_path=path)
    assert second.interventions["net.2"].floor == 2.0
    assert second.interventions["net.2"].num_interventions > 0


def test_a_callback_that_joins_late_is_calibrated_all_the_same(fit, tmp_path):
    path = tmp_path / "run.ckpt"
    fit(max_steps=10, task=TinyTask(num_batches=40)).save_checkpoint(path)
    assr = ASSR("net.2", regulator=Regulator(first_step=2, num_steps=4))
    fit(assr, task=TinyTask(num_batches=40), max_steps=20, ckpt_path=path)
    assert assr.interventions["net.2"].floor is not None


def test_a_run_goes_on_with_all_its_layers_frozen(fit, tmp_path):
    path = tmp_path / "run.ckpt"
    fit(ASSR("net.2", regulator=static(0.01)), max_steps=3).save_checkpoint(path)
    task = TinyTask()
    task.net[2].requires_grad_(False)
    with pytest.warns(UserWarning, match="ASSR has no effect for now"):
        fit(ASSR("net.2", regulator=static(0.01)), task=task, ckpt_path=path)


def test_a_weight_that_breaks_before_its_calibration_is_named(fit, after_step):
    def damage(trainer):
        if trainer.global_step == 1:
            trainer.lightning_module.net[2].weight.data[0, 0] = math.nan

    assr = ASSR("net.2", regulator=Regulator(first_step=0, num_steps=3))
    with (
        pytest.warns(UserWarning, match=r"net\.2 is skipped, as the weight has a NaN"),
        pytest.warns(UserWarning, match="has not acted on 1 layers"),
    ):
        fit(assr, after_step(damage), max_steps=3)
    assert assr.interventions["net.2"].num_skipped > 0


@pytest.mark.filterwarnings("ignore:ASSR has no effect")
def test_an_optimizer_without_a_learning_rate_is_named(fit, caplog):
    class Rateless(torch.optim.SGD):
        def step(self, closure=None):
            rates = [group["lr"] for group in self.param_groups]
            for group in self.param_groups:
                group["lr"] = 0.01
            loss = super().step(closure)
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
            return loss

    class Task(TinyTask):
        def configure_optimizers(self):
            optimizer = Rateless(self.parameters(), lr=0.01)
            for group in optimizer.param_groups:
                group["lr"] = None
            return optimizer

    with caplog.at_level("INFO"):
        fit(ASSR("net.2", regulator=static()), task=Task(), max_steps=2)
    assert "since it is trained by an optimizer without a learning rate" in caplog.text


def test_a_convolution_in_channels_last_is_acted_on(fit):
    class Task(TinyTask):
        def __init__(self):
            net = nn.Sequential(
                nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 6, 2), nn.Flatten(), nn.Linear(6, 6)
            )
            super().__init__(net.to(memory_format=torch.channels_last))

    task, assr = Task(), ASSR("net.1", regulator=static(4.0))
    before = task.net[1].weight.detach().clone()
    fit(assr, task=task)
    assert task.net[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert assr.interventions["net.1"].applied > 0
    assert not torch.equal(before, task.net[1].weight)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"layers": ASSRConfig()}, "`layers` must be one or more globs, got ASSRConfig"),
        ({"regulator": ASSRConfig()}, "`regulator` must be a Regulator, got ASSRConfig"),
        ({"regulator": {"floor": 0.1}}, "`regulator` must be a Regulator, got {'floor'"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused_at_construction(arguments, sentence):
    with pytest.raises(TypeError, match=sentence):
        ASSR(**arguments)
