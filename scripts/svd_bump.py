"""Whether a switch leaves a scar in the loss: validation right before, right after, and later.

A small byte-level GPT trains with AdamW on CPython's documentation; all its hidden layers switch to
low-rank mode at step 40 and back at step 80. Reported for each protection: how far the validation
loss moves at the two switches themselves, in the same weights (nats per byte), and how far it is
from that of the run that never switches 50 steps after the return, beside what it was before the
return. Prints a table and one JSON object as its last line::

    python scripts/svd_bump.py --save scripts/results/<date>_svd_bump_cpu.json
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from assr_stress import SmallGPT, Task, read_text, windows
from bench_common import SEED, quiet_trainer, report
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from spectral_lightning.callbacks import SVDModeSwitch
from spectral_lightning.control import ScheduledPolicy

ENTER, LEAVE, LATER, BATCH = 40, 80, 50, 16
PROTECTIONS = ("gradients", "two_sided", "block", "factored", "legacy")


class Watched(SVDModeSwitch):
    """Validation loss around each switch, and after chosen steps."""

    losses: dict[str, float]
    held_out: list[Tensor]

    def validated(self, pl_module: pl.LightningModule) -> float:
        """Loss on held-out text, in nats per byte."""
        with torch.no_grad():
            return statistics.fmean(pl_module.loss(b).item() for b in self.held_out)  # type: ignore[operator]

    @override
    def _finish(self, trainer: pl.Trainer, pending: Any) -> None:
        before = self.validated(trainer.lightning_module)
        super()._finish(trainer, pending)
        after = self.validated(trainer.lightning_module)
        self.losses[f"jump at {trainer.global_step - 1}"] = abs(after - before)

    @override
    def on_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_weights(trainer, pl_module)
        if trainer.global_step in (LEAVE, LEAVE + LATER + 1):
            self.losses[f"loss at {trainer.global_step}"] = self.validated(pl_module)


def run(protection: str, schedule: dict[int, str], batches: list[Tensor], text: Tensor) -> Watched:
    """Train with one schedule."""
    torch.manual_seed(SEED)
    switch = Watched(
        "model.blocks.*",
        ENTER,
        ScheduledPolicy(schedule=schedule, principal=0.25),
        protection,  # type: ignore[arg-type]
    )
    switch.losses, switch.held_out = {}, windows(text, 8, SEED + 1, BATCH)
    steps = LEAVE + LATER + 1
    trainer = quiet_trainer(max_steps=steps, callbacks=[switch], accelerator="cpu")
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(Task(SmallGPT(), lr=1e-3, weight_decay=0.1), loader)
    return switch


def main() -> None:
    """Run all, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    train, valid = read_text(None)
    batches = windows(train, LEAVE + LATER + 1, SEED, BATCH)
    never = run("two_sided", {}, batches, valid).losses
    rows = []
    for protection in PROTECTIONS:
        found = run(protection, {ENTER: "lowrank", LEAVE: "full"}, batches, valid).losses
        last = f"loss at {LEAVE + LATER + 1}"
        rows.append(
            {
                "protection": protection,
                "jump_entering": found[f"jump at {ENTER}"],
                "jump_leaving": found[f"jump at {LEAVE}"],
                "behind_when_leaving": round(
                    found[f"loss at {LEAVE}"] - never[f"loss at {LEAVE}"], 4
                ),
                "behind_50_steps_later": round(found[last] - never[last], 4),
                "never_switched": round(never[last], 4),
            }
        )
        print(rows[-1], flush=True)
    report({"script": "svd_bump", "rows": rows}, options.save)


if __name__ == "__main__":
    main()
