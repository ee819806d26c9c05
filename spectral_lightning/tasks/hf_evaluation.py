"""How well a Hugging Face causal LM predicts a whole data set."""

from dataclasses import replace

from torch import Tensor, nn
from torchmetrics import Metric

from spectral_lightning.losses import CrossEntropy
from spectral_lightning.tasks.bits_per_byte import IGNORED, BitsPerByte, TokenLoss
from spectral_lightning.tasks.hf_loss import IGNORED_LABEL


class Evaluation(nn.Module):
    """The numbers of one data set, over all its tokens and all ranks.

    Args:
        loss: The training loss, whose probabilities are judged, without smoothing and z loss.
    """

    def __init__(self, loss: CrossEntropy) -> None:
        super().__init__()
        self.likelihood = loss.likelihood()
        self.loss, self.softmax_loss, self.bpb = TokenLoss(), TokenLoss(), BitsPerByte()

    def update(
        self, logits: Tensor, targets: Tensor, token_bytes: Tensor | None
    ) -> dict[str, Metric]:
        """Count a batch.

        Args:
            logits: Shape ``(B, T, V)``.
            targets: Shape ``(B, T)``, int64; -100 is ignored.
            token_bytes: Bytes per token id, shape ``(V,)``, int64; None if unknown.

        Returns:
            The metrics that have something to say, by name.
        """
        counted = targets.masked_fill(targets == IGNORED_LABEL, IGNORED)
        nats = self.likelihood(logits, targets, reduction="none")
        self.loss.update(nats, counted)
        metrics: dict[str, Metric] = {"loss": self.loss}
        if self.likelihood.transform != "softmax":
            softmax = replace(self.likelihood, transform="softmax")
            self.softmax_loss.update(softmax(logits, targets, reduction="none"), counted)
            metrics["softmax_loss"] = self.softmax_loss
        if token_bytes is not None:
            self.bpb.update(nats, counted, token_bytes)
            metrics["bpb"] = self.bpb
        return metrics
