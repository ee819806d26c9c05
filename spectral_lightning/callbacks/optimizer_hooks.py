"""What callbacks share that follow the steps of optimizers: their hooks, and a log of numbers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from spectral_lightning.callbacks.base import log_interval, num_batches
from spectral_lightning.spectra import is_due


class OptimizerCallback(pl.Callback, ABC):
    """A callback with hooks in the optimizers themselves, from which it has numbers to log.

    Hooks are removed when training ends, or breaks off. The host waits for the device only to log.
    """

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[Any] = []
        self._logged = 0

    @abstractmethod
    def _hooks(self, optimizer: Optimizer) -> list[Any]:
        """Register hooks on an optimizer, and return their handles."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop what is left of steps that were followed."""

    @abstractmethod
    def _taken(self) -> list[tuple[list[str], Tensor]]:
        """Numbers since the last call, with the keys they are logged under, and drop them."""

    def _follow(self, optimizers: Iterable[Optimizer]) -> None:
        """Follow the steps of some optimizers, and of no others."""
        for handle in self._handles:
            handle.remove()
        self._forget()
        self._handles = [handle for optimizer in optimizers for handle in self._hooks(optimizer)]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._logged = trainer.global_step

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if not (trainer.loggers and is_due(log_interval(trainer, None), step, self._logged)):
            return
        self._logged, found = step, self._taken()
        if not found:
            return
        device = found[0][1].device
        numbers = torch.cat([values.flatten().to(device) for _, values in found]).tolist()
        keys = (key for keys, _ in found for key in keys)
        values = dict(zip(keys, numbers, strict=True))
        for logger in trainer.loggers:
            logger.log_metrics(values, step=num_batches(trainer))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._follow([])

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._follow([])
