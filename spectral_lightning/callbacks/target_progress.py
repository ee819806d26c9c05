"""Progress towards targets: one line after each validation."""

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override


class TargetProgress(pl.Callback):
    """Say after each validation how far metrics are from the values that are hoped for.

    Prints one line for each target, as ``step 500 | loss 1.2345 | temperature 0.0695 |
    valid/sts 0.6892 | target 0.8250 | progress 83.5 % | patience 1/5``. Progress is the
    metric as a share of the target, so larger has to be better. What has not been logged is "not
    measured". Patience is that of the Trainer's `EarlyStopping`, which has to stand before this
    callback in the list; it is "off" without one.

    Args:
        targets: Value hoped for, > 0, of each metric, by the name it is logged under.
        loss: Name under which the loss is logged.
        temperature: Name under which the temperature is logged.

    Raises:
        ValueError: If there are no targets, or one is not positive and finite.

    Example:
        >>> progress = TargetProgress({"valid/sts": 0.825})
        >>> trainer = pl.Trainer(callbacks=[progress], logger=False, barebones=False)
    """

    def __init__(
        self,
        targets: dict[str, float],
        loss: str = "train/loss",
        temperature: str = "train/temperature",
    ) -> None:
        super().__init__()
        wrong = {name: value for name, value in targets.items() if not 0 < value < math.inf}
        if wrong or not targets:
            raise ValueError(
                f"`targets` must give each metric a positive, finite value, got {wrong or None}."
            )
        self.targets = targets
        self.loss = loss
        self.temperature = temperature

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stopping = getattr(trainer, "early_stopping_callback", None)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if stopping is not None and callbacks.index(stopping) > callbacks.index(self):
            rank_zero_warn(
                "TargetProgress shows the patience of the validation before, since EarlyStopping"
                " stands after it in `callbacks`; put it before."
            )

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        stopping = getattr(trainer, "early_stopping_callback", None)
        patience = "off" if stopping is None else f"{stopping.wait_count}/{stopping.patience}"
        for name, target in self.targets.items():
            fields = {
                "step": trainer.global_step,
                "loss": _number(measured, self.loss),
                "temperature": _number(measured, self.temperature),
                name: _number(measured, name),
                "target": f"{target:.4f}",
                "progress": _share(measured.get(name), target),
                "patience": patience,
            }
            pl_module.print(" | ".join(f"{key} {value}" for key, value in fields.items()))


def _number(measured: Mapping[str, Any], name: str) -> str:
    return f"{measured[name]:.4f}" if name in measured else "not measured"


def _share(value: float | None, target: float) -> str:
    return "not measured" if value is None else f"{100 * value / target:.1f} %"
