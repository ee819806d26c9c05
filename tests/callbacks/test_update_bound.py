"""An update bound in a real Trainer: optimizer steps are bounded, and nothing else is."""

import csv
import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision

from spectral_lightning.callbacks import RankAdaptation, UpdateBound
from spectral_lightning.testing.host_sync import RefuseHostSync
from spectral_lightning.testing.ranks import Plan, low_rank_task
from spectral_lightning.testing.tasks import TinySteps, TinyTask, quiet_settings

BOUND = 0.05


def bound(size=BOUND, layers="net.[25]"):
    return UpdateBound(layers, max_update_norm=size)


def huge_steps(**settings):
    """A task whose steps are far outside the bound."""
    return low_rank_task(**{"lr": 3.0} | settings)


def weight(task, name="net.2"):
    left, right = task.get_submodule(name).factors()
    return (left.double() @ right.double()).detach()


def distance(first, second):
    return torch.linalg.matrix_norm(first - second, 2).item()


def moves(weights):
    return [distance(one, other) for one, other in pairwise(weights)]


def assert_same(*tasks):
    for one, other in zip(*(task.state_dict().values() for task in tasks), strict=True):
        assert torch.equal(one, other)


class Steps(pl.Callback):
    """How far each optimizer step moved a weight, by name; has to be last in the list."""

    def __init__(self, *names):
        self.names = names or ("net.2", "net.5")
        self.sizes, self.scheduled = [], []

    def on_train_start(self, trainer, pl_module):
        def before(*args):
            self.old = {name: weight(pl_module, name) for name in self.names}

        def after(*args):
            self.sizes += [distance(weight(pl_module, n), self.old[n]) for n in self.names]

        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(before)
            optimizer.register_step_post_hook(after)


def test_no_step_moves_a_weight_further_than_allowed(fit):
    free, steps = Steps(), Steps()
    fit(free, task=huge_steps())
    fit(bound(), steps, task=huge_steps())
    assert min(free.sizes) > 10 * BOUND
    assert len(steps.sizes) == 12
    assert all(0.01 * BOUND < size <= BOUND for size in steps.sizes)


def test_only_the_layers_that_are_selected_are_bounded(fit):
    steps, others = Steps("net.2"), Steps("net.5")
    fit(bound(layers="net.2"), steps, others, task=huge_steps())
    assert max(steps.sizes) <= BOUND < min(others.sizes)


def test_steps_within_the_bound_are_those_of_a_run_without_it(fit):
    free, task = low_rank_task(), low_rank_task()
    fit(task=free)
    fit(bound(1e3), task=task)
    assert_same(free, task)


@pytest.mark.parametrize("shrink", ["cut", "fade"])
def test_changes_of_rank_are_not_bounded_in_either_order(fit, after_step, shrink):
    """A rank of 8 becomes 2 after step 2, which moves the weights further than a step may."""
    tasks = []
    for is_first in (True, False):
        plan = Plan(ranks={2: 2, 5: 6})
        ranks = RankAdaptation("net.[25]", plan, 1, shrink, fade_steps=2, probe_steps=2)
        callbacks = [bound(), ranks] if is_first else [ranks, bound()]
        task, steps, seen = huge_steps(num_batches=20), Steps(), []
        note = after_step(lambda trainer, task=task, seen=seen: seen.append(weight(task)))
        fit(*callbacks, steps, note, task=task, max_steps=8)
        assert set(ranks.ranks.values()) == {6}
        assert max(moves(seen)) > 4 * BOUND
        assert max(steps.sizes) <= BOUND
        tasks.append(task)
    assert_same(*tasks)


def test_accumulated_batches_are_one_step(fit, after_step):
    task, steps = huge_steps(num_batches=12), Steps()
    seen = [weight(task)]
    note = after_step(lambda trainer: seen.append(weight(task)))
    fit(bound(), steps, note, task=task, max_steps=3, accumulate_grad_batches=4)
    assert [size > 0 for size in moves(seen)] == [False, False, False, True] * 3
    assert len(steps.sizes) == 6
    assert max(steps.sizes) <= BOUND


def test_half_precision_parameters_are_bounded_up_to_their_rounding(fit):
    steps = Steps("net.2")
    fit(bound(1.0), steps, task=huge_steps(), precision="bf16-true")
    assert all(0.1 < size <= 1.1 for size in steps.sizes)


def test_a_step_that_the_scaler_skips_is_none(fit):
    class Overflow(TinyTask):
        def on_after_backward(self):
            if self.trainer.global_step == 2:
                self.net[2].left_factor.grad.fill_(math.inf)

    task, steps = Overflow(low_rank_task().net, lr=3.0), Steps("net.2")
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    trainer = fit(bound(), steps, task=task, plugins=[plugin])
    assert trainer.global_step == 6
    assert len(steps.sizes) == 5
    assert max(steps.sizes) <= BOUND
    assert weight(task).isfinite().all()


class Apart(TinyTask):
    """Both factors of a layer have their own optimizer, which step by turns."""

    def __init__(self, net):
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        layer = self.net[2]
        factors = (layer.left_factor, layer.right_factor)
        return [torch.optim.SGD([factor], lr=1e3) for factor in factors]


