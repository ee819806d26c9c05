"""Orthogonal gradients in a real Trainer, with optimizers that know nothing of them."""

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
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from spectral_lightning.callbacks import OrthogonalGradient
from spectral_lightning.testing.host_sync import RefuseHostSync
from spectral_lightning.testing.tasks import (
    TinyNetwork,
    TinySteps,
    TinyTask,
    quiet_settings,
)

LR = 1.0  # steps so large that their rounding does not count


def cosine(one, other):
    one, other = one.detach().double(), other.detach().double()
    return ((one * other).sum() / one.norm() / other.norm()).item()


def sgd(net):
    return torch.optim.SGD(net.parameters(), LR)


def adamw(net):
    return torch.optim.AdamW(net.parameters(), 0.01, weight_decay=0.0)


def task(make=sgd, **settings):
    return TinyTask(optimizer=make, **settings)


class Steps(pl.Callback):
    """Cosine of each update to the weight of ``net.2``, and sizes; has to be last in the list."""

    def __init__(self):
        self.cosines, self.sizes = [], []

    def on_train_start(self, trainer, pl_module):
        weight = pl_module.net[2].weight

        def before(*args):
            self.old = weight.detach().clone()

        def after(*args):
            self.cosines.append(cosine(weight - self.old, self.old))
            self.sizes.append((weight - self.old).norm().item())

        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(before)
            optimizer.register_step_post_hook(after)


def largest(values):
    return max(map(abs, values))


def assert_same(one, other):
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_steps_of_sgd_become_orthogonal(fit, precision, clip):
    free, steps = Steps(), Steps()
    settings = {"precision": precision, "gradient_clip_val": clip}
    fit(free, task=task(), **settings)
    fit(OrthogonalGradient(), steps, task=task(), **settings)
    assert largest(free.cosines) > 1e-4
    assert largest(steps.cosines) < 1e-6
    assert len(steps.cosines) == 6


@pytest.mark.parametrize(("project", "is_orthogonal"), [("grad", False), ("update", True)])
def test_steps_of_adam_are_orthogonal_if_updates_are_projected(fit, project, is_orthogonal):
    seen, trained = [], task(adamw)
    weight = trained.net[2].weight
    seen.append(weight.detach().clone())

    class Note(pl.Callback):
        def on_train_batch_end(self, *args):
            seen.append(weight.detach().clone())

    fit(OrthogonalGradient(project=project), Note(), task=trained)
    found = [cosine(new - old, old) for old, new in pairwise(seen)]
    assert (largest(found) < 1e-6) == is_orthogonal


@pytest.mark.parametrize("project", ["grad", "update"])
def test_accumulated_batches_are_projected_as_one(fit, project):
    """All batches are equal, so that four of them have the gradient of one."""
    one, four, steps = task(), task(), Steps()
    fit(OrthogonalGradient(project=project), task=one, max_steps=1)
    fit(
        OrthogonalGradient(project=project),
        steps,
        task=four,
        max_steps=1,
        accumulate_grad_batches=4,
    )
    torch.testing.assert_close(four.state_dict(), one.state_dict())
    assert len(steps.cosines) == 1


@pytest.mark.parametrize("project", ["grad", "update"])
def test_a_step_that_the_scaler_skips_is_none(fit, project):
    class Overflow(TinyTask):
        def on_after_backward(self):
            if self.trainer.global_step == 2:
                self.net[2].weight.grad.fill_(math.inf)

    steps, trained = Steps(), Overflow(optimizer=sgd)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    fit(OrthogonalGradient(project=project), steps, task=trained, plugins=[plugin])
    assert len(steps.cosines) == 5
    assert all(torch.isfinite(p).all() for p in trained.parameters())


