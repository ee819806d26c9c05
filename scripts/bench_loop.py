"""Tokens per second of our Lightning training loop against a bare PyTorch loop, interleaved.

Both train the same GPT with the same optimizer, schedule, clipping and text, 4,096 tokens per
step; the Lightning side is `LanguageModeling` under a Trainer with a TensorBoard logger. Blocks run
in the order A B B A (A bare, B Lightning); the first steps of each block, which Lightning spends
on start-up, are not timed on either side. The last line printed is one JSON object::

    python scripts/bench_loop.py --save scripts/results/loop.json
"""

import argparse
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from bench_common import SEED, SEQUENCE_LEN, VOCAB_SIZE, report, text_data
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn.functional import cross_entropy

from spectral_lightning.callbacks import SpectralMonitor
from spectral_lightning.models import GPT
from spectral_lightning.optim import MuonAdamW, WarmupConstantWarmdown, parameter_groups
from spectral_lightning.tasks import LanguageModeling

BATCH_SIZE, UNTIMED = 4096 // SEQUENCE_LEN, 3


class Clock(pl.Callback):
    """Take the time at the end of the last untimed and of the last step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Note the time of a step's end."""
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Seconds of the timed steps."""
        return self.times[-1] - self.times[UNTIMED - 1]


def bare(model: GPT, data: pl.LightningDataModule, steps: int) -> float:
    """Seconds of the timed steps of a bare loop."""
    optimizer = MuonAdamW(parameter_groups(model))
    schedule = WarmupConstantWarmdown(optimizer, num_steps=steps)

    def train(tokens: Tensor) -> None:  # a function, so that it keeps no tensor alive
        logits = model(tokens[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    times = []
    for tokens in islice(iter(data.train_dataloader()), steps):
        train(tokens)
        times.append(time.perf_counter())
    return times[-1] - times[UNTIMED - 1]


def under_lightning(
    model: GPT, data: pl.LightningDataModule, steps: int, callbacks: list[pl.Callback]
) -> float:
    """Seconds of the timed steps under a Trainer."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=TensorBoardLogger(folder),
            callbacks=[*callbacks, clock],
            gradient_clip_val=1.0,
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(LanguageModeling(model), datamodule=data)
    return clock.seconds


def measure(quadruples: int, steps: int, monitor: bool) -> dict[str, Any]:
    """Run the blocks and compare."""
    pl.seed_everything(SEED, verbose=False)
    data = text_data(BATCH_SIZE)
    seconds: dict[str, list[float]] = {"A": [], "B": []}
    for letter in "ABBA" * quadruples:
        model = GPT(4, VOCAB_SIZE, SEQUENCE_LEN, head_dim=64)
        callbacks = [SpectralMonitor(table_rows=0, spectrum_every_n_steps=None)] if monitor else []
        took = (
            bare(model, data, steps)
            if letter == "A"
            else under_lightning(model, data, steps, callbacks)
        )
        seconds[letter].append(took)
    pairs = range(0, 2 * quadruples, 2)
    ratios = [sum(seconds["A"][i : i + 2]) / sum(seconds["B"][i : i + 2]) for i in pairs]
    tokens = (steps - UNTIMED) * BATCH_SIZE * SEQUENCE_LEN
    return {
        "bare_tokens_per_s": round(tokens / statistics.median(seconds["A"])),
        "lightning_tokens_per_s": round(tokens / statistics.median(seconds["B"])),
        "lightning_percent_of_bare": round(100 * statistics.median(ratios), 2),
        "percent_range": [round(100 * min(ratios), 2), round(100 * max(ratios), 2)],
    }


def main() -> None:
    """Parse the options, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quadruples", type=int, default=5, help="A B B A rounds")
    parser.add_argument("--steps", type=int, default=18, help="steps per block, 3 of them untimed")
    parser.add_argument("--monitor", action="store_true", help="put SpectralMonitor on B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path, help="file for the JSON record")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {
        "what": "GPT depth 4 (5.2 M parameters), MuonAdamW, clipping, 4,096 tokens per step",
        "target": "Lightning >= 98 % of the bare loop's tokens/s",
        "monitor": options.monitor,
        "steps_per_block": options.steps,
        **measure(options.quadruples, options.steps, options.monitor),
    }
    report(results, options.save)


if __name__ == "__main__":
    main()
