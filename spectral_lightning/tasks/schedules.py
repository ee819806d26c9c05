"""Learning-rate schedules of a run whose length only the Trainer knows."""

import math

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from spectral_lightning.optim import WarmupConstantWarmdown


def schedule_run(
    trainer: pl.Trainer,
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    warmdown_fraction: float,
    final_fraction: float,
) -> LRScheduler | None:
    """Fit a `WarmupConstantWarmdown` to the length of the Trainer's run.

    Args:
        trainer: Knows the length from its `max_steps` or `max_epochs`.
        optimizer: Its learning rates are those of the middle part.
        warmup_steps: Optimizer steps of the rise.
        warmdown_fraction: Share of the run spent on the fall, in ``[0, 1]``.
        final_fraction: Rate at the end as a share of the full one, in ``[0, 1]``.

    Returns:
        The schedule; None if it would be constant, or in a `fast_dev_run`, which is no run.

    Raises:
        ValueError: If the rate should fall at the end of a run that has none, or the rise is
            longer than the run.
    """
    is_constant = warmup_steps == 0 and warmdown_fraction == 0
    if is_constant or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    num_steps = trainer.estimated_stepping_batches
    if not 0 < num_steps < math.inf:
        if warmdown_fraction > 0:
            raise ValueError(
                f"`warmdown_fraction` must be 0 in a run without an end, got {warmdown_fraction}."
                " Or set the Trainer's `max_steps` or `max_epochs`."
            )
        num_steps = warmup_steps
    return WarmupConstantWarmdown(
        optimizer,
        int(num_steps),
        warmup_steps=warmup_steps,
        warmdown_fraction=warmdown_fraction,
        final_fraction=final_fraction,
    )


def with_scheduler(
    optimizer: Optimizer, scheduler: LRScheduler | ReduceLROnPlateau | None
) -> OptimizerLRScheduler:
    """Tell Lightning when to step a scheduler: every optimizer step, not every epoch.

    Args:
        optimizer: The optimizer.
        scheduler: Its scheduler; one that waits for a plateau watches ``valid/loss``.
    """
    if scheduler is None:
        return optimizer
    if isinstance(scheduler, ReduceLROnPlateau):
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "valid/loss"}
    step_wise: LRSchedulerConfigType = {"scheduler": scheduler, "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": step_wise}
