"""Grokking of modular addition: what orthogonal gradients and collapse-free losses do to it.

Repeats runs of Prieto et al. (2025), "Grokking at the edge of numerical stability", and runs of
our own, all in float32. Prints a line per run and one JSON object, with the curves, at the end::

    python scripts/grokking.py --runs orthogonal_adamw adamw --seeds 42 43 44 --save grokking.json

Runs (the paper's figure in brackets):

- ``orthogonal_adamw``, ``adamw``: 40 % of the pairs, learning rate 0.01, softmax [1, middle].
- ``orthogonal_sgd``: 40 %, learning rate 10, momentum 0.8, StableMax; float64 in the paper [6a].
- ``adamw_70``, ``adamw_70_collapse_free``: 70 %, learning rate 5e-4, softmax, PyTorch's
  cross-entropy and ours [2]; in the paper float32 stops to learn after some 3000 epochs.
- ``transformer_orthogonal``, ``transformer``: one block, 40 %, learning rate 1e-3, all parameters
  projected [6b]; the paper reads 88 % at epoch 400, and nothing learned without the projection.

``zero_loss`` is the share of training pairs whose loss the ordinary formula rounds to 0.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from bench_common import report
from torch import nn
from torch.optim import AdamW
from typing_extensions import override

from spectral_lightning.data import ModularArithmetic
from spectral_lightning.losses import CrossEntropy
from spectral_lightning.models import SymbolMLP, SymbolTransformer
from spectral_lightning.nn.collapse import softmax_collapse
from spectral_lightning.optim import OrthogonalAdamW, OrthogonalSGD
from spectral_lightning.tasks import Classification


class Run(NamedTuple):
    """How one kind of run is trained."""

    train_fraction: float
    optimizer: Callable[..., torch.optim.Optimizer]
    loss: CrossEntropy | None
    max_epochs: int
    model: Callable[[], nn.Module] = SymbolMLP


# AdamW of the paper: `eps` stays below all gradients that there are, so that steps keep their size.
RUNS = {
    "orthogonal_adamw": Run(
        0.4, partial(OrthogonalAdamW, lr=0.01, eps=1e-8, weight_decay=0.0), None, 130
    ),
    "adamw": Run(0.4, partial(AdamW, lr=0.01, eps=1e-25, weight_decay=0.0), None, 130),
    "orthogonal_sgd": Run(
        0.4, partial(OrthogonalSGD, lr=10.0, momentum=0.8), CrossEntropy(transform="stablemax"), 400
    ),
    "adamw_70": Run(
        0.7, partial(AdamW, lr=5e-4, betas=(0.9, 0.99), eps=1e-25, weight_decay=0.0), None, 5000
    ),
    "adamw_70_collapse_free": Run(
        0.7,
        partial(AdamW, lr=5e-4, betas=(0.9, 0.99), eps=1e-25, weight_decay=0.0),
        CrossEntropy(),
        5000,
    ),
    "transformer_orthogonal": Run(
        0.4,
        partial(OrthogonalAdamW, lr=1e-3, eps=1e-8, weight_decay=0.0, everything=True),
        None,
        600,
        SymbolTransformer,
    ),
    "transformer": Run(
        0.4, partial(AdamW, lr=1e-3, eps=1e-8, weight_decay=0.0), None, 600, SymbolTransformer
    ),
}


class Curve(pl.Callback):
    """Note how well the model does, after every validation."""

    def __init__(self, data: ModularArithmetic, file: Path | None) -> None:
        self.data, self.file, self.points = data, file, list[dict[str, float]]()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pairs, answers = self.data.train_pairs.pairs, self.data.train_pairs.answers
        assert not pl_module.training, "dropout would blur what is read"
        with torch.no_grad():
            logits = pl_module(pairs)
        loss = pl_module.loss or CrossEntropy()
        found = softmax_collapse(logits, answers, [torch.float32], loss.transform)
        norms = [weight.detach().norm() for weight in pl_module.parameters()]
        point = {
            "epoch": trainer.current_epoch + 1,
            "train_accuracy": (logits.argmax(1) == answers).float().mean(),
            "valid_accuracy": trainer.callback_metrics["valid/accuracy"],
            "train_loss": loss(logits.double(), answers),
            "zero_loss": found.dtypes["float32"].zero_loss,
            "norm": torch.stack(norms).norm(),
        }
        self.points.append({name: float(f"{float(value):.6g}") for name, value in point.items()})
        if self.file is not None:
            with self.file.open("a") as lines:
                lines.write(json.dumps(self.points[-1]) + "\n")


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once; the curve, and when the network knew the answers."""
    run = RUNS[name]
    data = ModularArithmetic("add", 113, run.train_fraction, seed=seed)
    torch.manual_seed(seed)
    task = Classification(run.model(), run.optimizer, run.loss)
    file = options.follow and options.follow.with_suffix(f".{name}.{seed}.jsonl")
    curve = Curve(data, file)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=options.max_epochs or run.max_epochs,
        check_val_every_n_epoch=options.every,
        callbacks=[curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    begin = time.perf_counter()
    trainer.fit(task, data)
    seconds = (time.perf_counter() - begin) / max(1, trainer.current_epoch)
    known = (p["epoch"] for p in curve.points if p["valid_accuracy"] >= 0.99)
    last = curve.points[-1]
    print(
        f"{name} seed {seed}: valid {last['valid_accuracy']:.3f} after {last['epoch']:.0f} epochs"
    )
    columns = {key: [point[key] for point in curve.points] for key in curve.points[0]}
    return {
        "run": name,
        "seed": seed,
        "first_epoch_at_99_percent": next(known, None),
        "seconds_per_epoch": round(seconds, 4),
        **columns,
    }


def main() -> None:
    """Parse the options, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--every", type=int, default=10, help="epochs between two points")
    parser.add_argument("--max_epochs", type=int, help="in place of those of the runs")
    parser.add_argument("--follow", type=Path, help="files for points as they come, by this name")
    parser.add_argument("--save", type=Path, help="file for the JSON record")
    options = parser.parse_args()
    runs = [train(name, seed, options) for name in options.runs for seed in options.seeds]
    report({"what": "grokking of addition modulo 113", "seed": None, "runs": runs}, options.save)


if __name__ == "__main__":
    main()