@pytest.mark.parametrize("project", ["grad", "both"])
def test_several_optimizers_each_project_their_own(fit, tmp_path, project):
    class Two(TinyTask):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), LR) for i in (2, 5)]

        def training_step(self, batch, batch_idx):
            optimizers = self.optimizers()
            self.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for i, optimizer in zip((2, 5), optimizers, strict=True):
                old = self.net[i].weight.detach().clone()
                optimizer.step()
                cosines.append(cosine(self.net[i].weight - old, old))

    cosines = []
    logger = CSVLogger(tmp_path)
    fit(OrthogonalGradient(project=project), task=Two(), max_steps=6, logger=logger)
    assert len(cosines) == 6
    assert largest(cosines) < 1e-6
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    found = [float(row[f"orthogonal/cos/net.{i}"]) for row in rows for i in (2, 5)]
    assert min(map(abs, found)) > 1e-4


def test_a_weight_before_a_normalisation_is_stepped_as_ever(fit):
    """Its scale has no effect, so that its gradient is orthogonal by itself (Euler)."""

    def make():
        net = TinyNetwork()
        net[1] = nn.LayerNorm(40, eps=0.0, elementwise_affine=False)
        nn.init.zeros_(net[0].bias)
        return TinyTask(net, optimizer=sgd)

    free, projected = make(), make()
    fit(task=free, max_steps=1)
    fit(OrthogonalGradient("net.0"), task=projected, max_steps=1)
    torch.testing.assert_close(projected.net[0].weight, free.net[0].weight)
    fit(OrthogonalGradient("net.7"), task=(other := make()), max_steps=1)
    assert not torch.allclose(other.net[7].weight, free.net[7].weight, atol=1e-4)


def test_of_an_embedding_only_rows_that_were_looked_up_change(fit, make_embedding_task):
    looked_up = make_embedding_task()
    looked_up._optimizer = sgd
    before = looked_up.net.embed.weight.detach().clone()
    callback = OrthogonalGradient()
    fit(callback, task=looked_up, max_steps=1)
    change = (looked_up.net.embed.weight.detach() - before).abs().sum(1)
    x, _ = next(iter(looked_up.train_dataloader()))
    rows = sorted(set(x[:, 0].abs().long().tolist()))
    assert change.nonzero().flatten().tolist() == rows
    assert len(rows) < 10
    assert callback.names == ("net.embed.weight", "net.head.weight")


@pytest.mark.parametrize("project", ["grad", "update", "both"])
def test_a_resumed_run_equals_an_uninterrupted_one(fit, tmp_path, project):
    make = lambda: OrthogonalGradient(project=project)  # noqa: E731
    whole, resumed = task(adamw), task(adamw)
    fit(make(), task=whole)
    fit(make(), task=task(adamw), max_steps=3).save_checkpoint(tmp_path / "run.ckpt")
    fit(make(), task=resumed, ckpt_path=tmp_path / "run.ckpt")
    assert_same(whole, resumed)


