"""Mode switching when a run goes on: other settings, other fits, other callbacks beside it."""

import math

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from spectral_lightning.callbacks import ASSR, SpectralMonitor, SVDModeSwitch
from spectral_lightning.callbacks.transformers_trainer import SpectralTrainerCallback
from spectral_lightning.control import ScheduledPolicy
from spectral_lightning.spectra import read_mode_events
from spectral_lightning.testing.tasks import TinyTask

LOW = ScheduledPolicy(schedule={0: "lowrank"}, principal=0.25)


class Task(TinyTask):
    def __init__(self, optimizer=None):
        super().__init__(num_batches=400, optimizer=optimizer)


@pytest.mark.parametrize("protection", ["two_sided", "factored"])
def test_clipping_bounds_every_step_in_low_rank_mode_too(fit, snapshots, protection):
    def sgd(net):
        return torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)

    sizes = []

    class Sizes(SVDModeSwitch):
        weight = None

        def on_weights(self, trainer, pl_module):
            super().on_weights(trainer, pl_module)
            now = self.spectra.targets["net.2"].matrix().clone()
            if self.weight is not None:
                sizes.append((now - self.weight).norm().item())
            self.weight = now

    policy = ScheduledPolicy(schedule={4: "lowrank", 12: "full"}, principal=0.25)
    switch = Sizes("net.2", 4, policy, protection)
    fit(switch, task=Task(sgd), max_steps=20, gradient_clip_val=1e-3)
    assert max(sizes) < 0.02  # 1e-3 / (1 - 0.9), and what momentum of factors adds


def test_an_overflow_of_the_scaler_leaves_no_trace_in_factored_layers(fit):
    class Scaled(Task):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.inf if batch_idx in (3, 4) else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    policy = ScheduledPolicy(schedule={1: "lowrank", 8: "full"}, principal=0.25)
    task = Scaled()
    with pytest.warns(UserWarning, match="skips the analysis of net.2 at step 4"):
        fit(
            SVDModeSwitch("net.2", 2, policy, "factored"),
            task=task,
            max_steps=12,
            precision=None,
            plugins=[precision],
        )
    assert all(torch.isfinite(parameter).all() for parameter in task.parameters())


def test_a_second_fit_of_a_factored_model_begins_whole(fit):
    task = Task()
    fit(SVDModeSwitch("net.2", 1, LOW, "factored"), task=task)
    assert task.net[2].left_factor.any()
    before = task.net[2].spectral_weight().detach().clone()
    kept = []

    class First(SVDModeSwitch):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            if trainer.global_step == 0:
                module = pl_module.net[2]
                kept.append((module.weight.detach().clone(), module.left_factor.any().item()))

    fit(First("net.2", 100, LOW, "factored"), task=task)
    assert torch.allclose(kept[0][0], before, atol=1e-6)
    assert not kept[0][1]
    assert not task.net[2].left_factor.any()


def test_a_factored_checkpoint_can_be_validated_in_a_new_process(fit, make_trainer, tmp_path):
    trainer = fit(SVDModeSwitch("net.2", 1, LOW, "factored"), task=Task())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    fresh = make_trainer(SVDModeSwitch("net.2", 1, LOW, "factored"), limit_val_batches=1)
    task = Task()
    fresh.validate(task, ckpt_path=tmp_path / "run.ckpt", verbose=False, weights_only=True)
    assert task.net[2].left_factor.any()


def test_another_protection_than_the_checkpoints_is_refused(fit, tmp_path):
    path = tmp_path / "run.ckpt"
    fit(SVDModeSwitch("net.2", 1, LOW, "two_sided"), task=Task()).save_checkpoint(path)
    with pytest.raises(ValueError, match="`protection` must be 'two_sided' as in the checkpoint"):
        fit(SVDModeSwitch("net.2", 1, LOW), task=Task(), ckpt_path=path, max_steps=9)


