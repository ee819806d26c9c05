"""Choose the tolerances, probe and block size of `Tracker` on a run whose weights really move.

Trains a Llama of 2.5 M parameters (22 linear layers) with AdamW at a hot learning rate; all
settings watch the same weights at every step and are judged by the float64 spectrum. Also counts
how often a cold start takes the second singular value for the first. The last line printed is
one JSON object::

    python scripts/choose_tracking.py --save scripts/results/tracking.json
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from bench_common import SEED, VOCAB_SIZE, report, text_data
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_lightning.linalg import leading_triplets
from spectral_lightning.spectra import Target, find_targets, tracker

SETTINGS: list[dict[str, float]] = [
    {},
    {"RTOL": 1e-4},
    {"RTOL": 2e-4},
    {"RTOL": 1e-3},
    {"PROBE": 0.0},
    {"PROBE": 0.03},
    {"PROBE": 0.3},
    {"num_vectors": 1},
    {"num_vectors": 3},
]


class Setting:
    """Trackers of all layers under one choice of constants, and how well they did."""

    def __init__(self, targets: list[Target], choice: dict[str, float]) -> None:
        self.choice = choice
        groups: dict[tuple[int, int], list[Target]] = defaultdict(list)
        for target in targets:
            groups[target.shape].append(target)
        k = int(choice.get("num_vectors", 2))
        self.trackers = [tracker.Tracker(group, num_vectors=k) for group in groups.values()]
        self.errors: list[float] = []
        self.held: list[bool] = []
        self.passes: list[float] = []

    def measure(self, truth: dict[str, float]) -> None:
        """Take one reading of each layer and compare it with the truth."""
        constants = {k: v for k, v in self.choice.items() if k.isupper()}
        saved = {name: getattr(tracker, name) for name in constants}
        vars(tracker).update(constants)
        for group in self.trackers:
            table = group.measure(range(len(group.names))).tolist()
            for name, (value, low, high, _, passes, *_) in zip(group.names, table, strict=True):
                self.errors.append(abs(value - truth[name]) / truth[name])
                self.held.append(low <= truth[name] <= high)
                self.passes.append(passes)
        vars(tracker).update(saved)

    def result(self) -> dict[str, Any]:
        """Errors, coverage and cost over the whole run."""
        ordered, last = sorted(self.errors), len(self.errors) - 1
        return {
            **(self.choice or {"chosen": {"RTOL": tracker.RTOL, "PROBE": tracker.PROBE, "k": 2}}),
            "error_p50": float(f"{ordered[last // 2]:.1e}"),
            "error_p99.9": float(f"{ordered[math.ceil(0.999 * last)]:.1e}"),
            "error_max": float(f"{ordered[-1]:.1e}"),
            "interval_holds_percent": round(100 * sum(self.held) / len(self.held), 3),
            "passes": round(sum(self.passes) / len(self.passes), 3),
            "passes_second_half": round(2 * sum(self.passes[last // 2 :]) / last, 3),
        }


def judge_run(steps: int, lr: float) -> list[dict[str, Any]]:
    """Train, and let all settings watch."""
    pl.seed_everything(SEED, verbose=False)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            num_hidden_layers=3,
            intermediate_size=688,
            num_attention_heads=4,
            vocab_size=VOCAB_SIZE,
        )
    )
    targets = list(find_targets(nn.ModuleDict({"model": model})).targets)
    settings = [Setting(targets, choice) for choice in SETTINGS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    batches = iter(text_data(4).train_dataloader())
    for step in range(steps + 1):
        truth = {}
        for target in targets:
            W = target.matrix().double()
            gram = W.mT @ W if W.shape[0] > W.shape[1] else W @ W.mT
            truth[target.name] = math.sqrt(torch.linalg.eigvalsh(gram)[-1].item())
        for setting in settings:
            setting.measure(truth)
        if step < steps:
            inputs = next(batches)[:, :-1]
            model(input_ids=inputs, labels=inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return [setting.result() for setting in settings]


def judge_cold_starts(tries: int) -> dict[str, str]:
    """Of Gaussian matrices from a random start, how many miss the spectral norm by over 0.1 %."""
    generator = torch.Generator().manual_seed(SEED)
    missed = {}
    for k in (2, 3, 4, tracker.COLD_VECTORS):
        count = total = 0
        for m, n in ((33, 33), (40, 200), (200, 40), (64, 64)):
            for _ in range(tries):
                W = torch.randn(60, m, n, generator=generator)
                found = leading_triplets(
                    W.unbind(),
                    torch.randn(60, k, n, generator=generator),
                    rtol=tracker.COLD_RTOL,
                    max_residual=tracker.COLD_RESIDUAL,
                    max_passes=tracker.FIRST_PASSES,
                )
                true = torch.linalg.matrix_norm(W.double(), 2)
                count += int(((true - found.values[:, 0]) > 1e-3 * true).sum())
                total += 60
        missed[f"{k} vectors"] = f"{count} of {total}"
    return missed


def main() -> None:
    """Parse the options, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW learning rate")
    parser.add_argument("--tries", type=int, default=120, help="batches of 60 cold starts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path, help="file for the JSON record")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {
        "what": "settings of Tracker on a Llama 2.5 M, 22 matrices, AdamW, English text",
        "steps": options.steps,
        "lr": options.lr,
        "settings": judge_run(options.steps, options.lr),
        "cold_starts_that_miss": judge_cold_starts(options.tries),
    }
    report(results, options.save)


if __name__ == "__main__":
    main()
