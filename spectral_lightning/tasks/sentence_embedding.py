"""Training a model of sentence embeddings on pairs of texts that belong together."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW
from typing_extensions import override

from spectral_lightning.losses import (
    CosineTemperature,
    LearnableTemperature,
    Matryoshka,
    SpectraLoss,
    cosent_loss,
)
from spectral_lightning.losses.spectra import Part
from spectral_lightning.models.spectra import SpectraModel
from spectral_lightning.optim import parameter_groups
from spectral_lightning.tasks.checkpoint import CHECKPOINT_KEY, check_tensors, read_checkpoint
from spectral_lightning.tasks.embedding_checkpoint import (
    pack_loss,
    pack_temperature,
    pack_tokenizer,
    task_settings,
)
from spectral_lightning.tasks.embedding_models import embedding_model
from spectral_lightning.tasks.embedding_task import ChunkSize, EmbeddingTask
from spectral_lightning.tasks.hf_models import decoder_layers, recompute_activations
from spectral_lightning.tasks.schedules import RunSchedule

_WARMUP = 0.08  # from Spectra-NSA


class SentenceEmbedding(EmbeddingTask):
    """Train sentence embeddings: texts that belong together end up close.

    A batch is a dict with `input_ids` and `attention_mask` ``(B, k, S)`` and `text_ids` ``(B, k)``,
    as `PairsDataModule` gives it: column 0 is the anchor, 1 its positive, others are hard
    negatives. Where it has `scores` ``(B,)``, pairs are ranked by them instead (CoSENT).
    An anchor is held apart from the positives and hard negatives of all rows on all ranks.

    Logs ``train/loss``, its terms as ``train/<term>``, and ``train/temperature``; `EmbeddingTask`
    says what evaluation logs. Checkpoints hold the tokenizer and how to build the model, so that
    `load_sentence_encoder` needs nothing else.

    Args:
        model: Size, folder, name, settings or model (`embedding_model`).
        loss: Terms, their weights and settings; None for those of `SpectraLoss`.
        without: Parts of model and loss to leave out: ``spectral`` (the attention's spectral branch
            and the entropy term), ``anchor`` (head and term), ``bridge`` (the term, and the entity
            head, which nothing else trains), ``matryoshka`` (all but the largest dimension of the
            semantic head, and the alignment), ``angular`` (the alignment of retrieval and ranking
            head).
        temperature: Of the softmax over texts: a schedule over the run, or learned.
        optimizer: Called with the model's parameter groups; None for ``torch.optim.AdamW``.
        lr_scheduler: Called with the optimizer and stepped after every optimizer step. None uses
            `WarmupConstantWarmdown` over the Trainer's whole run with the next three arguments.
        warmup_steps: Optimizer steps in which the learning rate rises; below 1, a share of the run.
        warmdown_fraction: Share of the run in which the learning rate falls, in ``[0, 1]``.
        final_fraction: Learning rate at the end as a share of the full one, in ``[0, 1]``.
        chunk_size: Texts encoded at a time, each chunk only as wide as its longest text; None for
            all at once. ``"auto"``: 16 on a CPU (chosen with ``scripts/embedding_table.py``, where
            all at once takes almost twice the time), and all at once elsewhere, where the host
            would wait for the lengths.
        recompute: Keep no activations, and make those of one chunk after the other anew for the
            gradient: the batch may be of any size (gradient caching), for one more forward pass.
        gradient_checkpointing: Compute each layer's activations again in the backward pass.
        compile: Whether to compile each layer of the encoder.
        eval_heads: Heads to evaluate; None for all.

    Raises:
        OSError: If a model can not be had.
        ValueError: If an argument is outside its range; in `setup`, if model and data module do
            not fit together.
    """

    def __init__(
        self,
        model: str | dict[str, Any] | SpectraModel = "M456",
        loss: SpectraLoss | None = None,
        without: list[Part] | None = None,
        temperature: CosineTemperature | LearnableTemperature | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: float = _WARMUP,
        warmdown_fraction: float = 0.92,
        final_fraction: float = 0.0,
        chunk_size: ChunkSize = "auto",
        recompute: bool = False,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        eval_heads: list[str] | None = None,
    ) -> None:
        parts = frozenset(without or [])
        loss = (loss or SpectraLoss()).without(parts)
        built = embedding_model(
            model, loss.required_heads(), spectral_branch="spectral" not in parts
        )
        super().__init__(built, eval_heads)
        self.loss = _fitting(loss, built.head_dims())
        every_prefix = replace(self.loss.semantic_dims, num_dims_per_step=None)
        self._whole_loss = replace(self.loss, semantic_dims=every_prefix)
        self.without = parts
        # A module, which is learned, becomes a part of the task by being its attribute.
        self.temperature = CosineTemperature() if temperature is None else temperature
        self.optimizer: OptimizerCallable = AdamW if optimizer is None else optimizer
        if lr_scheduler is not None and warmup_steps == _WARMUP:
            warmup_steps = 0  # not asked for
        self.schedule = RunSchedule(lr_scheduler, warmup_steps, warmdown_fraction, final_fraction)
        if isinstance(chunk_size, int) and chunk_size < 1:
            raise ValueError(f"`chunk_size` must be >= 1, auto or None, got {chunk_size}.")
        if recompute and not isinstance(chunk_size, int):
            raise ValueError(f"`recompute` needs a number as `chunk_size`, got {chunk_size}.")
        self.chunk_size, self.recompute, self.compile_layers = chunk_size, recompute, compile
        if gradient_checkpointing:
            recompute_activations(self.model)
        self._terms: dict[str, Tensor] = {}
        self._representations: dict[str, Tensor] | None = None

    @override
    def setup(self, stage: str) -> None:
        """Take tokenizer and evaluation sets from the data module, and compile."""
        super().setup(stage)
        if self.compile_layers:
            for layer in decoder_layers(self.model):
                if layer._compiled_call_impl is None:
                    layer.compile()

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and its schedule; only matrices and heads decay.

        Raises:
            ValueError: If the learning rate should fall at the end of a run that has none.
        """
        groups = parameter_groups(self.model)
        if isinstance(self.temperature, nn.Module):
            own = {"params": list(self.temperature.parameters()), "role": "vector"}
            groups.append({**own, "name": "temperature"})
        for group in groups:
            if group["role"] in ("vector", "embedding"):
                group["weight_decay"] = 0.0
        return self.schedule.with_optimizer(self.trainer, self.optimizer(groups))

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of the batch."""
        columns = self.represent(batch, recompute=self.recompute)
        temperature = self._temperature()
        total, terms = self._loss(columns, batch, temperature)
        self._terms = {name: term.detach() for name, term in terms.items()}
        pairs = {
            name: torch.stack([rows, columns[1][name]], 1) for name, rows in columns[0].items()
        }
        self._representations = {name: rows.detach() for name, rows in pairs.items()}
        self.log("train/loss", total, prog_bar=True)
        self.log("train/temperature", temperature)
        self.log_dict({f"train/{name}": term for name, term in self._terms.items()})
        return total

    def last_loss_terms(self) -> dict[str, Tensor]:
        """Return the terms of the loss of the last training step, detached."""
        return self._terms

    def last_representations(self) -> dict[str, Tensor] | None:
        """Return anchors and positives of the last step by head, ``(B, 2, d)``; None at first."""
        return self._representations

    @override
    def eval_loss(self, columns: list[dict[str, Tensor]], batch: Any) -> Tensor | None:
        """Return the loss at the temperature of validation; None for a text without a negative."""
        if len(batch["text_ids"]) * self.trainer.world_size < 2:
            return None
        return self._loss(columns, batch, self.temperature.validation, self._whole_loss)[0]

    def _temperature(self) -> float | Tensor:
        if isinstance(self.temperature, nn.Module):
            return self.temperature()
        total = self.trainer.estimated_stepping_batches
        if not 0 < total < math.inf:  # a run without an end stays at its beginning
            return self.temperature.start
        return self.temperature(self.trainer.global_step, int(total))

    def _loss(
        self,
        columns: list[dict[str, Tensor]],
        batch: Any,
        temperature: float | Tensor,
        loss: SpectraLoss | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if "scores" in batch:
            heads = [name for name in self.loss.required_heads() if name != "spectral"]
            losses = {
                name: cosent_loss(columns[0][name], columns[1][name], batch["scores"])
                for name in heads
            }
            # Every parameter has a gradient, which DDP waits for.
            return torch.stack(list(losses.values())).mean() + 0.0 * temperature, losses
        negatives = None
        if len(columns) > 2:
            negatives = {
                name: torch.stack([column[name] for column in columns[2:]], 1)
                for name in columns[0]
            }
        return (loss or self.loss)(
            columns[0],
            columns[1],
            negatives,
            temperature=temperature,
            text_ids=batch["text_ids"],
            step=self.trainer.global_step,
        )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the tokenizer and how to build the model, as plain containers."""
        checkpoint[CHECKPOINT_KEY] = {
            "config": json.loads(self.model.config.to_json_string(use_diff=False)),
            "tokenizer": None if self._tokenizer is None else pack_tokenizer(self._tokenizer),
            "max_length": self.max_length,
            "loss": pack_loss(self.loss),
            "temperature": pack_temperature(self.temperature),
            "eval_heads": list(self.eval_heads),
        }

    @override
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load all tensors, or none if one of them does not fit.

        Raises:
            ValueError: If a tensor differs in shape, or with `strict` is missing on either side.
        """
        check_tensors(self.state_dict(), state_dict, strict=strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @override
    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any
    ) -> Self:
        """Load a task from a local file, and take model and tokenizer from there.

        Takes what ``LightningModule.load_from_checkpoint`` takes.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or does not fit `model`.
        """
        saved = read_checkpoint(checkpoint_path).get(CHECKPOINT_KEY, {})
        settings = {} if "model" in kwargs else task_settings(saved)
        return super().load_from_checkpoint(checkpoint_path, *args, **{**settings, **kwargs})


def _fitting(loss: SpectraLoss, dims: dict[str, tuple[int, ...]]) -> SpectraLoss:
    """Set prefixes that the user left at their defaults to those that the model has."""
    default = SpectraLoss()
    changes: dict[str, Any] = {}
    if loss.semantic_dims == default.semantic_dims and "semantic" in dims:
        weights = default.semantic_dims.weights
        if weights is not None and len(weights) != len(dims["semantic"]):
            weights = (sum(weights) / len(dims["semantic"]),) * len(dims["semantic"])
        changes["semantic_dims"] = Matryoshka(dims=dims["semantic"], weights=weights)
    if loss.bridge_dims == default.bridge_dims and {"entity", "semantic"} <= set(dims):
        common = [dim for dim in dims["entity"] if dim <= dims["semantic"][0]]
        changes["bridge_dims"] = (common[-1] if common else dims["semantic"][0],)
    return replace(loss, **changes)