def test_a_policy_with_more_directions_starts_its_inputs_anew(fit, tmp_path):
    path = tmp_path / "run.ckpt"
    few = ScheduledPolicy(schedule={}, principal=0.1)
    fit(SVDModeSwitch("net.2", 1, few), task=Task()).save_checkpoint(path)
    switch = SVDModeSwitch("net.2", 1, LOW)
    fit(switch, task=Task(), ckpt_path=path, max_steps=9)
    assert switch.parts["net.2"].num_principal == 10
    assert switch.modes["net.2"].rank == 30


def test_without_refresh_what_is_judged_is_what_is_protected(fit):
    seen = []

    class Keep(SVDModeSwitch):
        def _finish(self, trainer, pending):
            (layer,) = pending
            seen.append((layer.analysis.triplets.left, layer.part))
            super()._finish(trainer, pending)

    fit(Keep("net.2", 5, LOW, "two_sided", refresh=False), task=Task(), max_steps=60)
    pairs = [(left, part) for left, part in seen if part is not None]
    assert len(pairs) > 5
    assert all(torch.equal(left, part.left) for left, part in pairs)


def test_readings_are_of_the_weight_with_its_part_put_back(fit):
    found = []

    class Look(SpectralMonitor):
        def on_readings(self, trainer, pl_module, step):
            super().on_readings(trainer, pl_module, step)
            found.append((step, self.readings["net.2"].frobenius_norm))

    class Keep(SVDModeSwitch):
        norms = {}  # noqa: RUF012

        def on_weights(self, trainer, pl_module):
            super().on_weights(trainer, pl_module)
            self.norms[trainer.global_step] = pl_module.net[2].weight.norm().item()

    keep = Keep("net.2", 2, LOW, "two_sided")
    fit(Look("net.2"), keep, task=Task(), max_steps=12)
    checked = [(step, norm) for step, norm in found if step > 2]
    assert len(checked) > 5
    assert all(norm == pytest.approx(keep.norms[step], rel=1e-6) for step, norm in checked)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_of_an_event_is_that_of_a_micro_batch(fit, tmp_path, accumulate):
    losses = []

    class Losses(Task):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    switch = SVDModeSwitch("net.2", 2, LOW)
    settings = {"logger": CSVLogger(tmp_path), "accumulate_grad_batches": accumulate}
    fit(switch, task=Losses(), max_steps=3, **settings)
    events = read_mode_events(tmp_path / "lightning_logs/version_0/svd_mode.jsonl")
    assert events[1].loss == pytest.approx(losses[3 * accumulate - 1])


def test_parts_of_one_weight_under_two_names_are_an_overlap(make_trainer):
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))
    both = (
        SVDModeSwitch("net.0", 1, LOW),
        SVDModeSwitch("net.0*", 1, LOW, splits={"net.0": {"q": 8, "k": 8}}),
    )
    with pytest.raises(ValueError, match=r"must not overlap, got 'net\.0' and 'net\.0\.q'"):
        make_trainer(*both).fit(TinyTask(net))


@pytest.mark.filterwarnings("ignore:ASSR has not acted on")
def test_a_thermostat_on_the_same_layers_is_warned_about(fit):
    with pytest.warns(UserWarning, match="SVDModeSwitch and ASSR share 1 layers, such as net.2"):
        fit(ASSR("net.2"), SVDModeSwitch("net.2", 1, LOW), task=Task())


def test_factors_need_an_optimizer_whose_means_can_be_carried(fit, caplog):
    with pytest.warns(UserWarning, match="SVDModeSwitch has no effect"):
        fit(
            SVDModeSwitch("net.2", 1, LOW, "factored"),
            task=Task(lambda net: torch.optim.Adamax(net.parameters())),
        )
    assert "is trained by Adamax, whose means cannot be carried along" in caplog.text


def test_the_hugging_face_trainer_shows_no_gradients():
    with pytest.raises(TypeError, match="must not need gradients, got SVDModeSwitch"):
        SpectralTrainerCallback(SVDModeSwitch())
