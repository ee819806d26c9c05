"""The closed loop on a network that learns something: damage, alarm, cure, and the loss."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from spectral_lightning.callbacks import ASSR
from spectral_lightning.control import Regulator
from spectral_lightning.linalg import gaussian_stable_rank
from spectral_lightning.testing.models import plant_spike_

WIDTH, STEPS, DAMAGED_AT = 64, 300, 120


class Regression(pl.LightningModule):
    """A network of three 64-wide layers that learns another one from noisy samples."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(STEPS + 8, 32, WIDTH, generator=generator)
        teacher = torch.randn(WIDTH, 4, generator=generator) / WIDTH**0.5
        noise = torch.randn(STEPS + 8, 32, 4, generator=generator)
        self.y = (self.x @ teacher).tanh() + 0.1 * noise
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()]
            self.net = nn.Sequential(*layers, nn.Linear(WIDTH, 4))

    def loss(self, x, y):
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def train_dataloader(self):
        pairs = list(zip(self.x[:STEPS], self.y[:STEPS], strict=True))
        return DataLoader(pairs, batch_size=None)

    def held_out(self):
        """Loss on samples that were not trained on."""
        with torch.no_grad():
            return self.loss(self.x[STEPS:], self.y[STEPS:]).item()


class Damage(pl.Callback):
    """Plant a spike of ten times the spectral norm; keep the stable ranks from then on."""

    def __init__(self):
        self.ranks = []

    def on_train_batch_end(self, trainer, task, *args):
        if trainer.global_step == DAMAGED_AT:
            plant_spike_(task.net[2].weight, 10.0)
        if trainer.global_step >= DAMAGED_AT:
            values = torch.linalg.svdvals(task.net[2].weight.detach())
            self.ranks.append((values.square().sum() / values[0] ** 2).item())


def run(fit, *callbacks):
    task = Regression()
    fit(*callbacks, task=task, max_steps=STEPS)
    return task.held_out()


@pytest.mark.parametrize("actuator", ["spectral_cap", "log_stable_rank"])
def test_the_alarm_clears_and_the_loss_is_no_worse_for_it(fit, actuator):
    damage = Damage()
    assr = ASSR("net.2", actuator, Regulator(first_step=20, num_steps=80), table_rows=0)
    healed = run(fit, damage, assr)
    done = assr.interventions["net.2"]
    null = gaussian_stable_rank(WIDTH, WIDTH)
    assert damage.ranks[0] < done.floor * null  # the alarm
    assert damage.ranks[-1] - 1 > 1.1 * (done.floor * null - 1)
    assert done.side == 0
    assert done.num_interventions > 0
    left_alone, never = run(fit, Damage()), run(fit)
    assert healed <= 1.005 * left_alone
    assert healed <= 1.05 * never
