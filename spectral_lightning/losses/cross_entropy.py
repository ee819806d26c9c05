"""Cross-entropy that keeps its digits when a model is very sure, for softmax and StableMax."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from spectral_lightning.losses.rows import Rows, row_gradients, row_losses
from spectral_lightning.losses.targets import (
    Reduction,
    Target,
    check_choice,
    check_targets,
    checked_weight,
    class_target,
    resolved_dtype,
    soft_target,
    total_weight,
)
from spectral_lightning.nn.functional import Transform


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Settings of a cross-entropy, callable on logits and targets.

    Args:
        transform: What turns logits into probabilities.
        label_smoothing: Share of the target that is spread over all classes, in ``[0, 1]``.
        z_loss: Coefficient of the squared logarithm of the normaliser, at least 0, e.g. 1e-4
            (Chowdhery et al. 2022, "PaLM", section 5. https://arxiv.org/abs/2204.02311).
        compute_dtype: ``float32`` or ``float64``; None for that of the logits, at least float32.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> loss = CrossEntropy(transform="stablemax")
        >>> loss(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0])).exp()  # 3.5 / 2
        tensor(1.7500)
    """

    transform: Transform = "softmax"
    """What turns logits into probabilities: ``softmax`` or ``stablemax``."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes, in ``[0, 1]``."""
    z_loss: float = 0.0
    """Coefficient of the squared logarithm of the normaliser, at least 0."""
    compute_dtype: Literal["float32", "float64"] | None = None
    """What the loss is computed in; None for the dtype of the logits, at least float32."""

    def __post_init__(self) -> None:
        check_choice("transform", self.transform, Transform)
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"`label_smoothing` must be in [0, 1], got {self.label_smoothing}.")
        if not 0 <= self.z_loss < float("inf"):
            raise ValueError(f"`z_loss` must be finite and >= 0, got {self.z_loss}.")
        if self.compute_dtype not in (None, "float32", "float64"):
            raise ValueError(
                f"`compute_dtype` must be float32 or float64, got {self.compute_dtype!r}."
            )

    def __call__(
        self,
        logits: Tensor,
        targets: Tensor,
        reduction: Reduction = "mean",
        *,
        ignore_index: int = -100,
    ) -> Tensor:
        """Return the loss, as `cross_entropy` with these settings."""
        return cross_entropy(
            logits,
            targets,
            transform=self.transform,
            ignore_index=ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=reduction,
            compute_dtype=getattr(torch, self.compute_dtype) if self.compute_dtype else None,
            z_loss=self.z_loss,
        )

    def likelihood(self) -> Self:
        """The same probabilities judged by their logarithm alone: no smoothing, no z term."""
        return replace(self, label_smoothing=0.0, z_loss=0.0)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    transform: Transform = "softmax",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    compute_dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    r"""Surprise of targets under logits whose **last** dimension is the classes.

    What ``torch.nn.functional.cross_entropy`` returns, except that (1) the target's own term stays
    out of the sum over classes, so that loss and gradient of the correct class do not become 0
    when a float32 model leads by 17 nats, but at about 100 (StableMax: never); (2) no counted
    target gives 0, not NaN; (3) half precision is computed, and the loss returned, in float32.

    Differentiable once, in the logits alone. Keeps one matrix of the size of the logits for the
    backward pass, besides the logits with StableMax. Ids that are no class raise as in PyTorch.

    Args:
        logits: Shape ``(..., C)``, floating point; minus infinity for classes that cannot be.
        targets: Class ids, shape ``(...)``, integer, or probabilities, shape ``(..., C)``.
        transform: ``softmax`` or ``stablemax``.
        weight: Weight of each class, shape ``(C,)``. With ids, the mean is over the weights.
        ignore_index: Id that does not count.
        label_smoothing: Share of the target that is spread over all classes, in ``[0, 1]``; the
            loss is infinite, as in PyTorch, where a class that cannot be gets a share.
        reduction: ``mean`` over what counts, ``sum``, or ``none``, the loss of every target.
        compute_dtype: float32 or float64; None for that of the logits, at least float32.
        z_loss: Coefficient of the squared logarithm of the normaliser, per counted target.

    Returns:
        Loss, a scalar or for ``none`` of shape ``(...)``, nats, in the compute dtype.

    Raises:
        TypeError: If a dtype is not of the stated kind.
        ValueError: If shapes do not fit together, or an argument is outside its range.

    References:
        Prieto et al. (2025), "Grokking at the edge of numerical stability", section 3 (the
        collapse of the ordinary form). https://arxiv.org/abs/2501.04697
        Chowdhery et al. (2022), "PaLM", section 5 (z loss). https://arxiv.org/abs/2204.02311

    Example:
        >>> logits = torch.tensor([[40.0, 0.0]])
        >>> cross_entropy(logits, torch.tensor([0]))  # exp(-40)
        tensor(4.2484e-18)
        >>> torch.nn.functional.cross_entropy(logits, torch.tensor([0]))
        tensor(0.)
    """
    CrossEntropy(transform=transform, label_smoothing=label_smoothing, z_loss=z_loss)
    check_choice("reduction", reduction, Reduction)
    check_targets(targets, logits.shape, may_be_soft=True)
    dtype = resolved_dtype(logits, compute_dtype)
    num_classes = logits.shape[-1]
    weight = checked_weight(weight, num_classes, dtype)
    rows = logits.reshape(-1, num_classes)
    total: Tensor | int = max(1, len(rows))
    with torch.autocast(logits.device.type, enabled=False):
        if targets.is_floating_point():
            target = soft_target(targets.reshape(rows.shape).to(dtype), weight, label_smoothing)
            losses = _losses(rows, target, transform, z_loss, dtype)
        else:
            ids = targets.reshape(-1).long()
            is_counted = ids != ignore_index
            ids = torch.where(is_counted, ids, 0)
            target = class_target(ids, num_classes, dtype, weight, label_smoothing)
            losses = _losses(rows, target, transform, z_loss, dtype)
            losses = torch.where(is_counted, losses, 0)
            total = total_weight(ids, is_counted, weight)
        if reduction == "none":
            return losses.view(logits.shape[:-1])
        return losses.sum() if reduction == "sum" else losses.sum() / total


