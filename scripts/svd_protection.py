"""How far what was protected has moved after 300 steps, for each protection and two optimizers.

A small byte-level GPT learns CPython's documentation for 20 steps; then all its hidden layers are
protected at once, and train on for 300 steps. Reported, over all layers: the largest and the median
relative change of the block ``U_k^T W V_k`` of the principal directions of the switch, with ``k`` a
quarter of all; and the final training loss. Prints a table and one JSON object as its last line::

    python scripts/svd_protection.py --save scripts/results/<date>_svd_protection_cpu.json
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
from spectral_lightning.optim import MuonAdamW, parameter_groups

FIRST, STEPS, BATCH = 20, 300, 16
PROTECTIONS = (
    *("none", "legacy", "factored", "gradients"),
    *("two_sided", "left", "right", "block"),
)


class OptimizedTask(Task):
    """Next byte with AdamW or Muon, both with weight decay, at a constant rate."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(SmallGPT(), lr=1e-3, weight_decay=0.1)
        self.optimizer = optimizer

    @override
    def configure_optimizers(self) -> Any:
        """Build the optimizer of the run."""
        if self.optimizer == "muon":
            return MuonAdamW(parameter_groups(self.model), weight_decay=0.1)
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


class Watched(SVDModeSwitch):
    """Keep the blocks at the switch, to compare them with those at the end."""

    blocks: dict[str, tuple[Tensor, Tensor, Tensor]]

    @override
    def on_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_weights(trainer, pl_module)
        if trainer.global_step == FIRST + 1:
            self.blocks = {}
            for name in self.names:
                weight = self.spectra.targets[name].matrix()
                k = min(weight.shape) // 4
                left, _, right = self.spectra.vectors.all(name)
                bases = (left[:, :k], right[:, :k])
                if name in self.parts:
                    bases = self.parts[name].left, self.parts[name].right
                self.blocks[name] = (*bases, bases[0].mT @ weight @ bases[1])

    def changes(self) -> dict[str, float]:
        """Relative change of each layer's block until now."""
        found = {}
        for name, (left, right, block) in self.blocks.items():
            now = left.mT @ self.spectra.targets[name].matrix() @ right
            found[name] = ((now - block).norm() / block.norm()).item()
        return found


def run(optimizer: str, protection: str, batches: list[Tensor]) -> dict[str, Any]:
    """Train with one protection."""
    torch.manual_seed(SEED)
    task = OptimizedTask(optimizer)
    schedule = {} if protection == "none" else {FIRST: "lowrank"}
    switch = Watched(
        "model.blocks.*",
        FIRST,
        ScheduledPolicy(schedule=schedule, principal=0.25),
        "block" if protection == "none" else protection,  # type: ignore[arg-type]
        refresh=False,
    )
    trainer = quiet_trainer(
        max_steps=FIRST + 1 + STEPS, callbacks=[switch], accelerator="cpu", gradient_clip_val=1.0
    )
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(task, loader)
    changes = switch.changes().values()
    with torch.no_grad():
        loss = statistics.fmean(task.loss(batch).item() for batch in batches[-8:])
    return {
        "optimizer": optimizer,
        "protection": protection,
        "layers": len(changes),
        "largest_change": float(f"{max(changes):.3g}"),
        "median_change": float(f"{statistics.median(changes):.3g}"),
        "final_loss": round(loss, 4),
    }


def main() -> None:
    """Run all, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--protections", nargs="*", choices=PROTECTIONS, default=PROTECTIONS)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    batches = windows(read_text(None)[0], FIRST + 1 + STEPS, SEED, BATCH)
    runs = []
    for optimizer in ("adamw", "muon"):
        for protection in options.protections:
            runs.append(run(optimizer, protection, batches))
            print(runs[-1], flush=True)
    report({"script": "svd_protection", "steps": STEPS, "runs": runs}, options.save)


if __name__ == "__main__":
    main()
