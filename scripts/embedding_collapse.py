"""Does `EmbeddingHealth` warn before a collapse shows in STS?

Trains the quickstart's model on the embedded pairs. From a step on the pairs are wrong: each
anchor gets the positive of its neighbour in the batch, as from a data set whose columns have
slipped. The best that the loss then allows is to make all texts alike. The development part of
STS-B is evaluated every few steps. Reported are the first warning, and the step from which the
Spearman correlation stays 0.02 below the best one before (its standard error on 1,500 pairs is
about 0.015). The same runs without the change must give no warning. Prints a line per run and one
JSON object at the end::

    SPECTRAL_DATA=... python scripts/embedding_collapse.py --save collapse.json
"""

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from bench_common import report
from torch.optim import AdamW

from spectral_lightning.callbacks import EmbeddingHealth
from spectral_lightning.data import PairsDataModule
from spectral_lightning.tasks import SentenceEmbedding

EVALUATED_EVERY = 10
FALL = 0.02
MODEL = {"preset": "tiny", "vocab_size": 4096, "norm": "post"}


class Provocation(pl.Callback):
    """Spoil the pairs from a step on, and note STS."""

    def __init__(self, step: int | None) -> None:
        self.step, self.sts = step, dict[int, float]()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, _: int) -> None:
        """Let the positives slip by a row."""
        if self.step is not None and trainer.global_step >= self.step:
            for name in ("input_ids", "attention_mask", "text_ids"):
                batch[name][:, 1] = batch[name][:, 1].roll(1, 0)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the correlation."""
        self.sts[trainer.global_step] = float(trainer.callback_metrics["valid/sts"])


def train(seed: int, rate: float, step: int | None, options: argparse.Namespace) -> dict[str, Any]:
    """Train once; when it was warned of, and when it showed."""
    pl.seed_everything(seed, verbose=False)
    sts = Path(os.environ["SPECTRAL_DATA"]) / "sts" / "stsb-en-dev.csv.xz"
    data = PairsDataModule(
        vocab_size=4096, max_length=64, batch_size=64, seed=seed, valid_fraction=0.0,
        max_train_pairs=options.pairs, eval_batch_size=256, sts={"stsb-dev": str(sts)},
    )  # fmt: skip
    task = SentenceEmbedding(
        dict(MODEL), optimizer=lambda groups: AdamW(groups, lr=rate), eval_heads=["semantic"],
    )  # fmt: skip
    noted = Provocation(step)
    health = EmbeddingHealth(every_n_steps=options.health_every)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=options.steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            val_check_interval=EVALUATED_EVERY,
            check_val_every_n_epoch=None,
            callbacks=[health, noted],
        )
        trainer.fit(task, datamodule=data)
    texts = [str(one.message) for one in caught]
    found = [text for text in texts if "mbedding" in text and "step" in text]
    shown = None
    if step is not None:
        shown = falls_at(noted.sts, step)
    result = {
        "seed": seed,
        "learning_rate": rate,
        "provoked_at": step,
        "warnings": found,
        "sts_falls_at": shown,
        "sts": noted.sts,
    }
    print({name: result[name] for name in result if name != "sts"}, flush=True)
    return result


def falls_at(sts: dict[int, float], begin: int) -> int | None:
    """Step after `begin` from which the correlation stays clearly below the best one before."""
    fallen = None
    for at, value in sts.items():
        best = max(earlier for step, earlier in sts.items() if step <= at)
        is_low = at > begin and value < best - FALL
        fallen = (fallen or at) if is_low else None
    return fallen


def main() -> None:
    """Parse the options, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--provoke", type=int, default=250, help="step from which pairs are wrong")
    parser.add_argument("--health_every", type=int, default=10, help="steps between two readings")
    parser.add_argument("--pairs", type=int, help="training pairs; all of them if not given")
    parser.add_argument("--save", type=Path, help="file for the JSON record")
    options = parser.parse_args()
    runs = [
        train(seed, rate, step, options)
        for seed in options.seeds
        for rate in options.rates
        for step in (options.provoke, None)
    ]
    report({"what": "warning before a provoked collapse", "runs": runs}, options.save)


if __name__ == "__main__":
    main()
