"""Training a causal language model on batches of tokens."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from spectral_lightning.losses import CrossEntropy
from spectral_lightning.models import assert_causal
from spectral_lightning.nn import CapacityFit
from spectral_lightning.nn.functional import Transform
from spectral_lightning.optim import MuonAdamW, parameter_groups
from spectral_lightning.tasks.bits_per_byte import (
    IGNORED,
    BitsPerByte,
    TokenLoss,
    counted_bytes,
    token_losses,
)
from spectral_lightning.tasks.checkpoint import (
    CHECKPOINT_KEY,
    CheckedCheckpointIO,
    agreed_tokenizer,
    build_model,
    check_tensors,
    model_recipe,
    read_checkpoint,
    saved_loss,
)
from spectral_lightning.tasks.samples import check_prompts, write_samples
from spectral_lightning.tasks.schedules import RunSchedule


class LanguageModeling(pl.LightningModule):
    """Train a causal model to predict the next token.

    A batch is a tensor of token ids ``(B, T + 1)``, int64: position ``t`` predicts ``t + 1``, and
    targets of -1 are ignored. Logs ``train/loss`` (nats per token) and, where the data module
    offers `token_bytes`, ``train/bpb`` (bits per byte), and the same for ``valid`` and ``test``
    over the whole set and all ranks. The loss is computed in float32.

    Checkpoints hold the tokenizer and, for models with a `config`, how to build the model;
    `load_language_model` needs nothing else.

    Args:
        model: Any causal model with `vocab_size` and `sequence_len` that turns token ids
            ``(B, T)`` into logits ``(B, T, vocab_size)``.
        optimizer: Called with the model's parameter groups; None for `MuonAdamW`.
        lr_scheduler: Called with the optimizer and stepped after every optimizer step. None uses
            `WarmupConstantWarmdown` over the Trainer's whole run with the next three arguments.
        warmup_steps: Optimizer steps in which the learning rate rises; below 1, a share of the run.
        warmdown_fraction: Share of the run in which the learning rate falls, in ``[0, 1]``.
            Defaults of the three from nanochat, November 2025.
        final_fraction: Learning rate at the end as a share of the full one, in ``[0, 1]``.
        sample_prompts: Texts to continue after every validation, written to loggers that take
            text (TensorBoard).
        sample_tokens: Length of a continuation in tokens, at least 1; the default is chosen here.
        loss: What is trained and logged as the loss; None for PyTorch's cross-entropy. Bits per
            byte are those of the same probabilities, without smoothing and z term.

    Raises:
        TypeError: If the model does not say its `vocab_size` and `sequence_len`.
        ValueError: If an argument is outside its range; in `setup`, if model and data module do
            not fit together.
    """

    token_bytes: Tensor

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: float = 0,
        warmdown_fraction: float = 0.2,
        final_fraction: float = 0.0,
        sample_prompts: list[str] | None = None,
        sample_tokens: int = 64,
        loss: CrossEntropy | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = _size(model, "vocab_size")
        self.sequence_len = _size(model, "sequence_len")
        if sample_tokens < 1:
            raise ValueError(f"`sample_tokens` must be >= 1, got {sample_tokens}.")
        self.model, self.loss = model, loss
        # No class as the default: jsonargparse would hand its settings on to any other class.
        self.optimizer: OptimizerCallable = MuonAdamW if optimizer is None else optimizer
        self.schedule = RunSchedule(lr_scheduler, warmup_steps, warmdown_fraction, final_fraction)
        self.sample_prompts, self.sample_tokens = sample_prompts or [], sample_tokens
        self.valid_loss, self.valid_bpb = TokenLoss(), BitsPerByte()
        self.test_loss, self.test_bpb = TokenLoss(), BitsPerByte()
        self.register_buffer("token_bytes", torch.zeros(self.vocab_size, dtype=torch.int64))
        self._knows_bytes = False  # a Python flag, so that no step asks the device
        self._tokenizer: str | None = None
        self._is_checked = False
        self._capacities = CapacityFit(self)

    @property
    def transform(self) -> Transform:
        """What turns the model's logits into probabilities."""
        return "softmax" if self.loss is None else self.loss.transform

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of shape ``(B, T, vocab_size)`` for token ids of shape ``(B, T)``."""
        return self.model(tokens)

    @override
    def setup(self, stage: str) -> None:
        """Take the tokenizer and the bytes per token from the data module.

        Raises:
            ValueError: If model, data module and prompts do not fit together.
        """
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = CheckedCheckpointIO()
        data = getattr(self.trainer, "datamodule", None)
        for name in ("vocab_size", "sequence_len"):
            needed, offered = getattr(data, name, 0), getattr(self, name)
            if needed > offered:
                raise ValueError(
                    f"The model's `{name}` must be at least {needed}, that of the data, got"
                    f" {offered}."
                )
        token_bytes = getattr(data, "token_bytes", None)
        if token_bytes is not None:
            self.token_bytes.zero_()[: len(token_bytes)] = token_bytes
            self._knows_bytes = True
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is not None:
            self._tokenizer = agreed_tokenizer(self._tokenizer, tokenizer.to_str())
        if self.sample_prompts and self._tokenizer is None:
            raise ValueError(
                "`sample_prompts` must be empty unless the data module offers a `tokenizer`."
            )
        if self._tokenizer is not None:
            tokenizer = Tokenizer.from_str(self._tokenizer)
            check_prompts(self.sample_prompts, self.sample_tokens, tokenizer, self.sequence_len)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and its schedule.

        Raises:
            ValueError: If the learning rate should fall at the end of a run that has none.
        """
        optimizer = self.optimizer(parameter_groups(self.model))
        optimizer.register_load_state_dict_pre_hook(self._capacities.optimizer_state)
        return self.schedule.with_optimizer(self.trainer, optimizer)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean loss of the batch, nats per token."""
        losses, nats, targets = self._losses(batch)
        loss = losses.sum() / (targets != IGNORED).sum().clamp(min=1)
        self.log("train/loss", loss, prog_bar=True)
        if self._knows_bytes:
            num_bytes = counted_bytes(targets, self.token_bytes)
            text_nats = torch.where(num_bytes > 0, nats.detach(), 0).sum()
            self.log("train/bpb", text_nats / (math.log(2) * num_bytes.sum()))
        return loss

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Count the batch towards ``valid/loss`` and ``valid/bpb``."""
        self._evaluate("valid", batch, self.valid_loss, self.valid_bpb)

    @override
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Count the batch towards ``test/loss`` and ``test/bpb``."""
        self._evaluate("test", batch, self.test_loss, self.test_bpb)

    @override
    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the bits per byte of every sequence, shape ``(B,)``; NaN for one without text.

        Raises:
            ValueError: If the bytes per token are unknown.
        """
        if not self._knows_bytes:
            raise ValueError(
                "Predicting bits per byte must know the bytes per token: give a data module with"
                " `token_bytes`, or a checkpoint that was trained with one."
            )
        _, nats, targets = self._losses(batch)
        num_bytes = counted_bytes(targets, self.token_bytes)
        return torch.where(num_bytes > 0, nats, 0).sum(1) / (math.log(2) * num_bytes.sum(1))

    @override
    def on_validation_end(self) -> None:
        """Write continuations of the prompts to loggers that take text, on rank zero.

        Left out while the model is sharded, because then all ranks would have to take part.
        """
        if self._tokenizer is None or self.trainer.sanity_checking:
            return
        is_sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters())
        if self.sample_prompts and self.trainer.is_global_zero and not is_sharded:
            write_samples(
                self.model,
                self.sample_prompts,
                self.sample_tokens,
                Tokenizer.from_str(self._tokenizer),
                self.trainer.loggers,
                self.global_step,
                self.transform,
            )

    @override
    def on_validation_start(self) -> None:
        """In the sanity check, refuse to train a model on the next token that can see it."""
        if self.trainer.sanity_checking:
            self._check_causality()

    @override
    def on_train_start(self) -> None:
        """Refuse it here if there was no sanity check."""
        if not self._is_checked:
            self._check_causality()

    def _check_causality(self) -> None:
        """Run `assert_causal`; left out while sharded, because then all ranks would take part."""
        self._is_checked = True
        if not any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            assert_causal(self.model, self.vocab_size, num_cuts=4)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the tokenizer, the loss and how to build the model, as plain containers."""
        checkpoint[CHECKPOINT_KEY] = {
            "tokenizer": self._tokenizer,
            "model": model_recipe(self.model),
            "loss": None if self.loss is None else asdict(self.loss),
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the tokenizer of a checkpoint.

        Raises:
            ValueError: If the data module has another one.

        Warns:
            UserWarning: If the model was trained for other probabilities than the task's.
        """
        saved = checkpoint.get(CHECKPOINT_KEY, {})
        self._tokenizer = agreed_tokenizer(self._tokenizer, saved.get("tokenizer"))
        trained = (saved_loss(checkpoint) or CrossEntropy()).transform
        if "loss" in saved and trained != self.transform:
            rank_zero_warn(
                f"The checkpoint was trained with {trained}, but `loss` has {self.transform}, for"
                " which its logits mean other probabilities."
            )

    @override
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load all tensors, or none if one of them does not fit.

        Low-rank layers may have another capacity if the saved ranks fit; optimizers follow.

        Raises:
            ValueError: If a tensor differs in shape, or with `strict` is missing on either side.
        """
        state_dict = self._capacities.model_state(state_dict)
        check_tensors(self.state_dict(), state_dict, strict=strict)
        keys = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._knows_bytes = bool(self.token_bytes.any())
        return keys

    @override
    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any
    ) -> Self:
        """Load a task from a local file, and take model and loss from there if they are not given.

        Takes what ``LightningModule.load_from_checkpoint`` takes.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, does not fit `model`, or does not say how to build one.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        if "model" not in kwargs:
            kwargs["model"] = build_model(checkpoint)
        loss = saved_loss(checkpoint)
        if loss is not None:
            kwargs.setdefault("loss", loss)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def _losses(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, surprise and id of every target, shape ``(B, T)``."""
        inputs, targets = batch[:, :-1], batch[:, 1:]
        # What a causal model reads at an ignored target has no effect on the targets before it.
        return *token_losses(self(inputs.clamp(min=0)), targets, self.loss), targets

    def _evaluate(
        self, stage: str, batch: Tensor, mean_loss: TokenLoss, bits_per_byte: BitsPerByte
    ) -> None:
        losses, nats, targets = self._losses(batch)
        mean_loss.update(losses, targets)
        self.log(f"{stage}/loss", mean_loss, prog_bar=not self._knows_bytes)
        if self._knows_bytes:
            bits_per_byte.update(nats, targets, self.token_bytes)
            self.log(f"{stage}/bpb", bits_per_byte, prog_bar=True)


def _size(model: nn.Module, name: str) -> int:
    size = getattr(model, name, None)
    if not isinstance(size, int):
        raise TypeError(
            f"`model` must have an integer attribute `{name}`, got a {type(model).__name__}."
        )
    return size
