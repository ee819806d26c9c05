"""Cost of `SpectralMonitor` and `ASSR`: step time with and without them, interleaved in one run.

One Trainer trains the 30 M Llama. Blocks of steps run in the order A B B A (A without, B with the
monitor); the overhead is the median over such quadruples of B / A - 1, of which the time
spent inside the monitor's own hook is reported too: the former is what a user pays, but carries
the noise of the whole step, the latter does not. With ``--spectrum_every_n_steps`` a last block
follows that takes the exact spectra at each of its steps; what its hook takes longer is the cost
of one set of spectra, reported as it is and spread over that many steps. The last line printed is
one JSON object::

    python scripts/bench_overhead.py --save scripts/results/overhead.json
    python scripts/bench_overhead.py --spectrum_every_n_steps 100
    python scripts/bench_overhead.py --assr watching
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from bench_common import SEED, LlamaTask, llama_30m, quiet_trainer, report, text_data

from spectral_lightning.callbacks import ASSR, SpectralCallback, SpectralMonitor
from spectral_lightning.control import Regulator

ORDER = "ABBA"
NUM_SPECTRA = 12  # steps of the last block


class Switched(pl.Callback):
    """Callbacks that are asleep in the A blocks, and whose hook is timed in the B blocks.

    Behind the last block the exact spectra are taken at every step, and that is timed too.
    """

    def __init__(
        self, callbacks: list[SpectralCallback], block_steps: int, warm_up: int, num_blocks: int
    ) -> None:
        self.callbacks = callbacks
        self.block_steps, self.warm_up, self.num_blocks = block_steps, warm_up, num_blocks
        self.hook_seconds: list[float] = []
        self.spectra_hook_seconds: list[float] = []
        self.block_seconds: list[float] = []
        self._started = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forward the hook."""
        self._forward("setup", trainer, pl_module, stage)

    def on_fit_start(self, *args: Any) -> None:
        """Forward the hook."""
        self._forward("on_fit_start", *args)

    def on_train_start(self, *args: Any) -> None:
        """Forward the hook."""
        self._forward("on_train_start", *args)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Measure in the B blocks only, and close a block at its last step."""
        done = trainer.global_step - self.warm_up
        block = max(0, done - 1) // self.block_steps
        if block >= self.num_blocks:
            start = time.perf_counter()
            self.callbacks[0].spectra.measure(trainer.global_step, all_spectra=True)
            self._forward("on_train_batch_end", trainer, *args)
            self.spectra_hook_seconds.append(time.perf_counter() - start)
            return
        if done <= 0 or ORDER[block % 4] == "B":
            start = time.perf_counter()
            self._forward("on_train_batch_end", trainer, *args)
            if done > 0:
                self.hook_seconds.append(time.perf_counter() - start)
        if done >= 0 and done % self.block_steps == 0:
            now = time.perf_counter()
            if done > 0:
                self.block_seconds.append(now - self._started)
            self._started = now

    def _forward(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(*args)


def callbacks_of(assr: str, *, spectra: bool) -> list[SpectralCallback]:
    """The monitor, and ASSR with every layer inside its band, or with every layer outside."""
    # By itself the monitor takes spectra at step 0 only.
    monitor = SpectralMonitor(table_rows=0, spectrum_every_n_steps=sys.maxsize if spectra else None)
    if assr == "none":
        return [monitor]
    # A Gaussian matrix has a relative stable rank of 1.
    regulator = Regulator(calibration="static", floor=1e-3 if assr == "watching" else 2.0)
    return [monitor, ASSR(regulator=regulator, spectrum_every_n_steps=None, table_rows=0)]


def measure(
    quadruples: int,
    block_steps: int,
    warm_up: int,
    lr: float,
    spectrum_every_n_steps: int | None,
    assr: str,
) -> dict[str, Any]:
    """Run the training and evaluate the blocks."""
    pl.seed_everything(SEED, verbose=False)
    spectra = spectrum_every_n_steps is not None
    callbacks = callbacks_of(assr, spectra=spectra)
    monitor = Switched(callbacks, block_steps, warm_up, 4 * quadruples)
    num_steps = warm_up + 4 * quadruples * block_steps + (NUM_SPECTRA if spectra else 0)
    trainer = quiet_trainer(max_steps=num_steps, callbacks=[monitor], accelerator="cpu")
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
        "matrices": len(callbacks[0].names),
        "assr_steps": sum(c.assr_stats["total_int"] for c in callbacks if isinstance(c, ASSR)),
        **spectra_cost(monitor, step, spectrum_every_n_steps),
    }


def spectra_cost(monitor: Switched, step: float, interval: int | None) -> dict[str, Any]:
    """Cost of one set of exact spectra, and its share of `interval` steps of `step` seconds."""
    if interval is None:
        return {}
    norms = statistics.median(monitor.hook_seconds)
    costs = [seconds - norms for seconds in monitor.spectra_hook_seconds]
    cost = statistics.median(costs)
    return {
        "spectra_taken": len(costs),
        "spectra_ms": round(1e3 * cost, 1),
        "spectra_ms_quartiles": [round(1e3 * q, 1) for q in statistics.quantiles(costs, n=4)[::2]],
        "spectra_percent_of_one_step": round(100 * cost / step, 1),
        "spectra_percent_amortised": round(100 * cost / (interval * step), 2),
    }


def main() -> None:
    """Parse the options, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quadruples", type=int, default=8, help="A B B A rounds")
    parser.add_argument("--block_steps", type=int, default=5, help="optimizer steps per block")
    parser.add_argument("--warm_up", type=int, default=30, help="untimed steps at the start")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW learning rate")
    parser.add_argument(
        "--spectrum_every_n_steps",
        type=int,
        help="also time the exact spectra, and spread their cost over this many steps",
    )
    parser.add_argument(
        "--assr",
        choices=("none", "watching", "acting"),
        default="none",
        help="also run ASSR, with all layers inside their bands or all outside",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path, help="file for the JSON record")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = vars_of(options)
    result = measure(**settings)
    setting = (
        "Llama 29.5 M, AdamW, 4 x 256 tokens, all linear layers, every step:"
        " sigma_max with interval, stable rank, Frobenius norm"
    )
    if options.assr != "none":
        setting += f"; and ASSR, {options.assr}"
    target = "overhead <= 1.0 %" if options.assr == "none" else "overhead <= 1.5 %"
    report({"what": setting, "target": target, **settings, **result}, options.save)


def vars_of(options: argparse.Namespace) -> dict[str, Any]:
    """Options that shaped the measurement."""
    return {k: v for k, v in vars(options).items() if k not in ("save", "threads")}


if __name__ == "__main__":
    main()
