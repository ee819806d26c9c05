"""Cost of `SpectralMonitor`: step time with and without it, interleaved in one run.

One Trainer trains the 30 M Llama. Blocks of steps run in the order A B B A (A without, B with the
monitor); the overhead is the median over such quadruples of B / A - 1, of which the time
spent inside the monitor's own hook is reported too: the former is what a user pays, but carries
the noise of the whole step, the latter does not. The last line printed is one JSON object::

    python scripts/bench_overhead.py --save scripts/results/overhead.json
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from bench_common import LlamaTask, llama_30m, quiet_trainer, report, text_data

from spectral_lightning.callbacks import SpectralMonitor

ORDER = "ABBA"


class SwitchedMonitor(SpectralMonitor):
    """A monitor that is asleep in the A blocks, and times its hook in the B blocks."""

    def __init__(self, block_steps: int, warm_up: int, **options: Any) -> None:
        super().__init__(table_rows=0, **options)
        self.block_steps, self.warm_up = block_steps, warm_up
        self.hook_seconds: list[float] = []
        self.block_seconds: list[float] = []
        self._started = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Measure in the B blocks only, and close a block at its last step."""
        done = trainer.global_step - self.warm_up
        block = max(0, done - 1) // self.block_steps
        if done <= 0 or ORDER[block % 4] == "B":
            start = time.perf_counter()
            super().on_train_batch_end(trainer, *args)
            if done > 0:
                self.hook_seconds.append(time.perf_counter() - start)
        if done >= 0 and done % self.block_steps == 0:
            now = time.perf_counter()
            if done > 0:
                self.block_seconds.append(now - self._started)
            self._started = now


def measure(quadruples: int, block_steps: int, warm_up: int, lr: float) -> dict[str, Any]:
    """Run the training and evaluate the blocks."""
    pl.seed_everything(0, verbose=False)
    monitor = SwitchedMonitor(block_steps, warm_up, spectrum_every_n_steps=None)
    trainer = quiet_trainer(
        max_steps=warm_up + 4 * quadruples * block_steps, callbacks=[monitor], accelerator="cpu"
    )
    trainer.fit(LlamaTask(llama_30m(), lr), text_data(4).train_dataloader())
    blocks = monitor.block_seconds
    ratios = [
        (blocks[i + 1] + blocks[i + 2]) / (blocks[i] + blocks[i + 3]) - 1
        for i in range(0, len(blocks), 4)
    ]
    step = statistics.median(
        blocks[i + j] / block_steps for i in range(0, len(blocks), 4) for j in (0, 3)
    )
    hook = statistics.median(monitor.hook_seconds)
    return {
        "step_ms": round(1e3 * step, 1),
        "overhead_percent": round(100 * statistics.median(ratios), 2),
        "overhead_percent_quartiles": [
            round(100 * q, 2) for q in statistics.quantiles(ratios, n=4)[::2]
        ],
        "hook_ms": round(1e3 * hook, 2),
        "hook_percent": round(100 * hook / step, 2),
        "hook_percent_mean": round(100 * statistics.fmean(monitor.hook_seconds) / step, 2),
        "matrices": len(monitor.names),
    }


def main() -> None:
    """Parse the options, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quadruples", type=int, default=8, help="A B B A rounds")
    parser.add_argument("--block_steps", type=int, default=5, help="optimizer steps per block")
    parser.add_argument("--warm_up", type=int, default=30, help="untimed steps at the start")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path, help="file for the JSON record")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options.quadruples, options.block_steps, options.warm_up, options.lr)
    setting = (
        "Llama 29.5 M, AdamW, 4 x 256 tokens, all linear layers, every step:"
        " sigma_max with interval, stable rank, Frobenius norm"
    )
    target = "overhead <= 1.0 %"
    report({"what": setting, "target": target, **vars_of(options), **result}, options.save)


def vars_of(options: argparse.Namespace) -> dict[str, Any]:
    """Options that shaped the measurement."""
    return {k: v for k, v in vars(options).items() if k not in ("save", "threads")}


if __name__ == "__main__":
    main()
