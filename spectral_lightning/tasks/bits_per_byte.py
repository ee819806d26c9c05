"""How well text is predicted, counted so that models with different tokenizers compare."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from typing_extensions import override

from spectral_lightning.losses import CrossEntropy

IGNORED = -1
"""Target that is not predicted."""


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the surprise of every target token.

    Args:
        logits: Shape ``(..., vocab_size)``, any float dtype; computed in float32.
        targets: Token ids, shape ``(...)``, int64; `IGNORED` gives 0.

    Returns:
        Negative log probability of each target, shape ``(...)``, nats, float32.
    """
    flat = F.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(targets)


def token_losses(
    logits: Tensor, targets: Tensor, loss: CrossEntropy | None
) -> tuple[Tensor, Tensor]:
    """Return the loss of every target token, and its surprise under the same probabilities.

    Args:
        logits: Shape ``(..., vocab_size)``, any float dtype; computed in float32.
        targets: Token ids, shape ``(...)``, int64; `IGNORED` gives 0.
        loss: Loss to train with; None for the surprise under the softmax.

    Returns:
        Losses and, without smoothing and z term, surprises, both of shape ``(...)``, nats.
    """
    if loss is None:
        nats = token_nats(logits, targets)
        return nats, nats
    losses = loss(logits, targets, "none", ignore_index=IGNORED)
    if loss == loss.likelihood():
        return losses, losses
    with torch.no_grad():
        return losses, loss.likelihood()(logits, targets, "none", ignore_index=IGNORED)


def counted_bytes(targets: Tensor, token_bytes: Tensor) -> Tensor:
    """Return the bytes of text behind every target token.

    Args:
        targets: Token ids, shape ``(...)``, int64.
        token_bytes: Bytes per token id, shape ``(vocab_size,)``, int64, 0 for special tokens.

    Returns:
        Bytes, shape ``(...)``, int64; 0 for special tokens and `IGNORED`.
    """
    return torch.where(targets == IGNORED, 0, token_bytes[targets.clamp(min=0)])


def _sum_dtype() -> torch.dtype:
    # A long evaluation adds up 1e7 surprises, too many for float32; Apple's GPUs know no other.
    return torch.float32 if torch.backends.mps.is_available() else torch.float64


class BitsPerByte(Metric):
    """Surprise of the predicted text per byte of its UTF-8 form.

    Total surprise of all targets that stand for text, divided by the number of bytes they stand
    for. Unlike the loss per token it does not depend on how the tokenizer cuts the text. Special
    tokens and ignored targets count neither above nor below the line. Sums are kept in float64
    and added over ranks. NaN before any text was seen.

    References:
        Gao et al. (2020), "The Pile", section 3.1 (bits per byte of UTF-8).
        https://arxiv.org/abs/2101.00027

    Example:
        >>> metric = BitsPerByte()
        >>> uniform, targets = torch.zeros(1, 3, 256), torch.tensor([[65, 66, 0]])
        >>> metric.update(uniform, targets, token_bytes=torch.tensor([0] + 255 * [1]))
        >>> metric.compute().item()  # a byte has 256 values
        8.0
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    nats: Tensor
    num_bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nats", torch.zeros((), dtype=_sum_dtype()), dist_reduce_fx="sum")
        self.add_state("num_bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, predictions: Tensor, targets: Tensor, token_bytes: Tensor) -> None:
        """Add a batch.

        Args:
            predictions: Logits, shape ``(..., vocab_size)``, or the result of `token_nats`,
                shape ``(...)``.
            targets: Token ids, shape ``(...)``, int64; -1 is ignored.
            token_bytes: Bytes per token id, shape ``(vocab_size,)``, int64, 0 for special tokens.

        Raises:
            ValueError: If the shapes do not fit together.
        """
        if predictions.ndim == targets.ndim + 1 and predictions.shape[:-1] == targets.shape:
            predictions = token_nats(predictions, targets)
        if predictions.shape != targets.shape:
            raise ValueError(
                f"`predictions` must have the shape of `targets` {tuple(targets.shape)}, or one"
                f" dimension more, got {tuple(predictions.shape)}."
            )
        num_bytes = counted_bytes(targets, token_bytes)
        counted = torch.where(num_bytes > 0, predictions, 0)
        self.nats = self.nats + counted.sum(dtype=self.nats.dtype)
        self.num_bytes = self.num_bytes + num_bytes.sum()

    @override
    def compute(self) -> Tensor:
        """Return bits per byte of all text since the last reset, a scalar."""
        return self.nats / (math.log(2) * self.num_bytes)


class TokenLoss(Metric):
    """Mean surprise per target token in nats, weighted exactly also when batches differ in size.

    Special tokens count, ignored targets do not. NaN before any target was seen.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    nats: Tensor
    num_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nats", torch.zeros((), dtype=_sum_dtype()), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, nats: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            nats: Result of `token_nats`, shape ``(...)``.
            targets: Token ids, shape ``(...)``, int64; -1 is ignored.
        """
        # Not in place: what `validate` has reset is an inference tensor, which `fit` may not edit.
        self.nats = self.nats + nats.sum(dtype=self.nats.dtype)
        self.num_tokens = self.num_tokens + (targets != IGNORED).sum()

    @override
    def compute(self) -> Tensor:
        """Return nats per token of all targets since the last reset, a scalar."""
        return self.nats / self.num_tokens
