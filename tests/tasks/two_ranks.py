"""One rank of a two-rank run; prints its numbers as JSON."""

import json
import logging
import sys
import warnings

import lightning.pytorch as pl
import torch

from spectral_lightning.data import TextDataModule
from spectral_lightning.models import GPT
from spectral_lightning.tasks import LanguageModeling


def main(text: str, cache: str, world_size: int) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Four windows per step in total, whatever the number of ranks.
    data = TextDataModule(
        text,
        vocab_size=300,
        sequence_len=16,
        batch_size=4 // world_size,
        valid_fraction=0.2,
        cache_dir=cache,
    )
    task = LanguageModeling(GPT(depth=1, vocab_size=300, sequence_len=16))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_steps=3,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, data)
    (metrics,) = trainer.validate(task, data, verbose=False)
    metrics["weights"] = sum(parameter.double().sum().item() for parameter in task.parameters())
    metrics["batches"] = len(data.val_dataloader())
    sys.stdout.write(json.dumps(metrics) + "\n")
    if torch.distributed.is_initialized():  # else its threads may outlive the interpreter
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
