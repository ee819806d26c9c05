"""Cross-entropy of a linear head, without ever holding the logits of all tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from typing_extensions import override

from spectral_lightning.losses.cross_entropy import CrossEntropy
from spectral_lightning.losses.rows import Rows, row_gradients, row_losses
from spectral_lightning.losses.targets import (
    Reduction,
    Target,
    check_choice,
    check_targets,
    checked_weight,
    class_target,
    resolved_dtype,
    total_weight,
)
from spectral_lightning.nn.functional import Transform


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_tokens: int = 256,
    softcap: float | None = None,
    transform: Transform = "softmax",
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    compute_dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    r"""`cross_entropy` of ``hidden @ weight.T + bias``, a chunk of tokens at a time.

    The logits of a chunk are turned into their gradients, and these into gradients of `hidden`
    and `weight`, before the next chunk is computed. Memory is that of a few matrices of shape
    ``(chunk_tokens, V)`` and one like `weight`; time that of the dense form. Without gradients
    only losses are computed. Gradients of the parameters are summed in the compute dtype.
    Differentiable once. Follows autocast as a linear layer does.

    Args:
        hidden: Inputs of the head, shape ``(..., D)``.
        weight: Weight of the head, shape ``(V, D)``.
        targets: Class ids, shape ``(...)``, integer.
        bias: Bias of the head, shape ``(V,)``.
        chunk_tokens: Tokens per chunk, at least 1; the default is chosen here by
            scripts/bench_cross_entropy.py.
        softcap: Logits are bounded to ``softcap * tanh(logits / softcap)``; None leaves them.
        transform: ``softmax`` or ``stablemax``.
        class_weight: Weight of each class, shape ``(V,)``; the mean is over the weights.
        ignore_index: Id that does not count.
        label_smoothing: Share of the target that is spread over all classes, in ``[0, 1]``.
        reduction: ``mean`` over what counts, or ``sum``; ``none`` only without gradients.
        compute_dtype: float32 or float64; None for that of the logits, at least float32.
        z_loss: Coefficient of the squared logarithm of the normaliser, per counted target.

    Returns:
        Loss, a scalar or for ``none`` of shape ``(...)``, nats, in the compute dtype.

    Raises:
        TypeError: If a dtype is not of the stated kind.
        ValueError: If shapes do not fit together, or an argument is outside its range.

    References:
        Hsu et al. (2024), "Liger Kernel", section 3.2. https://arxiv.org/abs/2410.10989

    Example:
        >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[40.0, 0.0], [0.0, 0.0]])
        >>> linear_cross_entropy(hidden, weight, torch.tensor([0]))  # exp(-40)
        tensor(4.2484e-18)
    """
    CrossEntropy(transform=transform, label_smoothing=label_smoothing, z_loss=z_loss)
    check_choice("reduction", reduction, Reduction)
    if chunk_tokens < 1:
        raise ValueError(f"`chunk_tokens` must be >= 1, got {chunk_tokens}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap` must be > 0, got {softcap}.")
    _check_shapes(hidden, weight, bias)
    num_classes = len(weight)
    check_targets(targets, torch.Size((*hidden.shape[:-1], num_classes)), may_be_soft=False)

    dtype = resolved_dtype(hidden, compute_dtype)
    class_weight = checked_weight(class_weight, num_classes, dtype, "class_weight")

    device = hidden.device.type
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    learned = [part for part in (hidden, weight, bias) if part is not None and part.requires_grad]
    with torch.autocast(device, enabled=False):
        ids = targets.reshape(-1).long()
        is_counted = ids != ignore_index
        ids = torch.where(is_counted, ids, 0)
        target = class_target(ids, num_classes, dtype, class_weight, label_smoothing)
        chunks = _Chunks(target, is_counted, chunk_tokens, softcap, transform, z_loss, dtype)
        if torch.is_grad_enabled() and learned:
            if reduction == "none":
                raise ValueError(
                    "`reduction` must be mean or sum where a gradient is needed, got none. Take"
                    " the losses of single tokens under torch.no_grad()."
                )
            loss = _LinearLoss.apply(hidden, weight, bias, chunks)  # type: ignore[no-untyped-call]
        else:
            losses = chunks.losses(hidden, weight, bias)
            if reduction == "none":
                return losses.view(targets.shape)
            loss = losses.sum()
        return loss if reduction == "sum" else loss / total_weight(ids, is_counted, class_weight)


class _Chunks(NamedTuple):
    """All that a chunk of tokens needs besides the three tensors of the head."""

    target: Target
    is_counted: Tensor
    size: int
    softcap: float | None
    transform: Transform
    z_loss: float
    dtype: torch.dtype

    def parts(self) -> list[slice]:
        starts = range(0, len(self.is_counted), self.size)
        return [slice(start, start + self.size) for start in starts]

    def losses(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Losses of all tokens, shape ``(N,)``."""
        losses = torch.zeros_like(self.is_counted, dtype=self.dtype)
        for part in self.parts():
            losses[part] = self._rows(hidden, weight, bias, part)[0]
        return losses

    def loss_and_gradient(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, part: slice
    ) -> tuple[Tensor, Tensor]:
        """Losses of a chunk, shape ``(n,)``, and gradient of their sum for its logits."""
        losses, rows, logits = self._rows(hidden, weight, bias, part)
        scale = self.is_counted[part].to(self.dtype)
        gradient = row_gradients(self.target.main[part], rows, scale)
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap).square_())
        return losses, gradient

    def _rows(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, part: slice
    ) -> tuple[Tensor, Rows, Tensor]:
        main, share, rest = self.target
        logits = F.linear(hidden[part], weight, bias)
        if self.softcap is not None:
            logits = logits.to(self.dtype).div_(self.softcap).tanh_().mul_(self.softcap)
        target = Target(main[part], share[part] if isinstance(share, Tensor) else share, rest)
        losses, rows = row_losses(logits, target, self.transform, self.z_loss, self.dtype)
        return torch.where(self.is_counted[part], losses, 0), rows, logits


class _LinearLoss(torch.autograd.Function):
    """Sum of the losses of all tokens; its gradients are computed on the way forward."""

    @override
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunks: _Chunks
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        total = torch.zeros((), dtype=chunks.dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=chunks.dtype) if needs_weight else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=chunks.dtype) if needs_bias else None
        for part in chunks.parts():
            losses, gradient = chunks.loss_and_gradient(hidden, weight, bias, part)
            total += losses.sum()
            if d_bias is not None:
                d_bias += gradient.sum(0)
            gradient = gradient.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[part] = gradient @ weight
            if d_weight is None:
                continue
            if d_weight.dtype == weight.dtype:
                d_weight.addmm_(gradient.mT, hidden[part])
            else:
                d_weight += gradient.mT @ hidden[part]
            del gradient  # not kept through the next chunk
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtype = weight.dtype
        return total

    @override
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (d if d is None else (d * grad).to(ctx.dtype) for d in ctx.saved_tensors)
        return *gradients, None


def _check_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "`weight` must have shape (V, D) for `hidden` of shape (..., D), got"
            f" {tuple(weight.shape)} for {tuple(hidden.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"`bias` must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}."
        )
