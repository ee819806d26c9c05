"""What cross-entropies are given: their options, and targets as distributions over classes."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "none", "sum"]


class Target(NamedTuple):
    """What rows should say: a distribution over classes, split off its main class.

    Attributes:
        main: The class that is left out of the sum, shape ``(N,)``, int64.
        weight: Its share, shape ``(N,)``, or one number for all rows.
        rest: Shares besides `weight`, shape ``(C,)`` or ``(N, C)``; None for none.
    """

    main: Tensor
    weight: Tensor | float
    rest: Tensor | None


def class_target(
    ids: Tensor,
    num_classes: int,
    dtype: torch.dtype,
    weight: Tensor | None,
    label_smoothing: float,
) -> Target:
    """Target of class ids.

    Args:
        ids: Class of each row, shape ``(N,)``, int64.
        num_classes: ``C``.
        dtype: Dtype of the computation.
        weight: Weight of each class, shape ``(C,)``, in that dtype; None for 1.
        label_smoothing: Share of the target that is spread over all classes.
    """
    main, spread = 1 - label_smoothing, label_smoothing / num_classes
    if weight is not None:
        return Target(ids, main * weight[ids], spread * weight if spread else None)
    rest = torch.full((num_classes,), spread, dtype=dtype, device=ids.device) if spread else None
    return Target(ids, main, rest)


def soft_target(shares: Tensor, weight: Tensor | None, label_smoothing: float) -> Target:
    """Target of probabilities; the largest is that of the main class.

    Args:
        shares: Probabilities, shape ``(N, C)``, in the dtype of the computation.
        weight: Weight of each class, shape ``(C,)``, in the same dtype; None for 1.
        label_smoothing: Share of the target that is spread over all classes.
    """
    if label_smoothing > 0:
        shares = (1 - label_smoothing) * shares + label_smoothing / shares.shape[1]
    if weight is not None:
        shares = shares * weight
    main = shares.argmax(1, keepdim=True)
    return Target(main.squeeze(1), shares.gather(1, main).squeeze(1), shares.scatter(1, main, 0))


def total_weight(ids: Tensor, is_counted: Tensor, weight: Tensor | None) -> Tensor:
    """What a mean over class ids divides by: their number or weight, and 1 in place of 0.

    Args:
        ids: Class of each row, shape ``(N,)``, int64.
        is_counted: Which rows count, shape ``(N,)``.
        weight: Weight of each class, shape ``(C,)``; None for 1.
    """
    counts = is_counted if weight is None else torch.where(is_counted, weight[ids], 0)
    total = counts.sum()
    return torch.where(total == 0, 1, total)


def check_choice(name: str, value: str, choices: Any) -> None:
    """Refuse what is not one of the values of a `Literal`.

    Raises:
        ValueError: If it is none of them.
    """
    if value not in get_args(choices):
        raise ValueError(f"`{name}` must be one of {', '.join(get_args(choices))}, got {value!r}.")


def resolved_dtype(logits: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """Dtype to compute a loss in.

    Raises:
        TypeError: If the logits are not floating point.
        ValueError: If another dtype than float32 and float64 is wanted.
    """
    if not logits.is_floating_point():
        raise TypeError(f"Logits must be floating point, got {logits.dtype}.")
    if wanted not in (None, torch.float32, torch.float64):
        raise ValueError(f"`compute_dtype` must be torch.float32 or torch.float64, got {wanted}.")
    return wanted or torch.promote_types(logits.dtype, torch.float32)


def checked_weight(
    weight: Tensor | None, num_classes: int, dtype: torch.dtype, name: str = "weight"
) -> Tensor | None:
    """Weights of the classes as constants in a dtype.

    Raises:
        ValueError: If their shape is not ``(num_classes,)``.
    """
    if weight is None:
        return None
    if weight.shape != (num_classes,):
        raise ValueError(
            f"`{name}` must have shape {(num_classes,)}, one number per class, got"
            f" {tuple(weight.shape)}."
        )
    return weight.detach().to(dtype)


def check_targets(targets: Tensor, shape: torch.Size, *, may_be_soft: bool) -> None:
    """Refuse targets that do not fit logits of a shape whose last dimension is the classes.

    Raises:
        TypeError: If they are of a dtype that is no target, or floating point where only ids fit.
        ValueError: If the shapes do not fit together, or a gradient is asked for.
    """
    is_soft = targets.is_floating_point()
    if targets.dtype is torch.bool or targets.is_complex() or (is_soft and not may_be_soft):
        kinds = "integer ids or floating-point probabilities" if may_be_soft else "integer ids"
        raise TypeError(f"`targets` must be {kinds}, got {targets.dtype}.")
    expected = shape if is_soft else shape[:-1]
    if targets.shape != expected:
        raise ValueError(
            f"`targets` must have shape {tuple(expected)} for logits of shape {tuple(shape)}, whose"
            f" last dimension is the classes, got {tuple(targets.shape)}."
        )
    if targets.requires_grad:
        raise ValueError("`targets` must be constants, got probabilities that require a gradient.")
