"""What does each part of the embedding model bring? A full model against ones that lack a part.

A small model (`--preset`) trains with `SentenceEmbedding` on the embedded pairs, once per seed with
all parts and once without each part that `without` knows. Evaluated is the semantic head: Recall@10
on held-out pairs at its largest and its smallest dimension, and the Spearman correlation on the
STS-B development set where the environment has SPECTRAL_DATA. Told of each part: the mean
difference to the full model of the same seed, times 100, with its 95 % t interval over seeds.
Beside it stands the difference that the documentation of Spectra-NSA claims, in percent, without a
measure, seeds or data: a number to test, not a fact.

Every finished run is a line of a file in `--work`, and not made again; the last line printed is
one JSON object::

    python scripts/embedding_ablation.py --work runs/embeddings --plot ablation.png \
        --save scripts/results/<date>_embedding_ablation_cpu.json
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from bench_common import quiet_trainer, report
from embedding_common import Runs, data_path, markdown, mean_interval
from matplotlib.figure import Figure
from torch.optim import AdamW

from spectral_lightning.data import PairsDataModule
from spectral_lightning.models.spectra import PRESETS
from spectral_lightning.tasks import SentenceEmbedding

FULL = "none"
PARTS = ("spectral", "anchor", "bridge", "angular", "matryoshka")

CLAIMS = {"spectral": -1.5, "anchor": -0.3, "bridge": -0.2, "matryoshka": -0.5}
"""Differences in percent from the documentation of Spectra-NSA, unverified. Its last one is said of
a switch for the alignment of two heads, which is ``angular`` here; `matryoshka` is its name."""


def pairs_data(seed: int, options: argparse.Namespace) -> PairsDataModule:
    """The embedded pairs, and STS-B if it is there."""
    has_sts = "SPECTRAL_DATA" in os.environ
    return PairsDataModule(
        options.sources,
        max_length=options.max_length,
        batch_size=options.batch_size,
        eval_batch_size=256,
        sts={"stsb-dev": data_path("sts/stsb-en-dev.csv.xz")} if has_sts else None,
        seed=seed,
        cache_dir=str(options.work / "data"),
    )


def train(part: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train without a part, and measure."""
    pl.seed_everything(seed, verbose=False)
    data = pairs_data(seed, options)
    data.prepare_data()
    data.setup("fit")
    task = SentenceEmbedding(
        {"preset": options.preset, "vocab_size": len(data.tokenizer)},
        without=[] if part == FULL else [part],
        optimizer=partial(AdamW, lr=options.rate, weight_decay=0.01),
        chunk_size=options.batch_size,
        eval_heads=["semantic"],
    )
    trainer = quiet_trainer(accelerator="cpu", max_steps=options.steps, gradient_clip_val=1.0)
    trainer.fit(task, datamodule=data)
    return {"parameters": sum(p.numel() for p in task.parameters()), **evaluate(task, data)}


def evaluate(task: SentenceEmbedding, data: PairsDataModule) -> dict[str, float]:
    """Recall@10 on held-out pairs at the ends of the dimensions, and STS-B, times 100."""
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.validate(task, datamodule=data, verbose=False)
    found = trainer.callback_metrics
    dims = task.model.head_dims()["semantic"]
    keys = {f"recall@10 at {dim}": f"pairs/semantic/recall@10_{dim}" for dim in (dims[0], dims[-1])}
    keys["STS-B Spearman"] = f"stsb-dev/semantic/spearman_{dims[0]}"
    return {
        name: round(100 * found[f"valid/{key}"].item(), 3)
        for name, key in keys.items()
        if f"valid/{key}" in found
    }


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means of the full model, and differences of the others to it, seed by seed."""
    measures = [name for name in runs[FULL][0] if name not in ("settings", "parameters")]
    table: dict[str, Any] = {}
    for part, own in runs.items():
        table[part] = {"parameters": own[0]["parameters"]}
        for name in measures:
            of_full = [0.0 if part == FULL else run[name] for run in runs[FULL]]
            values = [run[name] - base for run, base in zip(own, of_full, strict=True)]
            table[part][name] = mean_interval(values)
        if part in CLAIMS:
            table[part]["claimed_unverified_percent"] = CLAIMS[part]
    return table


def as_markdown(table: dict[str, Any]) -> str:
    """The full model's means, then the differences to it, with halves of their intervals."""
    measures = [name for name, value in table[FULL].items() if isinstance(value, dict)]
    rows = []
    for part, one in table.items():
        cells = []
        for name in measures:
            mean, low = one[name]["mean"], one[name]["low"]
            spread = "" if low is None else f" ± {mean - low:.2f}"
            cells.append(f"{mean:.2f}{spread}" if part == FULL else f"{mean:+.2f}{spread}")
        claim = one.get("claimed_unverified_percent")
        rows.append(
            [part, f"{one['parameters']:,}", *cells, "-" if claim is None else f"{claim} %"]
        )
    return markdown(["without", "parameters", *measures, "claimed (unverified)"], rows)


def draw(table: dict[str, Any], path: Path) -> None:
    """Differences to the full model with their intervals, a panel per measure."""
    measures = [name for name, value in table[FULL].items() if isinstance(value, dict)]
    parts = [part for part in table if part != FULL]
    figure = Figure(
        figsize=(3.2 * len(measures) + 1, 0.45 * len(parts) + 1.6), layout="constrained"
    )
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, measures, strict=True):
        found = [table[part][name] for part in parts]
        means = [one["mean"] for one in found]
        halves = [0.0 if one["low"] is None else one["mean"] - one["low"] for one in found]
        panel.errorbar(means, range(len(parts)), xerr=halves, fmt="o", capsize=3)
        panel.axvline(0.0, color="grey", linewidth=0.8)
        panel.set_xlabel(f"difference of {name}")
    panels[0].set_yticks(range(len(parts)), [f"without {part}" for part in parts])
    panels[0].margins(y=0.2)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--without", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny")
    parser.add_argument("--sources", nargs="+", help="files of pairs; by default those embedded")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="file for a figure of the differences")
    parser.add_argument("--save", type=Path)
    return parser.parse_args()


def main() -> None:
    """Make the runs that are missing, then print, draw and save all."""
    options = parse()
    torch.set_num_threads(options.threads)
    kept = Runs(options.work / "embedding_ablation.jsonl")
    names = ("steps", "rate", "preset", "sources", "batch_size", "max_length")
    common: dict[str, Any] = {name: getattr(options, name) for name in names}
    common["sts"] = "SPECTRAL_DATA" in os.environ
    runs: dict[str, list[dict[str, Any]]] = {part: [] for part in (FULL, *options.without)}
    for seed in options.seeds:
        for part, own in runs.items():
            settings = {**common, "without": part, "seed": seed}
            own.append(kept.get(settings, partial(train, part, seed, options)))
    table = summary(runs)
    print(as_markdown(table))
    if options.plot is not None:
        draw(table, options.plot)
    results = {
        "script": "embedding_ablation",
        **common,
        "seeds": options.seeds,
        "table": table,
        "runs": [run for own in runs.values() for run in own],
    }
    report(results, options.save)


if __name__ == "__main__":
    main()
