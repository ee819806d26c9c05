"""The smallest task that a Lightning Trainer can fit, and a Trainer that keeps quiet.

An epoch is the same batch, over and over, and the initial weights come from a private seed: runs
are equal to the bit, also when one of them is resumed in the middle of an epoch, on any number of
processes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader


class TinyNetwork(nn.Sequential):
    """Four linear layers: two of one shape, one wide, one narrow.

    Args:
        width: Size of the hidden layers. From 33 on their spectral norm has to be iterated for;
            a smaller side is projected on whole, which is exact (`spectra.tracker`).
        dropout: Probability of dropout, which draws from the global random state.
        seed: Seed of the initial weights.
    """

    def __init__(self, width: int = 40, dropout: float = 0.0, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(
                nn.Linear(12, width),
                nn.Tanh(),
                nn.Linear(width, width),
                nn.Dropout(dropout),
                nn.Tanh(),
                nn.Linear(width, width),
                nn.Tanh(),
                nn.Linear(width, 6),
            )


class TinyBatches(DataLoader[tuple[Tensor, Tensor]]):
    """One batch of ``sin(x A)``, shapes ``(8, 12)`` and ``(8, 6)``, again and again.

    Args:
        num_batches: Batches of an epoch.
    """

    def __init__(self, num_batches: int) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(8, 12, generator=generator)
        y = torch.sin(x @ torch.randn(12, 6, generator=generator))
        super().__init__([(x, y)] * num_batches, batch_size=None)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: where an epoch is resumed makes no difference to equal batches."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Tell Lightning that an epoch can be resumed."""


class TinySteps:
    """The steps of `TinyTask`, for a LightningModule of any package to inherit.

    Set `net`, `num_batches` and `lr` in its constructor.
    """

    net: nn.Module
    num_batches: int
    lr: float

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean squared error."""
        x, y = batch
        return nn.functional.mse_loss(self.net(x).float(), y.float())

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Run the network."""
        self.net(batch[0])

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer that has a state, and moves the weights visibly at every step."""
        return torch.optim.AdamW(self.net.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the same batch `num_batches` times."""
        return TinyBatches(self.num_batches)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return one batch."""
        return TinyBatches(1)

    test_dataloader = val_dataloader


class TinyTask(TinySteps, pl.LightningModule):
    """Regression by four linear layers; a step takes less than a millisecond.

    Layers are named ``net.0``, ``net.2``, ``net.5`` and ``net.7``, unless another network is given.

    Args:
        net: Network to train on inputs ``(8, 12)`` and targets ``(8, 6)``; None for `TinyNetwork`.
        dropout: Probability of dropout in `TinyNetwork`.
        num_batches: Batches of an epoch.
        lr: Learning rate of AdamW.
        optimizer: Makes another optimizer from the network; None for AdamW.
    """

    def __init__(
        self,
        net: nn.Module | None = None,
        dropout: float = 0.0,
        num_batches: int = 6,
        lr: float = 0.01,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        self.net = TinyNetwork(dropout=dropout) if net is None else net
        self.num_batches = num_batches
        self.lr = lr
        self._optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer asked for."""
        return (
            super().configure_optimizers() if self._optimizer is None else self._optimizer(self.net)
        )


def quiet_settings(folder: str | Path, *callbacks: Callback, **settings: Any) -> dict[str, Any]:
    """Return arguments of a Trainer for a short run on the CPU that prints and writes nothing.

    Args:
        folder: Where the run may write, if the settings make it write.
        callbacks: Callbacks.
        settings: Arguments of the Trainer that differ.
    """
    return {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": str(folder),
        "callbacks": list(callbacks),
        "max_epochs": -1,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        **settings,
    }


def quiet_trainer(folder: str | Path, *callbacks: Callback, **settings: Any) -> pl.Trainer:
    """Return a Trainer with `quiet_settings`."""
    return pl.Trainer(**quiet_settings(folder, *callbacks, **settings))
