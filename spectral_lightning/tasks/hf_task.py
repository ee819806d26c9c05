"""A Hugging Face causal LM in a Trainer: how well it predicts, and what it writes."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from spectral_lightning.losses import CrossEntropy
from spectral_lightning.models import assert_causal
from spectral_lightning.tasks.hf_batches import inputs_and_targets
from spectral_lightning.tasks.hf_evaluation import Evaluation
from spectral_lightning.tasks.hf_generation import continue_text, tokenizer_of
from spectral_lightning.tasks.hf_loss import inner_model
from spectral_lightning.tasks.hf_models import vocabulary_rows
from spectral_lightning.tasks.samples import write_continuations


class HFTask(pl.LightningModule):
    """The half of `HFCausalLM` that does not train: validation, testing and generation.

    Args:
        model: A Hugging Face causal LM, or a PEFT model around one.
        loss: Transform that its logits are meant for.
        sample_prompts: Texts to continue after every validation.
        sample_tokens: Length of a continuation in tokens, at least 1.

    Raises:
        ValueError: If `sample_tokens` is below 1.
    """

    token_bytes: Tensor | None

    def __init__(
        self, model: nn.Module, loss: CrossEntropy, sample_prompts: list[str], sample_tokens: int
    ) -> None:
        super().__init__()
        if sample_tokens < 1:
            raise ValueError(f"`sample_tokens` must be >= 1, got {sample_tokens}.")
        self.model, self.loss = model, loss
        self.sample_prompts, self.sample_tokens = sample_prompts, sample_tokens
        self.valid, self.test = Evaluation(loss), Evaluation(loss)
        self.register_buffer("token_bytes", None, persistent=False)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._is_checked = False

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of shape ``(B, T, vocabulary)`` for token ids of shape ``(B, T)``."""
        return self.model(input_ids=tokens, use_cache=False).logits

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count the batch towards the numbers of ``valid``."""
        self._evaluate("valid", batch)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Count the batch towards the numbers of ``test``."""
        self._evaluate("test", batch)

    @override
    def on_validation_start(self) -> None:
        """In the sanity check, refuse to train a model on the next token that can see it.

        Left out while the model is sharded, because then all ranks would have to take part.

        Raises:
            ValueError: If a token's logits depend on a later token.
        """
        if self.trainer.sanity_checking:
            self._check_causality()

    @override
    def on_train_start(self) -> None:
        """Refuse it here if there was no sanity check."""
        if not self._is_checked:
            self._check_causality()

    def _check_causality(self) -> None:
        self._is_checked = True
        if not self.is_sharded():
            rows, atol = vocabulary_rows(self.model), self._rounding()
            assert_causal(self, rows, sequence_len=8, num_cuts=4, atol=atol)

    def _rounding(self) -> float:
        """Change of a logit that may be rounding.

        Experts sum in an order that tokens change, and 8-bit kernels scale by all of them.
        """
        has_experts = any("experts" in name for name, _ in self.model.named_modules())
        if not (has_experts or getattr(inner_model(self.model), "is_quantized", False)):
            return 0.0
        is_single = next(self.model.parameters()).dtype == torch.float32
        return 1e-5 if is_single else 1e-2  # logits of fresh models leak by 1e-4

    @override
    def on_validation_end(self) -> None:
        """Write continuations of the prompts to loggers that take text, on rank zero.

        Left out while the model is sharded, because then all ranks would have to take part.
        """
        due = self.sample_prompts and not self.trainer.sanity_checking
        if due and self.trainer.is_global_zero and not self.is_sharded():
            write_continuations(
                lambda prompt: self.generate(prompt, self.sample_tokens),
                self.sample_prompts,
                self.trainer.loggers,
                self.global_step,
            )

    def generate(self, prompt: str, max_new_tokens: int = 64, **options: Any) -> str:
        """Continue a text by sampling from the probabilities that the model was trained for.

        Args:
            prompt: Text to continue, at least one token.
            max_new_tokens: Tokens to add at most, at least 1.
            options: `seed`, and arguments of the model's own `generate`, such as `temperature`.

        Raises:
            FloatingPointError: If the model's logits are NaN.
            ValueError: If no tokenizer is known.
        """
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self.model)
        return continue_text(
            self.model, self._tokenizer, prompt, max_new_tokens=max_new_tokens, **options
        )

    def _evaluate(self, stage: str, batch: Any) -> None:
        inputs, targets = inputs_and_targets(batch)
        logits = self.model(**inputs, use_cache=False).logits
        metrics = getattr(self, stage).update(logits, targets, self.token_bytes)
        for name, metric in metrics.items():
            self.log(f"{stage}/{name}", metric, prog_bar=True)

    def is_sharded(self) -> bool:
        """Whether parameters lie on several ranks."""
        return any(isinstance(parameter, DTensor) for parameter in self.parameters())
