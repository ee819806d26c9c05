"""What `RankAdaptation` measures of its layers, the same on all ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from spectral_lightning.actuators import best_components
from spectral_lightning.callbacks.rank_layer import RankLayer
from spectral_lightning.control import RankReading
from spectral_lightning.nn import LowRankLinear


def read_layers(
    trainer: pl.Trainer, step: int, layers: Mapping[str, RankLayer]
) -> tuple[dict[str, RankReading], dict[str, str]]:
    """Measure some layers after an optimizer step.

    Args:
        trainer: Trainer; what rank 0 has measured counts on all.
        step: Optimizer steps done.
        layers: Layers by name.

    Returns:
        A reading of each, without values where they could not be measured; and why not.
    """
    readings: dict[str, RankReading] = {}
    skipped: dict[str, str] = {}
    for name, layer in layers.items():
        module, growth = layer.module, None
        if layer.probe is not None and layer.probe.num_steps:
            growth = float(layer.probe.lift())
        try:
            moment = moment_of(trainer, layer, is_centred=True)
            found = best_components(module, module.rank, moment=moment, is_balanced=False)
            values = found.values.tolist()
        except ValueError as error:
            values, skipped[name] = [], str(error)
        values, growth = trainer.strategy.broadcast((values, growth))
        readings[name] = RankReading(
            step=step,
            shape=layer.target.shape,
            rank=module.rank,
            capacity=module.capacity,
            values=values,
            growth=growth,
        )
    return readings, skipped


def moment_of(trainer: pl.Trainer, layer: RankLayer, *, is_centred: bool = False) -> Tensor | None:
    """Second moment of a layer's hidden activations over the inputs of all ranks.

    Args:
        trainer: Trainer.
        layer: Layer.
        is_centred: Whether their mean is taken out, which is the same for every input and so tells
            nothing of what the layer distinguishes.

    Returns:
        Shape ``(rank, rank)``; None where no inputs were seen.
    """
    if layer.moment is None:
        return None
    total = layer.moment
    if trainer.world_size > 1:
        total = trainer.strategy.reduce(total, reduce_op="sum")
    moment, sums, number = total[:-1, :-1], total[:-1, -1], total[-1, -1]
    return (moment - torch.outer(sums, sums) / number if is_centred else moment) / number


def shared(trainer: pl.Trainer, found: Any) -> Any:
    """Tensors of rank 0: decompositions may differ in their last digits, and in signs."""
    if trainer.world_size == 1:
        return found
    parts = trainer.strategy.broadcast([part.cpu() for part in found])
    moved = [new.to(old.device) for new, old in zip(parts, found, strict=True)]
    return moved if isinstance(found, list) else type(found)(*moved)


def optimizer_of(module: LowRankLinear, optimizers: Sequence[Any]) -> Any:
    """Optimizer that trains a layer's factors; None if none does."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(own is module.left_factor for own in group["params"]):
                return optimizer
    return None
