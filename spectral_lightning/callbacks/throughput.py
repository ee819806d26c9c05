"""How fast a run is, and how much memory it takes."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from spectral_lightning.callbacks.base import log_interval, num_batches
from spectral_lightning.spectra import is_due


class Throughput(pl.Callback):
    """Measure samples and tokens per second of training, and the peak of memory.

    Loggers get, every `every_n_steps` optimizer steps and over the steps since, for all ranks
    together: ``throughput/samples_per_second``; ``throughput/tokens_per_second``, where the batch
    has token ids (padding does not count if it has an ``attention_mask``); and of this process,
    ``throughput/peak_memory_gib``: of tensors on an accelerator, else of the whole process since it
    began. Time in validation does not count. Rank 0 measures, and takes the others to do as much.

    Lightning's `ThroughputMonitor` has neither memory nor padding, takes all batches to be of one
    size, and waits for the device at each of them; here the host waits when it logs.

    Args:
        every_n_steps: Optimizer steps between two entries; None takes the Trainer's
            `log_every_n_steps`.

    Raises:
        ValueError: If `every_n_steps` is below 1.

    Example:
        >>> speed = Throughput(every_n_steps=10)
        >>> trainer = pl.Trainer(callbacks=[speed], logger=False, barebones=False)
    """

    _num_tokens: int | Tensor | None
    _since: float | None  # when the time that counts began; None between two batches

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be >= 1 or None, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self.measured: dict[str, float] = {}
        """Latest numbers, by the names they are logged under."""
        self._before = 0
        self._clear()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before = trainer.global_step
        self.measured = {}
        self._clear()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        num_samples, num_tokens = batch_size(batch)
        self._num_samples += num_samples
        if num_tokens is not None:
            self._num_tokens = num_tokens + (0 if self._num_tokens is None else self._num_tokens)
        step, interval = trainer.global_step, log_interval(trainer, self.every_n_steps)
        if is_due(interval, step, self._before):
            self._before = step
            self._measure(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._since is not None:
            _wait(trainer)
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def _measure(self, trainer: pl.Trainer) -> None:
        _wait(trainer)
        now, world_size = time.perf_counter(), trainer.world_size
        seconds = self._seconds + (0.0 if self._since is None else now - self._since)
        self.measured = {
            "throughput/samples_per_second": world_size * self._num_samples / seconds,
            "throughput/peak_memory_gib": peak_memory(trainer.strategy.root_device) / 2**30,
        }
        if self._num_tokens is not None:
            tokens = world_size * float(self._num_tokens)
            self.measured["throughput/tokens_per_second"] = tokens / seconds
        self._clear()
        self._since = now
        for logger in trainer.loggers:
            logger.log_metrics(self.measured, step=num_batches(trainer))

    def _clear(self) -> None:
        self._num_samples, self._seconds = 0, 0.0
        self._num_tokens = None
        self._since = None


def batch_size(batch: Any) -> tuple[int, int | Tensor | None]:
    """Number of samples in a batch, and of tokens that are no padding.

    Args:
        batch: A tensor, a sequence of which the first is one, or a mapping that may have
            ``input_ids`` and ``attention_mask``.

    Returns:
        Samples, the first dimension; and tokens: of a mapping with ``input_ids`` those of the mask,
        of a tensor of integers with two dimensions all, else None.

    Example:
        >>> batch_size({"input_ids": torch.ones(4, 2, 8), "attention_mask": torch.ones(4, 2, 8)})
        (4, tensor(64.))
    """
    if isinstance(batch, Mapping):
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if isinstance(ids, Tensor):
            return len(ids), ids.numel() if mask is None else mask.detach().sum()
        tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
        return (len(tensors[0]) if tensors else 0), None
    if isinstance(batch, list | tuple) and batch:
        return batch_size(batch[0])
    if not isinstance(batch, Tensor) or batch.ndim == 0:
        return 0, None
    is_ids = batch.ndim == 2 and not batch.is_floating_point()
    return len(batch), batch.numel() if is_ids else None


def peak_memory(device: torch.device) -> int:
    """Most bytes that were in use at once: of tensors on an accelerator, of the process elsewhere.

    Returns:
        Bytes; 0 for a CPU on Windows, which does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _wait(trainer: pl.Trainer) -> None:
    """Wait for the device, whose work would else be taken for done."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
