"""Does `EmbeddingHealth` warn before a collapse shows in STS?

Trains the quickstart's model on the embedded pairs; from a step on the loss goes over, within
`--ramp` steps, to one that only pulls pairs together, so that nothing holds texts apart any more
and embeddings collapse. STS-B's development part is evaluated every few steps. Reported are the
first warning, and the step from which the Spearman correlation stays 0.02 below the best one before
(its standard error on 1,500 pairs is about 0.015). The same runs without the change must give no
warning. Prints a line per run and one JSON object at the end::

    SPECTRAL_DATA=... python scripts/embedding_collapse.py --save collapse.json
"""

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from bench_common import report
from torch.optim import AdamW

from spectral_lightning.callbacks import EmbeddingHealth
from spectral_lightning.data import PairsDataModule
from spectral_lightning.losses import SpectraLoss, SpectraTerms
from spectral_lightning.tasks import SentenceEmbedding

EVALUATED_EVERY = 10
FALL = 0.02
MODEL = {"preset": "tiny", "vocab_size": 4096, "norm": "post"}


class PullTogether:
    """A loss that turns into one that pulls pairs together in every head, and holds none apart."""

    def __init__(self, loss: SpectraLoss, begin: int, ramp: int) -> None:
        self.loss, self.begin, self.ramp = loss, begin, ramp

    def __call__(self, anchor: Any, positive: Any, *rest: Any, step: int, **more: Any) -> Any:
        """Return the mixture of both at a step."""
        share = min(1.0, (step - self.begin) / self.ramp) if self.ramp else 1.0
        own = self.loss(anchor, positive, *rest, step=step, **more)
        heads = [name for name in anchor if name not in ("spectral", "anomaly_score")]
        cosines = [(anchor[name] * positive[name]).sum(-1).mean() for name in heads]
        pull = -torch.stack(cosines).mean()
        return SpectraTerms((1 - share) * own.total + share * pull, own.terms)


class Provocation(pl.Callback):
    """Change the loss at a step, and note warnings and STS."""

    def __init__(self, step: int | None, ramp: int) -> None:
        self.step, self.ramp, self.sts = step, ramp, dict[int, float]()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Change the loss."""
        if trainer.global_step == self.step:
            pl_module.loss = PullTogether(pl_module.loss, self.step, self.ramp)

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
        chunk_size=32,
    )  # fmt: skip
    noted = Provocation(step, options.ramp)
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
        "ramp": options.ramp,
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
    parser.add_argument("--provoke", type=int, default=250, help="step at which the loss changes")
    parser.add_argument("--ramp", type=int, default=200, help="steps in which it changes")
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