def test_several_optimizers_are_bounded_each(fit):
    steps = Steps("net.2")
    fit(bound(), steps, task=Apart(low_rank_task().net), max_steps=12)
    assert len(steps.sizes) == 12
    assert all(0.01 * BOUND < size <= BOUND for size in steps.sizes)


class Inner(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


class Outer(Inner):
    """An optimizer whose step is more than that of the class it inherits from."""

    def step(self, closure=None):
        self.shrink()
        found = super().step(closure)
        self.shrink()
        return found

    @torch.no_grad()
    def shrink(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.mul_(0.5)


def test_a_step_around_the_step_of_a_base_class_is_bounded_whole(fit, after_step):
    task = low_rank_task(optimizer=lambda net: Outer(net.parameters()))
    Inner(task.net.parameters())  # from now on a step of `Outer` runs the hooks twice
    seen = [weight(task)]
    fit(bound(), after_step(lambda trainer: seen.append(weight(task))), task=task)
    assert all(0.01 * BOUND < size <= BOUND for size in moves(seen))


def test_a_layer_is_bounded_from_when_it_is_thawed(fit):
    class Thaw(TinyTask):
        def on_train_batch_start(self, batch, batch_idx):
            self.net[2].requires_grad_(batch_idx >= 3)

    task, steps = Thaw(low_rank_task().net, lr=3.0), Steps("net.2")
    task.net[2].requires_grad_(False)
    fit(bound(), steps, task=task)
    assert steps.sizes[:3] == [0, 0, 0]
    assert all(0 < size <= BOUND for size in steps.sizes[3:])


def test_a_resumed_run_equals_an_uninterrupted_one(fit, tmp_path):
    whole, resumed = huge_steps(), huge_steps()
    fit(bound(), task=whole)
    fit(bound(), task=huge_steps(), max_steps=3).save_checkpoint(tmp_path / "run.ckpt")
    fit(bound(), task=resumed, ckpt_path=tmp_path / "run.ckpt")
    assert_same(whole, resumed)


def test_optimizers_are_left_alone_when_training_ends_well_or_not(fit):
    class Break(TinyTask):
        def on_train_batch_end(self, *args):
            found.append(self.trainer.optimizers[0])
            assert found[-1]._optimizer_step_pre_hooks
            if self.trainer.max_steps == 3 == self.trainer.global_step:
                raise RuntimeError("broken")

    found = []
    fit(bound(), task=Break(low_rank_task().net), max_steps=2)
    with pytest.raises(RuntimeError, match="broken"):
        fit(bound(), task=Break(low_rank_task().net), max_steps=3)
    for optimizer in found:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


def test_loggers_get_the_smallest_scale_since_the_last_entry(fit, tmp_path):
    class Jump(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.optimizers[0].param_groups[0]["lr"] = 5.0 if batch_idx == 2 else 1e-5

    logger, callback = CSVLogger(tmp_path), UpdateBound(max_update_norm=0.5)
    fit(callback, Jump(), task=low_rank_task(), logger=logger, log_every_n_steps=2)
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    for name in ("net.2", "net.5"):
        found = [float(row[f"update_bound/scale/{name}"]) for row in rows]
        assert [found[0], found[2]] == [1, 1]
        assert 0 < found[1] < 1
    assert callback.names == ("net.2", "net.5")


def test_the_host_waits_for_no_step(fit):
    class Refuse(TinyTask):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            with RefuseHostSync():
                optimizer.step(closure=closure)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=100.0)

    assert fit(bound(), task=Refuse(low_rank_task().net)).global_step == 6


def test_yaml_builds_the_callback_and_builds_it_again(tmp_path):
    config = tmp_path / "config.yaml"
    arguments = {"layers": ["net.2"], "max_update_norm": 0.1}
    entry = {"class_path": "spectral_lightning.callbacks.UpdateBound", "init_args": arguments}
    settings = quiet_settings(tmp_path, max_steps=2) | {"callbacks": [entry]}
    config.write_text(json.dumps({"trainer": settings}))  # which is YAML as well
    for _ in range(2):
        with patch.object(sys, "argv", ["fit", "--config", str(config)]):
            cli = LightningCLI(
                TinyTask, run=False, save_config_callback=None, seed_everything_default=False
            )
        (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, UpdateBound))
        assert (callback.layers, callback.max_update_norm) == (["net.2"], 0.1)
        config.write_text(cli.parser.dump(cli.config))


def test_it_works_in_the_older_package(fit, tmp_path):
    class Task(TinySteps, pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.num_batches, self.lr = low_rank_task().net, 6, 3.0

    older, newer = Task(), huge_steps()
    settings = quiet_settings(tmp_path, bound(), max_steps=6)
    pytorch_lightning.Trainer(**settings).fit(older)
    fit(bound(), task=newer)
    assert torch.equal(weight(older), weight(newer))


def test_without_low_rank_layers_there_is_a_warning(fit):
    with pytest.warns(UserWarning, match="UpdateBound has no effect: `layers` selects no train"):
        fit(bound(), task=TinyTask())


@pytest.mark.parametrize("size", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_that_is_no_positive_number_is_refused(size):
    with pytest.raises(ValueError, match="`max_update_norm` must be finite and > 0, got "):
        UpdateBound(max_update_norm=size)
