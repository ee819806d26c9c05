"""What the analyses of mode switching cost: beside full SVDs, and as a share of training.

First part: 80 matrices of 1280 x 1280, analysed as `SVDModeSwitch` does with `CalibratedPolicy`
(directions from a warm start, intent, effect, angle), against one full SVD of each, which is
what the original did three times. Blocks of eight matrices in the order A B B A. Second part: a GPT
of depth 4 on 4,096 tokens per step, all attention layers analysed every 20 steps: the time inside
the callback over that of the fit, in which nothing else waits for it. One JSON object comes last::

    python scripts/bench_svd_analysis.py --save scripts/results/<date>_svd_analysis_cpu.json
"""

import argparse
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from bench_common import SEED, SEQUENCE_LEN, VOCAB_SIZE, quiet_trainer, report, text_data
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from spectral_lightning.callbacks import SVDModeSwitch
from spectral_lightning.callbacks.svd_mode_factored import Protection, layer_of
from spectral_lightning.callbacks.svd_mode_layer import ModeLayer
from spectral_lightning.control import CalibratedPolicy
from spectral_lightning.models import GPT
from spectral_lightning.spectra import Need, SpectrumCache, Target
from spectral_lightning.spectra.mode_measures import on_host, vectors_on_host
from spectral_lightning.tasks import LanguageModeling

SIZE, COUNT, BLOCK = 1280, 80, 8


def analyse(layers: list[ModeLayer], cache: SpectrumCache, step: int) -> None:
    """One analysis of some layers, as the callback makes it."""
    policy = CalibratedPolicy()
    heads = [layer.begin(step, cache.vectors, policy) for layer in layers]
    numbers = vectors_on_host([head for head in heads if head is not None])
    measures = [
        layer.measure_intent(found, policy) for layer, found in zip(layers, numbers, strict=True)
    ]
    effects = [layer.measure_effect() for layer in layers]
    for layer, intent, effect in zip(layers, on_host(measures), on_host(effects), strict=True):
        assert layer.analysis is not None
        layer.analysis.numbers = {**intent, **effect}
        layer.decide(policy, None)
        layer.end(policy)


def against_svd(protection: Protection) -> dict[str, Any]:
    """Milliseconds per matrix of both."""
    torch.manual_seed(SEED)
    modules = [nn.Linear(SIZE, SIZE, bias=False) for _ in range(COUNT)]
    for module in modules:
        module.weight.grad = torch.randn(SIZE, SIZE)
    cache = SpectrumCache()
    optimizer = torch.optim.SGD([module.weight for module in modules], lr=1e-6)
    layers = []
    for i, module in enumerate(modules):
        target = Target(name=str(i), module=module)
        cache.declare(Need(names=frozenset([target.name])), [target])
        layer = layer_of(target, [optimizer], protection, 0)
        assert isinstance(layer, ModeLayer)
        layers.append(layer)
    blocks = [layers[i : i + BLOCK] for i in range(0, COUNT, BLOCK)]
    for block in blocks:  # cold starts, once per run
        analyse(block, cache, 0)
    times: dict[str, list[float]] = {"analysis": [], "svd": []}

    def timed(name: str, block: list[ModeLayer], step: int) -> None:
        start = time.perf_counter()
        if name == "analysis":
            analyse(block, cache, step)
        else:
            for layer in block:
                torch.linalg.svd(layer.target.matrix(), full_matrices=False)
        times[name].append(1e3 * (time.perf_counter() - start) / len(block))

    for i, block in enumerate(blocks):
        for name in ("analysis", "svd") if i % 2 == 0 else ("svd", "analysis"):
            timed(name, block, i + 1)
    middle = {name: round(statistics.median(found), 2) for name, found in times.items()}
    ratios = sorted(b / a for a, b in zip(times["analysis"], times["svd"], strict=True))
    return {
        "protection": protection,
        "matrices": COUNT,
        "shape": [SIZE, SIZE],
        "num_directions": CalibratedPolicy().most_principal(SIZE),
        "ms_per_matrix": middle,
        "svd_over_analysis": round(statistics.median(ratios), 2),
        "range": [round(ratios[0], 2), round(ratios[-1], 2)],
    }


class Timed(SVDModeSwitch):
    """Add up the time inside the hooks."""

    seconds = 0.0

    @override
    def on_before_optimizer_step(self, *args: Any) -> None:
        start = time.perf_counter()
        super().on_before_optimizer_step(*args)
        self.seconds += time.perf_counter() - start

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        start = time.perf_counter()
        super().on_train_batch_end(*args)
        self.seconds += time.perf_counter() - start


class Clock(pl.Callback):
    """Time of the fit's steps."""

    start = seconds = 0.0

    @override
    def on_train_start(self, *args: Any) -> None:
        self.start = time.perf_counter()

    @override
    def on_train_end(self, *args: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def share_of_training(steps: int, repeats: int) -> dict[str, Any]:
    """Share of the time of a fit that is spent in the callback."""
    data = text_data(4096 // SEQUENCE_LEN)
    batches = list(islice(data.train_dataloader(), steps))
    shares = []
    for _ in range(repeats):
        torch.manual_seed(SEED)
        task = LanguageModeling(GPT(4, VOCAB_SIZE, SEQUENCE_LEN, head_dim=64))
        timed, clock = Timed("model.blocks.*.attn.*", 20), Clock()
        trainer = quiet_trainer(
            max_steps=steps, callbacks=[timed, clock], accelerator="cpu", gradient_clip_val=1.0
        )
        trainer.fit(task, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        shares.append(timed.seconds / clock.seconds)
    return {
        "model": "GPT depth 4",
        "tokens_per_step": 4096,
        "layers": 16,
        "every_n_steps": 20,
        "steps": steps,
        "share_percent": round(100 * statistics.median(shares), 3),
        "shares_percent": [round(100 * share, 3) for share in shares],
    }


def main() -> None:
    """Run both, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=61)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    costs = []
    for protection in ("two_sided", "gradients"):
        costs.append(against_svd(protection))
        print(costs[-1], flush=True)
    training = share_of_training(options.steps, options.repeats)
    results = {"script": "bench_svd_analysis", "against_svd": costs, "training": training}
    report(results, options.save)


if __name__ == "__main__":
    main()
