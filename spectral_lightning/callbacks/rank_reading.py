"""What `RankAdaptation` measures of its layers, the same on all ranks."""

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from spectral_lightning.actuators import component_values
from spectral_lightning.callbacks.rank_layer import RankLayer
from spectral_lightning.control import RankReading
from spectral_lightning.nn import LowRankLinear


class Measured(NamedTuple):
    """What one check has found."""

    readings: dict[str, RankReading]
    """A reading of each layer, without values where they could not be measured."""
    skipped: dict[str, str]
    """Why they could not, by layer."""
    loss: float | None
    """Loss of the last batch."""


def read_layers(
    trainer: pl.Trainer, step: int, layers: Mapping[str, RankLayer], loss: Tensor | None
) -> Measured:
    """Measure some layers after an optimizer step; the host waits for the device once.

    Args:
        trainer: Trainer; what rank 0 has measured counts on all.
        step: Optimizer steps done.
        layers: Layers by name.
        loss: Loss of the last batch, 0-d, to be read on the same occasion.

    Returns:
        What was found.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        moment = moment_of(trainer, layer, is_centred=True)
        values = component_values(layer.module, moment=moment)
        probed = layer.probe if layer.probe and layer.probe.num_steps else None
        parts[name] = [values] if probed is None else [probed.lift(), values]
    found = _numbers(trainer, [part for own in parts.values() for part in own], loss)
    readings: dict[str, RankReading] = {}
    skipped: dict[str, str] = {}
    for name, layer in layers.items():
        growth = found.pop(0)[0] if len(parts[name]) == 2 else None
        measured = found.pop(0)
        if not all(map(math.isfinite, measured)):
            skipped[name] = "its factors and inputs must be finite, got NaN or infinity."
        elif not any(measured):
            skipped[name] = "it has a weight of zeros, which no component holds."
        readings[name] = RankReading(
            step=step,
            shape=layer.target.shape,
            rank=layer.module.rank,
            capacity=layer.module.capacity,
            values=[] if name in skipped else measured,
            growth=growth,
        )
    return Measured(readings, skipped, found[0][0] if found else None)


def _numbers(trainer: pl.Trainer, parts: list[Tensor], loss: Tensor | None) -> list[list[float]]:
    """Numbers of tensors as rank 0 has them, in one transfer, and last of the loss."""
    every = [part.detach().reshape(-1) for part in (*parts, *([] if loss is None else [loss]))]
    joined = torch.cat([part.to(every[0].device, torch.float64) for part in every])
    numbers = iter(trainer.strategy.broadcast(joined.tolist()))
    return [list(islice(numbers, len(part))) for part in every]


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
