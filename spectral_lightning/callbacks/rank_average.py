"""Where weight averaging (EMA, SWA) keeps its copy of a layer."""

from typing import cast

import lightning.pytorch as pl
from torch.optim.swa_utils import AveragedModel

from spectral_lightning.nn import LowRankLinear


def averages_of(trainer: pl.Trainer, layer: LowRankLinear) -> list[LowRankLinear]:
    """Averaged copies of a layer, which have to follow its changes.

    Lightning's `WeightAveraging`, `EMAWeightAveraging` and `StochasticWeightAveraging` make one in
    `setup` and offer no way to it, so that this reads their attribute `_average_model`.

    Args:
        trainer: Trainer that fits; its callbacks may average.
        layer: Layer of its module.

    Returns:
        The layer's copy in each averaged model; none without weight averaging.
    """
    found = []
    names = {own: name for name, own in trainer.lightning_module.named_modules()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        model = getattr(callback, "_average_model", None)
        if model is not None:
            model = model.module if isinstance(model, AveragedModel) else model
            found.append(cast(LowRankLinear, model.get_submodule(names[layer])))
    return found