def stablemax_cross_entropy(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """`cross_entropy` with the probabilities of StableMax.

    Args:
        logits: Shape ``(..., C)``, floating point, not probabilities.
        targets: Class ids, shape ``(...)``, or probabilities, shape ``(..., C)``.
        **options: Other options of `cross_entropy`.

    Returns:
        Loss, a scalar or for ``reduction="none"`` of shape ``(...)``, nats.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0, -1.0]])
        >>> stablemax_cross_entropy(logits, torch.tensor([0])).exp()  # 3.5 / 2
        tensor(1.7500)
    """
    return cross_entropy(logits, targets, transform="stablemax", **options)


def _losses(
    logits: Tensor, target: Target, transform: Transform, z_loss: float, dtype: torch.dtype
) -> Tensor:
    if torch.is_grad_enabled() and logits.requires_grad:
        options = transform, z_loss, dtype
        return _RowLosses.apply(logits, *target, *options)  # type: ignore[no-untyped-call]
    return row_losses(logits, target, transform, z_loss, dtype)[0]


class _RowLosses(torch.autograd.Function):
    @override
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        main: Tensor,
        weight: Tensor | float,
        rest: Tensor | None,
        transform: Transform,
        z_loss: float,
        dtype: torch.dtype,
    ) -> Tensor:
        losses, rows = row_losses(logits, Target(main, weight, rest), transform, z_loss, dtype)
        ctx.save_for_backward(main, *rows)
        ctx.logits_dtype = logits.dtype
        return losses

    @override
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        main, *rows = ctx.saved_tensors
        gradient = row_gradients(main, Rows(*rows), grad)
        return gradient.to(ctx.logits_dtype), *(None,) * 6
