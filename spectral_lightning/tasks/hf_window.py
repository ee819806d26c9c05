"""Exact mean over the tokens of an accumulation window and of all ranks."""

from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class TokenWindow(nn.Module):
    """Weigh every token of an optimizer step alike, however they fall into batches and ranks.

    Lightning and its strategies average the gradients of microbatches and ranks, which weighs a
    token by how few others are in its batch. Each microbatch's sum is therefore divided by one
    number, the tokens of a microbatch in the window before, and the finished gradients are scaled
    by that number over the true one. Costs one sum of two numbers over the ranks per optimizer
    step, and asks the device nothing.

    The number before is a buffer, so that a resumed run has the same weights to the bit.
    """

    expected: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("expected", torch.zeros((), dtype=torch.float32))
        self._knows_expected = False  # a Python flag, so that no step asks the device
        self._sums: Tensor | None = None
        self._num_batches = 0

    def restored(self) -> None:
        """Take up `expected` from a checkpoint that was just loaded."""
        self._knows_expected = bool(self.expected > 0)

    def clear(self) -> None:
        """Forget a window that was left unfinished."""
        self._sums, self._num_batches = None, 0

    def divisor(self, num_tokens: Tensor, trainer: pl.Trainer) -> Tensor:
        """Return what to divide the loss of a microbatch by.

        Args:
            num_tokens: Tokens that count in the microbatch, a scalar.
            trainer: Knows the ranks and the length of a window.
        """
        if trainer.accumulate_grad_batches == 1 and trainer.world_size == 1:
            return num_tokens.clamp(min=1).float()  # exact as it is
        if not self._knows_expected:
            total = trainer.strategy.reduce(num_tokens.float(), reduce_op="sum")
            self.expected.copy_((total / trainer.world_size).clamp(min=1))
            self._knows_expected = True
        return self.expected.clone()

    def add(self, loss: Tensor, divisor: Tensor, num_tokens: Tensor) -> None:
        """Count a microbatch.

        Args:
            loss: Its loss, divided by `divisor`.
            divisor: Result of the method of this name.
            num_tokens: Tokens that count in it.
        """
        sums = torch.stack((loss.detach().float() * divisor, num_tokens.float()))
        self._sums = sums if self._sums is None else self._sums + sums
        self._num_batches += 1

    @torch.no_grad()
    def close(self, trainer: pl.Trainer, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Scale the gradients of a complete window.

        Args:
            trainer: Sums over the ranks.
            parameters: Their gradients are complete, and averaged over the ranks.

        Returns:
            Loss per token of the window over all ranks, a scalar; 0 without a token.
        """
        assert self._sums is not None
        length, num_ranks = trainer.accumulate_grad_batches, trainer.world_size
        nats, tokens = trainer.strategy.reduce(self._sums, reduce_op="sum").unbind()
        if length > 1 or num_ranks > 1:
            factor = self.expected * length * num_ranks / tokens.clamp(min=1)
            for gradient in (p.grad for p in parameters if p.grad is not None):
                local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                local.mul_(factor)
            mean = tokens / (self._num_batches * num_ranks)
            self.expected.copy_(torch.where(tokens > 0, mean, self.expected))
        self.clear()
        return nats / tokens.clamp(min=1)
