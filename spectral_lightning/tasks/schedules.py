"""Learning-rate schedules of a run whose length only the Trainer knows."""

import math
from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from spectral_lightning.optim import WarmupConstantWarmdown


@dataclass(frozen=True)
class RunSchedule:
    """How the learning rate of a task goes: by a scheduler of its own, or up, straight and down.

    Args:
        lr_scheduler: Called with the optimizer, and stepped after every optimizer step. None uses
            `WarmupConstantWarmdown` over the Trainer's whole run with the rest.
        warmup_steps: Optimizer steps of the rise; below 1, a share of the run.
        warmdown_fraction: Share of the run spent on the fall, in ``[0, 1]``.
        final_fraction: Rate at the end as a share of the full one, in ``[0, 1]``.

    Raises:
        ValueError: If an argument is outside its range.
    """

    lr_scheduler: LRSchedulerCallable | None
    warmup_steps: float
    warmdown_fraction: float
    final_fraction: float

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"`warmup_steps` must be >= 0, got {self.warmup_steps}.")
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(
                "`warmup_steps` must be a whole number, or a share of the run below 1, got"
                f" {self.warmup_steps}."
            )
        for name in ("warmdown_fraction", "final_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {value}.")
        if self.lr_scheduler is not None and self.warmup_steps > 0:
            rank_zero_warn("`warmup_steps` has no effect when an `lr_scheduler` is given.")

    def with_optimizer(self, trainer: pl.Trainer, optimizer: Optimizer) -> OptimizerLRScheduler:
        """What a task returns to Lightning: every optimizer step is one of the scheduler.

        One that waits for a plateau watches ``valid/loss``.

        Args:
            trainer: Knows the length of the run from its `max_steps` or `max_epochs`.
            optimizer: Its learning rates are those of the middle part.

        Raises:
            ValueError: If the rate should fall at the end of a run that has none, or the rise is
                longer than the run.
        """
        scheduler = (
            self._over_the_run(trainer, optimizer)
            if self.lr_scheduler is None
            else self.lr_scheduler(optimizer)
        )
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "valid/loss"}
        step_wise: LRSchedulerConfigType = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": step_wise}

    def _over_the_run(self, trainer: pl.Trainer, optimizer: Optimizer) -> LRScheduler | None:
        """None if it would be constant, or in a `fast_dev_run`, which is no run."""
        is_constant = self.warmup_steps == 0 and self.warmdown_fraction == 0
        if is_constant or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        num_steps = trainer.estimated_stepping_batches
        if not 0 < num_steps < math.inf:
            if self.warmdown_fraction > 0 or 0 < self.warmup_steps < 1:
                name = "warmdown_fraction" if self.warmdown_fraction > 0 else "warmup_steps"
                raise ValueError(
                    f"`{name}` must be 0 in a run without an end, got {getattr(self, name)}. Or set"
                    " the Trainer's `max_steps` or `max_epochs`."
                )
            num_steps = self.warmup_steps
        share = 0 < self.warmup_steps < 1
        return WarmupConstantWarmdown(
            optimizer,
            int(num_steps),
            warmup_steps=int(self.warmup_steps * num_steps) if share else int(self.warmup_steps),
            warmdown_fraction=self.warmdown_fraction,
            final_fraction=self.final_fraction,
        )
