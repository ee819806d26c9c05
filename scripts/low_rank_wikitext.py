"""Do ranks that adapt cost loss? Low-rank transformers against dense ones, on WikiText-2 words.

A causal `LowRankTransformer` (depth 4, 192 wide, 64 words of context) trains on the same batches as
a dense one: with a fixed rank, with ranks by energy, with ranks that share a budget, and as version
10 of adaptive-low-rank-training did it (causal here, its 30 updates of ranks spread over the run).
Told of each variant: validation loss in nats per word, parameters of the blocks and of the model,
multiply-accumulates per token, and training tokens per second of the model as it was at the end,
optimizer step included, all variants in turn and back in turn. Words beyond the `--words` most
frequent are ``<unk>``, which makes the loss lower than on all 33,277.

Hidden matrices and factors have one rate, all else another (`RoleAdamW`), both chosen by short runs
with other options.

Every finished run is kept in `--work`, and not made again; the last line is one JSON object::

    SPECTRAL_DATA=... python scripts/low_rank_wikitext.py --work runs/wikitext \
        --save scripts/results/<date>_low_rank_wikitext_cpu.json
"""

import argparse
import collections
import json
import lzma
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from bench_common import quiet_trainer, report
from torch.nn.functional import cross_entropy

from spectral_lightning.callbacks import RankAdaptation
from spectral_lightning.control import (
    BudgetAllocator,
    EnergyController,
    RankClock,
    StableRankController,
)
from spectral_lightning.data import TokenFileDataModule
from spectral_lightning.models import LowRankTransformer, macs_per_token, parameter_counts
from spectral_lightning.nn.low_rank import INITS
from spectral_lightning.optim import RoleAdamW, parameter_groups
from spectral_lightning.tasks import LanguageModeling

SEQUENCE_LEN, BATCH_SIZE = 64, 16
RANK, CAPACITY = 64, 96
"""A rank of a third of the width makes half of the parameters of full matrices."""

LR, MATRIX_LR = 1.2e-2, 2e-4
"""Rates of AdamW: the best that were tried, for full matrices and for factors alike
(scripts/results/2026-11-22_low_rank_wikitext_rates_cpu.json)."""

CLOCK = RankClock(warmup_steps=200, cooldown_steps=100, interval=50, interval_max=200)
Callback = Callable[[int], RankAdaptation | None]


def adapt(controller: Any) -> Callback:
    """Rank adaptation as users get it, with a clock for a short run."""
    return lambda steps: RankAdaptation("model.blocks.*", controller, every_n_steps=50)


