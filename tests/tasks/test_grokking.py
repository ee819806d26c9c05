"""Grokking on the edge of numerical stability, and the task that it is seen on."""

import os
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import SGD, AdamW

from spectral_lightning.cli.main import SpectralCLI
from spectral_lightning.data import ModularArithmetic
from spectral_lightning.losses import CrossEntropy
from spectral_lightning.models import SymbolMLP
from spectral_lightning.optim import OrthogonalAdamW
from spectral_lightning.tasks import Classification
from spectral_lightning.testing.tasks import quiet_trainer

CONFIG = Path(__file__).parents[2] / "configs" / "grokking.yaml"


class StopWhenKnown(pl.Callback):
    """End the run once the held-out answers are known."""

    def on_validation_end(self, trainer, pl_module):
        trainer.should_stop |= bool(trainer.callback_metrics["valid/accuracy"] >= 0.99)


def grok(folder, optimizer, max_epochs, every):
    """Accuracies on the training and on the held-out pairs, and epochs taken."""
    torch.manual_seed(42)
    data = ModularArithmetic("add", modulus=113, train_fraction=0.4, seed=42)
    task = Classification(SymbolMLP(), partial(optimizer, lr=0.01, weight_decay=0.0))
    trainer = quiet_trainer(
        folder,
        StopWhenKnown(),
        max_epochs=max_epochs,
        limit_val_batches=1,
        check_val_every_n_epoch=every,
    )
    trainer.fit(task, data)
    metrics = trainer.callback_metrics
    return metrics["train/accuracy"], metrics["valid/accuracy"], trainer.current_epoch


@pytest.mark.slow
def test_orthogonal_gradients_generalise_where_adamw_memorises(tmp_path):
    """The middle of figure 1 of Prieto et al. (2025): about 110 epochs, at no extra cost."""
    train, valid, epochs = grok(tmp_path, OrthogonalAdamW, max_epochs=130, every=10)
    assert valid >= 0.99
    assert epochs <= 130
    assert train >= 0.99
    train, valid, _ = grok(tmp_path, AdamW, max_epochs=60, every=60)
    assert train >= 0.99
    assert valid < 0.05


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("options", "optimizer"),
    [([], OrthogonalAdamW), (["--model.optimizer=AdamW", "--model.optimizer.lr=0.01"], AdamW)],
)
def test_the_configuration_runs_with_and_without_orthogonal_gradients(
    tmp_path, monkeypatch, options, optimizer
):
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    cli = SpectralCLI(
        [
            *("fit", f"--config={CONFIG}", "--trainer.max_epochs=4", "--data.modulus=11"),
            *("--trainer.log_every_n_steps=2", "--trainer.check_val_every_n_epoch=2", *options),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
            "--model.model.num_symbols=11",
        ]
    )
    os.environ.clear()
    os.environ.update(before)
    assert type(cli.trainer.optimizers[0]) is optimizer
    expected = {"valid/accuracy", "collapse/cos/all", "collapse/valid/zero_loss/float32"}
    assert expected <= cli.trainer.callback_metrics.keys()


def tiny_fit(folder, loss=None, **settings):
    torch.manual_seed(0)
    data = ModularArithmetic(modulus=5, train_fraction=0.6)
    task = Classification(SymbolMLP(5, hidden_dims=[16]), partial(SGD, lr=0.1), loss)
    trainer = quiet_trainer(folder, max_steps=1, limit_val_batches=1, **settings)
    start = [weight.detach().clone() for weight in task.parameters()]
    trainer.fit(task, data)
    return task, data, trainer, start


@pytest.mark.parametrize("transform", ["softmax", "stablemax"])
def test_the_logged_loss_is_that_of_the_settings(tmp_path, transform):
    loss = CrossEntropy(transform=transform)
    task, data, trainer, _ = tiny_fit(tmp_path, loss)
    pairs, answers = data.valid_pairs[:]
    expected = loss(task(pairs), answers)
    torch.testing.assert_close(trainer.callback_metrics["valid/loss"], expected.detach())
    accuracy = (task(pairs).argmax(-1) == answers).float().mean()
    torch.testing.assert_close(trainer.callback_metrics["valid/accuracy"], accuracy)
    assert {"train/loss", "train/accuracy"} <= trainer.callback_metrics.keys()


def test_no_loss_is_the_cross_entropy_of_softmax(tmp_path):
    plain, ours = tiny_fit(tmp_path)[0], tiny_fit(tmp_path, CrossEntropy())[0]
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_follows_the_loss_of_the_settings(tmp_path):
    loss = CrossEntropy(transform="stablemax")
    task, data, _, start = tiny_fit(tmp_path, loss)
    model = SymbolMLP(5, hidden_dims=[16])
    model.load_state_dict(dict(zip(model.state_dict(), start, strict=True)))
    loss(model(data.train_pairs.pairs), data.train_pairs.answers).backward()
    for before, twin, after in zip(start, model.parameters(), task.parameters(), strict=True):
        torch.testing.assert_close(after.detach(), before - 0.1 * twin.grad)
