"""Cost of orthogonal gradients: step time with and without them, interleaved in one run.

One Trainer trains the 30 M Llama, once with `OrthogonalGradient` and AdamW, once with
`OrthogonalAdamW`. Blocks of steps run in the order A B B A (A without, B with projection); the
overhead is the median over such quadruples of B / A - 1. The time spent in the projection itself
is reported too, as a share of the step and of AdamW's own part of it: the former is what a user
pays, but carries the noise of the whole step, the latter does not. ``memory_floor_ms`` is what
reading weights and gradients once, and once more with writing the gradients, takes by itself: no
projection that is a pass of its own is faster. The last line printed is one JSON object::

    python scripts/bench_orthogonal.py --save scripts/results/orthogonal.json
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from bench_common import SEED, SEQUENCE_LEN, LlamaTask, llama_30m, quiet_trainer, report, text_data

from spectral_lightning.actuators import project_
from spectral_lightning.callbacks import OrthogonalGradient
from spectral_lightning.optim import OrthogonalAdamW

ADAM: Any = sys.modules["torch.optim.adam"]  # whose name in `torch.optim` is another thing
ORDER = "ABBA"
BATCH_SIZE = 4
MODULES = {
    "callback": "spectral_lightning.callbacks.orthogonal_gradient",
    "wrapper": "spectral_lightning.optim.orthogonal_optimizer",
}


class Task(LlamaTask):
    """The Llama, with the optimizer of one form, whose own steps are timed."""

    def __init__(self, form: str) -> None:
        super().__init__(llama_30m(), 1e-3)
        self.form = form

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build AdamW, or its orthogonal form."""
        make: Any = torch.optim.AdamW if self.form == "callback" else OrthogonalAdamW
        return make(self.parameters(), lr=self.lr)


class Switched(pl.Callback):
    """Blocks without and with the projection, and how long each of them takes."""

    def __init__(self, form: str, block_steps: int, warm_up: int) -> None:
        self.form, self.block_steps, self.warm_up = form, block_steps, warm_up
        self.callback = OrthogonalGradient()
        self.block_seconds: list[float] = []
        self._started = 0.0

    def on_fit_start(self, *args: Any) -> None:
        """Forward the hook."""
        self.callback.on_fit_start(*args)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Make the wrapper a plain AdamW in the A blocks, and what it is in the others."""
        if self.form == "wrapper":
            cls = OrthogonalAdamW if self._is_on(trainer) else torch.optim.AdamW
            trainer.optimizers[0].__class__ = cls

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        """Project in the B blocks."""
        if self.form == "callback" and self._is_on(trainer):
            self.callback.on_before_optimizer_step(trainer, *args)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Close a block at its last step."""
        done = trainer.global_step - self.warm_up
        if done >= 0 and done % self.block_steps == 0:
            now = time.perf_counter()
            if done > 0:
                self.block_seconds.append(now - self._started)
            self._started = now

    def _is_on(self, trainer: pl.Trainer) -> bool:
        done = trainer.global_step - self.warm_up
        return done < 0 or ORDER[done // self.block_steps % 4] == "B"


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, which notes how long each call takes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return call


def measure(form: str, quadruples: int, block_steps: int, warm_up: int) -> dict[str, Any]:
    """Run the training in one form and evaluate the blocks."""
    pl.seed_everything(SEED, verbose=False)
    switched = Switched(form, block_steps, warm_up)
    num_steps = warm_up + 4 * quadruples * block_steps
    trainer = quiet_trainer(max_steps=num_steps, callbacks=[switched], accelerator="cpu")
    projections: list[float] = []
    updates: list[float] = []
    with (
        patch(f"{MODULES[form]}.project_", timed(project_, projections)),
        patch.object(ADAM, "adam", timed(ADAM.adam, updates)),
    ):
        trainer.fit(Task(form), text_data(BATCH_SIZE).train_dataloader())
    blocks = switched.block_seconds
    starts = range(0, len(blocks), 4)
    ratios = [(blocks[i + 1] + blocks[i + 2]) / (blocks[i] + blocks[i + 3]) - 1 for i in starts]
    step = statistics.median(blocks[i + j] / block_steps for i in starts for j in (0, 3))
    own, adamw = statistics.median(projections[warm_up:]), statistics.median(updates[warm_up:])
    return {
        "step_ms": round(1e3 * step, 1),
        "overhead_percent": round(100 * statistics.median(ratios), 2),
        "overhead_percent_quartiles": [
            round(100 * q, 2) for q in statistics.quantiles(ratios, n=4)[::2]
        ],
        "projection_ms": round(1e3 * own, 2),
        "projection_ms_quartiles": [
            round(1e3 * q, 2) for q in statistics.quantiles(projections[warm_up:], n=4)[::2]
        ],
        "projection_percent": round(100 * own / step, 2),
        "adamw_ms": round(1e3 * adamw, 2),
        "projection_percent_of_adamw": round(100 * own / adamw, 1),
    }


def memory_floor() -> float:
    """Milliseconds of the passes over memory that the projection can not do without."""
    weights = [weight.detach() for weight in llama_30m().parameters() if weight.ndim > 1]
    gradients = [torch.randn_like(weight) for weight in weights]
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        for weight, gradient in zip(weights, gradients, strict=True):
            torch.linalg.vector_norm(weight), torch.linalg.vector_norm(gradient)
        for weight, gradient in zip(weights, gradients, strict=True):
            gradient.add_(weight, alpha=1e-9)
        seconds.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(seconds), 2)


def main() -> None:
    """Parse the options, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quadruples", type=int, default=6, help="A B B A rounds")
    parser.add_argument("--block_steps", type=int, default=3, help="optimizer steps per block")
    parser.add_argument("--warm_up", type=int, default=5, help="untimed steps at the start")
    parser.add_argument("--save", type=Path, help="file for the JSON record")
    arguments = vars(parser.parse_args())
    save = arguments.pop("save")
    settings = {**arguments, "tokens_per_step": BATCH_SIZE * SEQUENCE_LEN}
    results = {form: measure(form, **arguments) for form in MODULES}
    floor = {"memory_floor_ms": memory_floor()}
    report({"benchmark": "orthogonal", **settings, **floor, **results}, save)


if __name__ == "__main__":
    main()
