"""Training any causal language model of Hugging Face."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW
from typing_extensions import override

from spectral_lightning.losses import CrossEntropy
from spectral_lightning.optim import OrthogonalOptimizer, parameter_groups
from spectral_lightning.tasks.checkpoint import CHECKPOINT_KEY, check_tensors, read_checkpoint
from spectral_lightning.tasks.hf_batches import inputs_and_targets
from spectral_lightning.tasks.hf_checks import check_data, check_strategy
from spectral_lightning.tasks.hf_generation import hf_tokenizer
from spectral_lightning.tasks.hf_loss import (
    IGNORED_LABEL,
    LOSS_KEY,
    inner_model,
    install_loss,
    refuse_bypass,
)
from spectral_lightning.tasks.hf_models import (
    LoraSettings,
    causal_lm,
    decoder_layers,
    recompute_activations,
    save_hf,
    vocabulary_rows,
    with_lora,
)
from spectral_lightning.tasks.hf_task import HFTask
from spectral_lightning.tasks.hf_window import TokenWindow
from spectral_lightning.tasks.schedules import RunSchedule


class HFCausalLM(HFTask):
    """Train a causal language model of Hugging Face, with softmax or StableMax.

    A batch is a dict with `input_ids`, `labels` (-100 is ignored; the shift by one is made here)
    and what else the model takes, as `InstructionDataModule` gives it; or a tensor of token ids
    ``(B, T + 1)`` from a data module for text. Logs ``train/loss`` (nats per token), and for
    ``valid`` and ``test`` the loss over the whole set and all ranks, with StableMax also
    ``valid/softmax_loss`` of the same logits, and ``valid/bpb`` (bits per byte) where the data
    module offers `token_bytes`. Label smoothing and z loss count in training only.

    The loss is installed in the model itself (`install_loss`), and its settings in the config, so
    a saved folder given as `model` goes on with them.

    Args:
        model: Name on the Hugging Face Hub, folder written by ``save_pretrained``, config with a
            `model_type` as a dict or a JSON file (random weights), or a model.
        loss: Transform and settings of the loss; None for those in the model's config, and
            softmax if it has none.
        optimizer: Called with the model's parameter groups; None for ``torch.optim.AdamW``.
        lr_scheduler: Called with the optimizer and stepped after every optimizer step. None uses
            `WarmupConstantWarmdown` over the Trainer's whole run with the next three arguments.
        warmup_steps: Optimizer steps in which the learning rate rises; below 1, a share of the run.
        warmdown_fraction: Share of the run in which the learning rate falls, in ``[0, 1]``.
        final_fraction: Learning rate at the end as a share of the full one, in ``[0, 1]``.
        token_weighted: Divide the loss by the tokens that count in all batches and ranks of an
            optimizer step, however unevenly they hold them. Otherwise each batch counts alike. A
            term that a callback adds to the loss itself, or the model for its experts, is then
            weighted by a batch's share of the tokens of the step before.
        dtype: Of the weights, such as ``"bfloat16"``; None for float32.
        attn_implementation: Such as ``"sdpa"`` or ``"flash_attention_2"``; None for the model's.
        gradient_checkpointing: Compute the layers' activations again in the backward pass.
        compile: Whether to compile each layer of the decoder.
        lora: Train low-rank additions only, through the package `peft`.
        sample_prompts: Texts to continue after every validation, written to loggers that take
            text (TensorBoard).
        sample_tokens: Length of a continuation in tokens, at least 1.
        save_folder: Folder in the logger's that gets model, tokenizer and generation config at the
            end of `fit`, if there is a logger; None saves nothing.

    Raises:
        TypeError: If `model` or its loss is of the wrong kind.
        ValueError: If an argument is outside its range; in `setup`, if model, data module and
            strategy do not fit together.
        OSError: If a model can not be had.
    """

    def __init__(
        self,
        model: str | nn.Module | dict[str, Any],
        loss: CrossEntropy | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: float = 0,
        warmdown_fraction: float = 0.2,
        final_fraction: float = 0.0,
        token_weighted: bool = True,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        lora: LoraSettings | dict[str, Any] | None = None,
        sample_prompts: list[str] | None = None,
        sample_tokens: int = 64,
        save_folder: str | None = "huggingface",
    ) -> None:
        schedule = RunSchedule(lr_scheduler, warmup_steps, warmdown_fraction, final_fraction)
        network: Any = causal_lm(model, dtype=dtype, attn_implementation=attn_implementation)
        lora = LoraSettings(**lora) if isinstance(lora, dict) else lora
        if lora is not None:
            network = with_lora(network, lora)
        if gradient_checkpointing:
            recompute_activations(network)
        network.train()  # loaded models are in evaluation mode, which Lightning leaves as it is
        hook = install_loss(network, loss)
        super().__init__(network, hook.cross_entropy, sample_prompts or [], sample_tokens)
        self._hook, self.lora = hook, lora
        self.optimizer: OptimizerCallable = AdamW if optimizer is None else optimizer
        self.schedule = schedule
        self.compile_layers = compile
        self.save_folder = save_folder
        self.window = TokenWindow() if token_weighted else None
        self._num_batches, self._num_empty = 0, torch.zeros(())

    @override
    def setup(self, stage: str) -> None:
        """Take tokenizer and bytes per token from the data module, and see to loss and layers.

        Raises:
            ValueError: If model, data module and strategy do not fit together.
        """
        check_strategy(self.trainer.strategy)
        if inner_model(self.model).loss_function is not self._hook:  # another one was loaded
            self._hook = install_loss(self.model, self.loss)
        data = getattr(self.trainer, "datamodule", None)
        check_data(self.model, data)
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is not None:
            self._tokenizer = hf_tokenizer(tokenizer)
        token_bytes = getattr(data, "token_bytes", None)
        if token_bytes is not None:
            rows = torch.zeros(vocabulary_rows(self.model), dtype=torch.int64)
            rows[: len(token_bytes)] = token_bytes
            self.token_bytes = rows.to(self.device)
        if self.compile_layers:
            for layer in decoder_layers(self.model):
                if layer._compiled_call_impl is None:
                    layer.compile()

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and its schedule.

        Raises:
            ValueError: If the learning rate should fall at the end of a run that has none.
        """
        groups = parameter_groups(self.model)
        if self.lora is not None:  # a factor's own direction is not that of the weight it adds to
            groups = [{**group, "orthogonal": "off"} for group in groups]
        optimizer = self.optimizer(groups)
        if self.lora is not None and isinstance(optimizer, OrthogonalOptimizer):
            rank_zero_warn("The factors of `lora` are not projected by an orthogonal optimizer.")
        return self.schedule.with_optimizer(self.trainer, optimizer)

    @override
    def on_train_start(self) -> None:
        """Forget what an earlier run left unfinished."""
        super().on_train_start()
        self._num_batches, self._num_empty = 0, torch.zeros((), device=self.device)
        if self.window is not None:
            self.window.clear()

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of the batch, nats per token.

        Raises:
            ValueError: If the model computed its loss past ours.
        """
        inputs, targets = inputs_and_targets(batch)
        num_tokens = (targets != IGNORED_LABEL).sum()
        self._num_batches += 1
        self._num_empty = self._num_empty + (num_tokens == 0)
        divisor = num_tokens.clamp(min=1).float()
        if self.window is not None:
            divisor = self.window.divisor(num_tokens, self.trainer)
        self._hook.was_called, self._hook.divisor = False, None
        loss = self.model(
            **inputs,
            labels=targets,
            shift_labels=targets,
            num_items_in_batch=divisor,
            use_cache=False,
        ).loss
        refuse_bypass(self.model, self._hook)
        if self.window is not None:
            self.window.add(loss, divisor, num_tokens)
        else:
            self.log("train/loss", loss, prog_bar=True)
        return loss

    @override
    def on_after_backward(self) -> None:
        """At the end of an accumulation window, weigh its tokens alike and log their loss."""
        epoch_loop = self.trainer.fit_loop.epoch_loop
        if self.window is not None and not epoch_loop._should_accumulate():
            loss = self.window.close(self.trainer, self.model.parameters())
            self.log("train/loss", loss, prog_bar=True)

    @override
    def on_train_epoch_end(self) -> None:
        """Warn of batches in which no label counted."""
        num_empty = int(self._num_empty)
        if num_empty:
            rank_zero_warn(
                f"Every label was ignored in {num_empty} of {self._num_batches} batches, which"
                " trained nothing; their prompts may fill `sequence_len`, or the masking of labels"
                " is at fault."
            )
        self._num_batches, self._num_empty = 0, torch.zeros_like(self._num_empty)

    @override
    def on_fit_end(self) -> None:
        """Save model and tokenizer in the logger's folder, on rank zero.

        Warns:
            UserWarning: If the model is sharded and therefore not saved.
        """
        is_run = self.trainer.loggers and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.save_folder is None or not is_run:
            return
        folder = self.trainer.log_dir  # asks all ranks
        if self.is_sharded():
            rank_zero_warn("`save_folder` has no effect on a sharded model; use its checkpoint.")
        elif self.trainer.is_global_zero and folder is not None:
            save_hf(self.model, self._tokenizer, Path(folder) / self.save_folder)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how to build the model, as plain containers."""
        checkpoint[CHECKPOINT_KEY] = {
            "config": json.loads(inner_model(self.model).config.to_json_string(use_diff=False)),
            "lora": None if self.lora is None else asdict(self.lora),
            "token_weighted": self.window is not None,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
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
        keys = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if self.window is not None:
            self.window.restored()
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
            ValueError: If it is damaged, or does not fit `model`.
        """
        saved = read_checkpoint(checkpoint_path).get(CHECKPOINT_KEY, {})
        if "model" not in kwargs and "config" in saved:
            lora = saved["lora"]
            built = {name: saved[name] for name in ("token_weighted", "dtype") if name in saved}
            built |= {"lora": lora and LoraSettings(**lora), "model": saved["config"]}
            kwargs = {**built, **kwargs}
        elif saved.get("config", {}).get(LOSS_KEY) is not None:
            kwargs.setdefault("loss", CrossEntropy(**saved["config"][LOSS_KEY]))
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
