"""Layers, steps and settings that mode switching cannot use: skipped, counted and named."""

import math

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from spectral_lightning.callbacks import SVDModeSwitch
from spectral_lightning.control import CalibratedPolicy, ScheduledPolicy, SeedPolicy
from spectral_lightning.spectra import read_mode_events
from spectral_lightning.testing.tasks import TinyTask

SIDES = ["two_sided", "left", "right", "block"]


def scheduled(schedule, principal=0.25):
    return ScheduledPolicy(schedule=schedule, principal=principal)


class Task(TinyTask):
    def __init__(self, optimizer=None):
        super().__init__(num_batches=400, optimizer=optimizer)


@pytest.mark.filterwarnings("ignore:SVDModeSwitch skips the analysis of net.[02] at step 1")
@pytest.mark.parametrize("policy", [SeedPolicy(preset="phase1"), CalibratedPolicy()])
def test_zero_layers_are_skipped_counted_and_come_alive(fit, policy):
    task = Task()
    nn.init.zeros_(task.net[7].weight)
    nn.init.zeros_(task.net[5].weight)
    switch = SVDModeSwitch(every_n_steps=1, policy=policy, protection="two_sided")
    with pytest.warns(UserWarning, match=r"skips the analysis of net.5 at step 1, .* is zero"):
        fit(switch, task=task, max_steps=30)
    assert task.net[5].weight.norm() > 0
    assert all(torch.isfinite(p).all() for p in task.parameters())
    assert switch.state_dict()["layers"]["net.5"]["num_skipped"] >= 1


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(fit, tmp_path):
    class Break(Task):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if batch_idx == 4 else loss

        def on_before_optimizer_step(self, optimizer):
            pass

        def on_after_backward(self):
            self.broken = not torch.isfinite(self.net[2].weight.grad).all()

        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            optimizer.step(closure)

    task = Break(lambda net: torch.optim.SGD(net.parameters(), lr=0.1))
    logger = CSVLogger(tmp_path)
    switch = SVDModeSwitch("net.2", 2, scheduled({2: "lowrank"}))
    with pytest.warns(UserWarning, match=r"skips the analysis of net.2 at step 4, as the gradient"):
        fit(switch, task=task, max_steps=6, logger=logger)
    events = read_mode_events(tmp_path / "lightning_logs/version_0/svd_mode.jsonl")
    skipped = [event.step for event in events if event.event == "skipped"]
    assert skipped[0] == 4


def test_a_step_that_the_gradient_scaler_skips_is_no_effect(fit, tmp_path):
    class Scaled(Task):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.inf if batch_idx == 2 else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    switch = SVDModeSwitch("net.2", 1, scheduled({0: "lowrank"}))
    with pytest.warns(UserWarning, match="skips the analysis of net.2 at step 2"):
        trainer = fit(switch, task=Scaled(), max_steps=6, precision=None, plugins=[precision])
    assert trainer.global_step == 6
    assert switch.modes["net.2"].mode == "lowrank"


def test_layers_that_cannot_be_switched_are_named_with_the_reason(fit, caplog):
    net = nn.Sequential(nn.Linear(12, 3), nn.Linear(3, 8), nn.Linear(8, 6))
    net[2].weight.requires_grad_(False)

    task = TinyTask(net)
    with pytest.warns(UserWarning, match="SVDModeSwitch has no effect"):
        fit(SVDModeSwitch(every_n_steps=1), task=task)
    assert "net.0 always trains as it is, since it has fewer than 4 rows or columns" in caplog.text
    assert "net.2 always trains as it is, since it is frozen" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"protection": "both"}, ValueError, "`protection` must be one of gradients, two_sided,"),
        ({"policy": "seed"}, TypeError, "`policy` must be a ModePolicy or None, got 'seed'"),
        (
            {"policy": SeedPolicy()},
            ValueError,
            "`protection` must be one of the weight's own directions for a policy",
        ),
        ({"every_n_steps": 0}, ValueError, "`every_n_steps` must be >= 1, got 0"),
    ],
)
def test_a_wrong_argument_is_refused_at_construction(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        SVDModeSwitch(**arguments)


def test_a_checkpoint_of_another_model_is_refused(fit, tmp_path):
    trainer = fit(SVDModeSwitch("*", 1, scheduled({0: "lowrank"})), task=Task(), max_steps=3)
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    (key,) = (key for key in checkpoint["callbacks"] if "SVDModeSwitch" in key)
    layers = checkpoint["callbacks"][key]["layers"]
    checkpoint["callbacks"][key]["layers"] = {f"old.{n}": state for n, state in layers.items()}
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="SVDModeSwitch state must be of this model, got layers"):
        fit(SVDModeSwitch("*", 1, scheduled({0: "lowrank"})), task=Task(), ckpt_path=path)