def test_loggers_get_the_cosines_before_the_projection(fit, tmp_path):
    gradients = []

    class Note(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            weight = pl_module.net[2].weight
            gradients.append(cosine(-weight.grad, weight))

    logger = CSVLogger(tmp_path)
    callback = OrthogonalGradient("net.[25]", project="both")
    fit(Note(), callback, task=task(), logger=logger, log_every_n_steps=2)
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    assert [float(row["orthogonal/cos/net.2"]) for row in rows] == pytest.approx(
        gradients[1::2], abs=1e-5
    )
    assert all(abs(float(row["orthogonal/update_cos/net.5"])) < 1e-5 for row in rows)
    assert callback.names == ("net.2.weight", "net.5.weight")


def test_globs_match_the_names_of_a_model_that_is_wrapped(fit):
    wrapped = task()
    wrapped.net[2] = checkpoint_wrapper(wrapped.net[2])
    callback = OrthogonalGradient("net.2")
    fit(callback, task=wrapped, max_steps=1)
    assert callback.names == ("net.2.weight",)


def test_the_host_waits_for_no_step(fit):
    class Refuse(TinyTask):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            with RefuseHostSync():
                optimizer.step(closure=closure)

    trainer = fit(OrthogonalGradient(project="both"), task=Refuse(optimizer=sgd))
    assert trainer.global_step == 6


@pytest.mark.parametrize("ends", ["well", "in an exception"])
def test_optimizers_are_left_alone_when_training_ends(fit, ends):
    class Break(TinyTask):
        def on_train_batch_end(self, *args):
            if ends != "well" and self.trainer.global_step == 3:
                raise RuntimeError("broken")

    optimizers, broken = [], Break(optimizer=sgd)
    broken._optimizer = lambda net: optimizers.append(sgd(net)) or optimizers[0]
    if ends == "well":
        fit(OrthogonalGradient(project="update"), task=broken)
    else:
        with pytest.raises(RuntimeError, match="broken"):
            fit(OrthogonalGradient(project="update"), task=broken)
    assert not optimizers[0]._optimizer_step_post_hooks


def test_yaml_builds_the_callback_and_builds_it_again(tmp_path):
    config = tmp_path / "config.yaml"
    arguments = {"layers": ["net.*"], "exclude": "net.7", "project": "update", "max_gain": 3.0}
    path = "spectral_lightning.callbacks.OrthogonalGradient"
    entry = {"class_path": path, "init_args": arguments}
    settings = quiet_settings(tmp_path, max_steps=2) | {"callbacks": [entry]}
    config.write_text(json.dumps({"trainer": settings}))  # which is YAML as well
    for _ in range(2):
        with patch.object(sys, "argv", ["fit", "--config", str(config)]):
            cli = LightningCLI(
                TinyTask, run=False, save_config_callback=None, seed_everything_default=False
            )
        (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, OrthogonalGradient))
        assert {name: getattr(callback, name) for name in arguments} == arguments
        config.write_text(cli.parser.dump(cli.config))


def test_it_works_in_the_older_package(fit, tmp_path):
    class Task(TinySteps, pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.num_batches, self.lr = TinyNetwork(), 6, 0.01

        def configure_optimizers(self):
            return sgd(self.net)

    older, newer = Task(), task()
    settings = quiet_settings(tmp_path, OrthogonalGradient(), max_steps=6)
    pytorch_lightning.Trainer(**settings).fit(older)
    fit(OrthogonalGradient(), task=newer)
    assert_same(older, newer)


def test_clipping_by_value_is_refused_where_it_undoes_the_projection(fit):
    clip = {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}
    with pytest.raises(ValueError, match=r"must not be followed by `gradient_clip_algorithm=.*Ada"):
        fit(OrthogonalGradient(), task=task(), **clip)
    steps = Steps()
    fit(steps, OrthogonalGradient(project="update"), task=task(), **clip)
    assert len(steps.cosines) == 6


def test_strategies_that_flatten_parameters_are_refused(fit):
    class DeepSpeedStrategy(SingleDeviceStrategy):
        """The name is what counts."""

    with pytest.raises(ValueError, match="must see weights and gradients in their shapes, which D"):
        fit(OrthogonalGradient(), task=task(), strategy=DeepSpeedStrategy("cpu"))


def test_what_has_no_effect_is_warned_of(fit):
    frozen = task()
    frozen.net[2].requires_grad_(False)
    with pytest.warns(UserWarning, match="OrthogonalGradient has no effect: `layers` selects no"):
        fit(OrthogonalGradient("net.2"), task=frozen)
    coupled = task(lambda net: torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1))
    with pytest.warns(UserWarning, match="OrthogonalGradient: The weight decay of SGD is added to"):
        fit(OrthogonalGradient(), task=coupled)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`project` must be one of grad, update, both, got 'all'"):
        OrthogonalGradient(project="all")
    with pytest.raises(ValueError, match=r"`max_gain` must be >= 1, got 0\.5"):
        OrthogonalGradient(max_gain=0.5)
