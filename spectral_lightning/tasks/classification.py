"""Training a classifier on batches of inputs and class ids."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from typing_extensions import override

from spectral_lightning.losses import CrossEntropy
from spectral_lightning.optim import parameter_groups


class Classification(pl.LightningModule):
    """Train a model to name the class of each input.

    A batch is ``(inputs, targets)``, targets being class ids ``(B,)``, int64. Logs ``train/loss``
    (nats) and ``train/accuracy`` (share of the inputs, in ``[0, 1]``) of each batch, before the
    step, and the same for ``valid`` and ``test`` over the whole set and all ranks.

    Args:
        model: Turns inputs into logits ``(B, C)``.
        optimizer: Called with the model's parameter groups (`parameter_groups`); None for
            ``torch.optim.AdamW``.
        loss: What is trained and logged as the loss; None for PyTorch's cross-entropy, in float32
            at least.

    Example:
        >>> task = Classification(nn.Linear(3, 2), loss=CrossEntropy(transform="stablemax"))
        >>> task(torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable | None = None,
        loss: CrossEntropy | None = None,
    ) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.optimizer: OptimizerCallable = torch.optim.AdamW if optimizer is None else optimizer
        self.valid_loss, self.valid_accuracy = _mean(), _mean()
        self.test_loss, self.test_accuracy = _mean(), _mean()

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits of shape ``(B, C)``."""
        return self.model(inputs)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer."""
        return self.optimizer(parameter_groups(self.model))

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of the batch, nats."""
        losses, hits = self._judge(batch)
        loss = losses.mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", hits.mean(), prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the batch towards ``valid/loss`` and ``valid/accuracy``."""
        self._evaluate("valid", batch, self.valid_loss, self.valid_accuracy)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the batch towards ``test/loss`` and ``test/accuracy``."""
        self._evaluate("test", batch, self.test_loss, self.test_accuracy)

    def _judge(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss of every input, and 1 where its largest logit is that of its class."""
        inputs, targets = batch
        logits = self(inputs)
        if self.loss is None:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = F.cross_entropy(wide, targets, reduction="none")
        else:
            losses = self.loss(logits, targets, "none")
        return losses, (logits.detach().argmax(-1) == targets).float()

    def _evaluate(
        self, stage: str, batch: tuple[Tensor, Tensor], loss: MeanMetric, accuracy: MeanMetric
    ) -> None:
        losses, hits = self._judge(batch)
        loss.update(losses)
        accuracy.update(hits)
        self.log(f"{stage}/loss", loss, prog_bar=True)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True)


def _mean() -> MeanMetric:
    return MeanMetric(nan_strategy="disable")  # to look for NaN, the host would wait
