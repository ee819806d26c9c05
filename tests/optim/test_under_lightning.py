"""MuonAdamW inside Lightning's automatic optimization."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from spectral_lightning.optim import MuonAdamW, WarmupConstantWarmdown, parameter_groups

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.13
]


class Regression(pl.LightningModule):
    def __init__(self, max_norms):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        self.max_norms = max_norms

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return (self.model(inputs) - targets).square().mean()

    def configure_optimizers(self):
        optimizer = MuonAdamW(parameter_groups(self.model))
        schedule = WarmupConstantWarmdown(optimizer, num_steps=8)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        gradients = [p.grad.flatten() for p in self.parameters() if p.grad is not None]
        self.max_norms.append(torch.cat(gradients).norm().item())


def fit(seed=0, **settings):
    torch.manual_seed(seed)
    module = Regression(max_norms=[])
    data = torch.utils.data.TensorDataset(torch.randn(32, 4), 10 * torch.randn(32, 2))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    return trainer, module


def test_one_global_step_per_batch():
    trainer, _ = fit()
    assert trainer.global_step == 8
    assert trainer.optimizers[0].param_groups[0]["step"] == 8


def test_accumulation_makes_one_step_of_several_batches():
    trainer, _ = fit(accumulate_grad_batches=4)
    assert trainer.global_step == 2
    assert trainer.optimizers[0].param_groups[0]["step"] == 2


def test_clipping_bounds_the_gradients_that_the_optimizer_sees():
    _, unclipped = fit()
    _, clipped = fit(gradient_clip_val=0.5)
    assert max(unclipped.max_norms) > 1
    assert max(clipped.max_norms) <= 0.5 + 1e-5


def test_the_schedule_reaches_the_end_of_its_fall():
    trainer, _ = fit()
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.0, 0.0, 0.0]
