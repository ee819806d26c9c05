"""What the benchmarks share: the model and text they measure on, and the record they print."""

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_lightning.data import TextDataModule

VOCAB_SIZE, SEQUENCE_LEN = 4096, 256
SEED = 0
"""Seed of every random number that a script draws: weights, order of the text, test matrices."""


def llama_30m() -> LlamaForCausalLM:
    """A Hugging Face Llama of 29.5 M parameters with 57 linear layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=512,
            num_hidden_layers=8,
            intermediate_size=1376,
            num_attention_heads=8,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=SEQUENCE_LEN,
        )
    )


class LlamaTask(pl.LightningModule):
    """A Hugging Face model on token batches, with AdamW."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model = model
        self.lr = lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean loss of next-token prediction."""
        inputs = batch[:, :-1]
        return self.model(input_ids=inputs, labels=inputs).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build AdamW with PyTorch's defaults."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def text_data(batch_size: int) -> TextDataModule:
    """Windows of 256 tokens of the documentation that ships with CPython."""
    data = TextDataModule(vocab_size=VOCAB_SIZE, sequence_len=SEQUENCE_LEN, batch_size=batch_size)
    data.prepare_data()
    data.setup("fit")
    return data


def quiet_trainer(**options: Any) -> pl.Trainer:
    """Trainer without files, bars and validation."""
    return pl.Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        max_epochs=-1,
        **options,
    )


def report(results: dict[str, Any], save: Path | None) -> None:
    """Print the results with what they were measured on as one JSON line; optionally save them."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
        "seed": SEED,
        **results,
    }
    if save is not None:
        save.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