def as_v10(steps: int) -> RankAdaptation:
    """Ranks by stable rank, cut at once and by weight alone, 30 times in a run."""
    return RankAdaptation(
        "model.blocks.*",
        StableRankController(),
        every_n_steps=max(1, steps // 30),
        shrink="cut",
        moments="reset",
        weigh_outputs=False,
        probes=0,
    )


VARIANTS: dict[str, tuple[dict[str, Any], Callback]] = {
    "dense": ({"rank": None}, lambda steps: None),
    "fixed": ({}, lambda steps: None),
    "energy": ({"rank": 128}, adapt(EnergyController(clock=CLOCK))),
    "budget": ({}, adapt(BudgetAllocator(budget=0.49, clock=CLOCK))),
    "v10": ({"init": "v10", "head": "biased"}, as_v10),
}
"""Arguments of the model, and the callback that changes its ranks."""


def words(folder: Path, number: int) -> TokenFileDataModule:
    """Windows of words of WikiText-2, of which the most frequent have an id."""
    folder.mkdir(parents=True, exist_ok=True)
    sources, kept = {}, set[str]()
    for part in ("train", "valid"):
        packed = Path(os.environ["SPECTRAL_DATA"]) / "lm" / f"wikitext-2.{part}.txt.xz"
        with lzma.open(packed, "rt", encoding="utf-8") as file:
            text = file.read().split()
        if part == "train":
            kept = {word for word, _ in collections.Counter(text).most_common(number)}
        sources[part] = folder / f"{part}-{number}.txt"
        if not sources[part].exists():
            cut = " ".join(word if word in kept else "<unk>" for word in text)
            sources[part].write_text(cut, encoding="utf-8")
    return TokenFileDataModule(
        str(sources["train"]),
        "word",
        valid_source=str(sources["valid"]),
        sequence_len=SEQUENCE_LEN,
        batch_size=BATCH_SIZE,
        cache_dir=str(folder),
    )


def model_of(variant: str, vocab_size: int, options: argparse.Namespace) -> LowRankTransformer:
    """A model at its start."""
    sizes = {"depth": 4, "model_dim": 192, "num_heads": 6, "head": "unbiased", "rank": RANK}
    settings = {**sizes, "init": options.init, **VARIANTS[variant][0]}
    if settings["rank"] is None:
        settings["init"] = "balanced"  # of full matrices: normal, of the same size
    else:
        settings["rank"] = options.rank or settings["rank"]
        settings["capacity"] = max(settings["rank"], CAPACITY)
    return LowRankTransformer(vocab_size, SEQUENCE_LEN, **settings)


def rates_of(variant: str, options: argparse.Namespace) -> dict[str, float]:
    """Rates of AdamW; version 10 has one of its own, which is constant."""
    if variant == "v10":
        return {"lr": 3e-4}
    return {"lr": options.lr, "matrix_lr": options.matrix_lr}


def optimizer_of(variant: str, options: argparse.Namespace) -> Callable[..., Any]:
    """What makes the optimizer of the model's groups."""
    return partial(RoleAdamW, weight_decay=0.01, **rates_of(variant, options))


def train(variant: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once and measure; leaves the model beside the numbers."""
    pl.seed_everything(seed, verbose=False)
    data = words(options.work / "data", options.words)
    model = model_of(variant, data.vocab_size, options)
    data.seed = seed
    is_v10 = variant == "v10"
    task = LanguageModeling(
        model,
        optimizer_of(variant, options),
        warmup_steps=0 if is_v10 else 50,
        warmdown_fraction=0.0 if is_v10 else 0.2,
    )
    callback = VARIANTS[variant][1](options.steps)
    trainer = quiet_trainer(
        max_steps=options.steps,
        callbacks=[callback] if callback else [],
        gradient_clip_val=None if is_v10 else 1.0,
        num_sanity_val_steps=0,
    )
    start = time.perf_counter()
    trainer.fit(task, datamodule=data)
    seconds = time.perf_counter() - start
    (found,) = quiet_validation(task, data)
    counts = parameter_counts(model.blocks)
    torch.save(model.state_dict(), options.work / f"{name_of(variant, seed, options)}.pt")
    return {
        "variant": variant,
        "seed": seed,
        "first_rank": model.config["rank"],
        "init": model.config["init"],
        **rates_of(variant, options),
        "nats_per_word": round(found["valid/loss"], 4),
        "block_parameters": counts.active,
        "parameters": parameter_counts(model).active,
        "macs_per_token": macs_per_token(model, SEQUENCE_LEN).active,
        "ranks": list(callback.ranks.values()) if callback else [],
        "seconds": round(seconds),
    }


def quiet_validation(task: LanguageModeling, data: TokenFileDataModule) -> list[Any]:
    """Loss over the whole validation text."""
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
    return trainer.validate(task, datamodule=data, verbose=False)


def name_of(variant: str, seed: int, options: argparse.Namespace) -> str:
    """Name of the files of a run."""
    words = "".join(c if c.isalnum() else "-" for c in variant)
    settings = (options.words, options.steps, options.init, options.rank)
    rates = rates_of(variant, options).values()
    return "_".join(map(str, (words, *settings, *rates, seed)))


def speeds(variants: list[str], options: argparse.Namespace) -> dict[str, int]:
    """Training tokens per second of the models of the first seed as they ended."""
    vocab_size = words(options.work / "data", options.words).vocab_size
    batch = torch.randint(vocab_size, (BATCH_SIZE, SEQUENCE_LEN + 1))
    runs: dict[str, Callable[[], None]] = {}
    for variant in variants:
        model = model_of(variant, vocab_size, options)
        path = options.work / f"{name_of(variant, options.seeds[0], options)}.pt"
        model.load_state_dict(torch.load(path))
        optimizer = optimizer_of(variant, options)(parameter_groups(model))
        runs[variant] = partial(step, model, optimizer, batch)
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for turn in range(2 * options.blocks + 1):
        for variant in variants if turn % 2 else variants[::-1]:
            start = time.perf_counter()
            for _ in range(3):
                runs[variant]()
            if turn:  # the first warms up
                times[variant].append((time.perf_counter() - start) / 3)
    tokens = BATCH_SIZE * SEQUENCE_LEN
    return {v: round(tokens / statistics.median(found)) for v, found in times.items()}


def step(model: LowRankTransformer, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    """One optimizer step."""
    optimizer.zero_grad()
    logits = model(batch[:, :-1])
    cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
    optimizer.step()


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and losses relative to the dense run of the same seed."""
    dense = {run["seed"]: run for run in runs if run["variant"] == "dense"}
    table: dict[str, Any] = {}
    for variant in dict.fromkeys(run["variant"] for run in runs):
        own = [run for run in runs if run["variant"] == variant]
        table[variant] = {
            key: round(statistics.mean(run[key] for run in own), 4)
            for key in ("nats_per_word", "block_parameters", "parameters", "macs_per_token")
        }
        if all(run["seed"] in dense for run in own):
            pairs = [(run, dense[run["seed"]]) for run in own]
            excess = [100 * (a["nats_per_word"] / b["nats_per_word"] - 1) for a, b in pairs]
            share = [100 * a["block_parameters"] / b["block_parameters"] for a, b in pairs]
            table[variant] |= {
                "loss_over_dense_percent": [round(value, 2) for value in excess],
                "block_parameters_of_dense_percent": [round(value, 1) for value in share],
            }
    return table


def main() -> None:
    """Make the runs that are missing, then print and save all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--words", type=int, default=8191)
    parser.add_argument("--rank", type=int, help="of all low-rank variants at the start")
    parser.add_argument("--init", choices=INITS, default="spectral")
    parser.add_argument("--lr", type=float, default=LR, help="of all but the matrices")
    parser.add_argument("--matrix-lr", type=float, default=MATRIX_LR)
    parser.add_argument("--blocks", type=int, default=5, help="pairs of blocks of timing")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--save", type=Path, help="without it, runs are only made")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    runs = []
    for seed in options.seeds:
        for variant in options.variants:
            path = options.work / f"{name_of(variant, seed, options)}.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(train(variant, seed, options)))
            runs.append(json.loads(path.read_text()))
            print(runs[-1], flush=True)
    if options.save is None:
        return
    table = summary(runs)
    for variant, speed in speeds(options.variants, options).items():
        table[variant]["tokens_per_second"] = speed
    settings = {name: getattr(options, name) for name in ("steps", "words")}
    results = {
        "script": "low_rank_wikitext",
        "model": "depth 4, 192 wide, 16 x 64 words per step",
        **settings,
        "table": table,
        "runs": runs,
    }
    report(results, options.save)


if __name__ == "__main__":
    main()
