"""What embedding health takes from a module: representations, gates, the gradient norm."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@runtime_checkable
class PublishesRepresentations(Protocol):
    """A LightningModule whose embeddings can be watched."""

    def last_representations(self) -> Mapping[str, Tensor] | None:
        """Embeddings of the last training batch on this rank, detached; None before the first.

        By head, each ``(B, d)``, or ``(B, k, d)`` with ``k >= 2`` where the first two texts of a
        row mean the same. ``anomaly_score``, one number for each text, may be among them.
        """


@runtime_checkable
class PublishesGates(Protocol):
    """A model whose learned gates can be watched."""

    def gate_values(self) -> Mapping[str, Tensor]:
        """Values of its gates by layer, each a scalar or a vector."""


def embeddings_of(published: Mapping[str, Tensor], head: str) -> Tensor:
    """Embeddings of one head, shape ``(B, d)`` or ``(B, k, d)``.

    Raises:
        ValueError: If there is no such head, or it has another number of dimensions.
    """
    if head not in published:
        raise ValueError(f"`head` must be one of {', '.join(published)}, got {head!r}.")
    found = published[head].detach()
    if found.ndim not in (2, 3):
        raise ValueError(
            f"`last_representations()` must give shape (B, d) or (B, k, d), got"
            f" {tuple(found.shape)} for {head!r}."
        )
    return found


def gates_of(pl_module: nn.Module) -> dict[str, Tensor]:
    """Gates of the first module that publishes them, by the name they are logged under."""
    models = (m for m in pl_module.modules() if isinstance(m, PublishesGates))
    model = next(models, None)
    found: dict[str, Tensor] = {}
    for layer, values in ({} if model is None else model.gate_values()).items():
        numbers = values.detach().flatten().unbind()
        for i, value in enumerate(numbers):
            found[f"gate/{layer}" + (f"/{i}" if len(numbers) > 1 else "")] = value
    return found


def gradient_norm(pl_module: nn.Module) -> Tensor | None:
    """Norm of the whole gradient on all ranks, without waiting for it; None if there is none."""
    groups: dict[Any, list[Tensor]] = {}
    for parameter in pl_module.parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        # Gradients that are laid out differently cannot be summed in one go.
        layout = (
            (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        )
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        # A norm of half precision numbers overflows.
        groups.setdefault(layout, []).append(
            values if values.dtype in (torch.float32, torch.float64) else values.float()
        )
    if not groups:
        return None
    norms = [torch.nn.utils.get_total_norm(group) for group in groups.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.nn.utils.get_total_norm(whole)


def gathered_rows(trainer: pl.Trainer, rows: Tensor) -> Tensor:
    """Rows of all ranks, in the order of the ranks; as many of each."""
    everywhere = rows.new_zeros(trainer.world_size, *rows.shape)
    everywhere[trainer.global_rank] = rows
    # The functions that gather change their names between versions of torch.
    torch.distributed.all_reduce(everywhere)
    return everywhere.flatten(0, 1)


def mean_over_ranks(trainer: pl.Trainer, scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean of each scalar over the ranks, in one exchange; all have to have the same names."""
    packed = torch.stack([value.float() for value in scalars.values()])
    mean: Any = trainer.strategy.reduce(packed, reduce_op="mean")
    return dict(zip(scalars, mean.unbind(), strict=True))
