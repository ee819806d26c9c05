"""Does a change of rank leave a scar in the loss? Peaks after it, beside the run without it.

A causal byte-level `LowRankTransformer` (depth 4, 128 wide, rank 32) learns the documentation that
ships with CPython; then all 24 layers change by a quantum of 8, down or up, in different ways, from
the same state and on the same batches. Given is the largest excess of the validation loss over that
of the run without a change, at some steps of the next 50 (of the fade and the 50 after it, for a
fade), relative, for each seed. One JSON object comes last::

    python scripts/low_rank_resize.py --save scripts/results/<date>_low_rank_resize_cpu.json
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_common import report
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from spectral_lightning.actuators import (
    best_components,
    fresh_rows,
    gathered_factors,
    grow_,
    regauge_,
    shrink_,
)
from spectral_lightning.data import TextDataModule
from spectral_lightning.models import LowRankTransformer
from spectral_lightning.nn import LowRankLinear

SEQUENCE_LEN, BATCH_SIZE, QUANTUM, FADE_STEPS, AFTER = 64, 16, 8, 50, 50
LOOKS = (0, 1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 35, 40, 45, 50)
"""Steps after a change at which the validation loss is measured."""


class Run:
    """A model in training: its optimizer, and where it is in the text."""

    def __init__(self, text: Tensor, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = LowRankTransformer(
            256, SEQUENCE_LEN, depth=4, model_dim=128, num_heads=4, rank=32, capacity=48
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.01)
        self.generator = torch.Generator().manual_seed(seed)
        self.text = text

    def batch(self) -> Tensor:
        """Windows from anywhere in the text."""
        last = len(self.text) - SEQUENCE_LEN - 1
        starts = torch.randint(last, (BATCH_SIZE,), generator=self.generator)
        return torch.stack([self.text[s : s + SEQUENCE_LEN + 1] for s in starts.tolist()]).long()

    def step(self) -> None:
        """One optimizer step."""
        tokens = self.batch()
        self.optimizer.zero_grad()
        loss_of(self.model, tokens).backward()
        self.optimizer.step()

    def copy(self) -> "Run":
        """The same run, to go on by itself."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        other.optimizer = torch.optim.AdamW(other.model.parameters(), lr=1e-3, weight_decay=0.01)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.generator = torch.Generator()
        other.generator.set_state(self.generator.get_state())
        return other

    @property
    def layers(self) -> list[LowRankLinear]:
        """All low-rank layers."""
        return [m for m in self.model.modules() if isinstance(m, LowRankLinear)]

    def moments(self) -> list[Tensor]:
        """Second moments of the layers' hidden activations, over the next batch."""
        found: list[Tensor] = []

        def watch(layer: LowRankLinear, args: tuple[Tensor, ...]) -> None:
            hidden = linear(args[0].flatten(0, -2), gathered_factors(layer)[1])
            found.append(hidden.mT @ hidden)

        handles = [layer.register_forward_pre_hook(watch) for layer in self.layers]
        generator = self.generator.get_state()
        with torch.no_grad():
            loss_of(self.model, self.batch())
        self.generator.set_state(generator)
        for handle in handles:
            handle.remove()
        return found


def loss_of(model: LowRankTransformer, tokens: Tensor) -> Tensor:
    """Mean loss of next-token prediction, nats per byte."""
    logits = model(tokens[:, :-1])
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


Change = Callable[[Run], Iterator[None]]
"""Changes a run, and then is asked after every step until it is done."""


def nothing(run: Run) -> Iterator[None]:
    """Leave it."""
    return iter(())


def cut(moments: Any, *, is_weighted: bool, resets_all: bool = False) -> Change:
    """Drop components at once."""

    def change(run: Run) -> Iterator[None]:
        found = run.moments() if is_weighted else [None] * len(run.layers)
        for layer, moment in zip(run.layers, found, strict=True):
            shrink_(layer, run.optimizer, layer.rank - QUANTUM, moment=moment, moments=moments)
        if resets_all:
            run.optimizer.state.clear()
        return iter(())

    return change


def fade(run: Run) -> Iterator[None]:
    """Turn components down over some steps, then drop them."""
    keep = run.layers[0].rank - QUANTUM
    for layer, moment in zip(run.layers, run.moments(), strict=True):
        found = best_components(layer, layer.rank, moment=moment, is_balanced=False)
        regauge_(layer, run.optimizer, found, moments="carry")

    def fading() -> Iterator[None]:
        for number in range(1, FADE_STEPS + 1):
            yield
            for layer in run.layers:
                layer.gate[keep : layer.rank] = 1 - number / FADE_STEPS
        for layer in run.layers:
            shrink_(layer, run.optimizer, keep)

    return fading()


def grow(run: Run) -> Iterator[None]:
    """Add components without effect."""
    for layer in run.layers:
        grow_(layer, run.optimizer, fresh_rows(layer, QUANTUM))
    return iter(())


def grow_like_v10(run: Run) -> Iterator[None]:
    """Balanced decomposition with null-space vectors scaled by 1e-4, and a new optimizer."""
    for layer in run.layers:
        old, rank = layer.rank, layer.rank + QUANTUM
        U, S, Vh = torch.linalg.svd(layer.spectral_weight().detach(), full_matrices=False)
        S[old:] = 0
        roots = (S[:rank] + 1e-8).sqrt()
        with torch.no_grad():
            layer.left_factor[:, :rank] = U[:, :rank] * roots
            layer.right_factor[:rank] = roots[:, None] * Vh[:rank]
        layer.set_rank(rank)
    run.optimizer.state.clear()
    return iter(())


CHANGES: dict[str, Change] = {
    "nothing": nothing,
    "fade": fade,
    "cut, by outputs": cut("carry_second", is_weighted=True),
    "cut, by outputs, all moments": cut("carry", is_weighted=True),
    "cut, by outputs, layer's moments reset": cut("reset", is_weighted=True),
    "cut, by weight": cut("carry_second", is_weighted=False),
    "cut as v10 (by weight, new optimizer)": cut("reset", is_weighted=False, resets_all=True),
    "grow": grow,
    "grow as v10 (new optimizer)": grow_like_v10,
}


@torch.no_grad()
def validation(run: Run, valid: Tensor) -> float:
    """Loss on fixed windows."""
    return loss_of(run.model, valid).item()


def follow(start: Run, change: Change, valid: Tensor) -> dict[int, float]:
    """Validation losses after a change."""
    run = start.copy()
    losses, going = {}, change(run)
    for step in range(FADE_STEPS + AFTER + 1):
        if step in LOOKS or step - FADE_STEPS in LOOKS:
            losses[step] = validation(run, valid)
        run.step()
        next(going, None)
    return losses


def main() -> None:
    """Run all changes for all seeds, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=800, help="before the change")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # products are small
    data = TextDataModule(vocab_size=257)
    data.prepare_data()
    data.setup("fit")
    train, valid = byte_streams(data)
    excess: dict[str, list[float]] = {name: [] for name in CHANGES}
    finals: dict[str, list[float]] = {name: [] for name in CHANGES}
    for seed in range(options.seeds):
        run = Run(train, seed)
        for _ in range(options.steps):
            run.step()
        control = follow(run, nothing, valid)
        for name, change in CHANGES.items():
            losses = follow(run, change, valid)
            last = FADE_STEPS + AFTER if name == "fade" else AFTER
            peaks = [losses[s] / control[s] - 1 for s in losses if s <= last]
            excess[name].append(round(100 * max(peaks), 3))
            finals[name].append(round(losses[FADE_STEPS + AFTER], 4))
        print(seed, {name: found[-1] for name, found in excess.items()}, flush=True)
    results = {
        "script": "low_rank_resize",
        "model": "depth 4, 128 wide, rank 32, capacity 48, bytes",
        "steps_before": options.steps,
        "quantum": QUANTUM,
        "peak_excess_percent": excess,
        "loss_100_steps_later": finals,
    }
    report(results, options.save)


def byte_streams(data: TextDataModule) -> tuple[Tensor, Tensor]:
    """Training bytes, and 64 fixed windows of validation bytes."""
    streams = []
    for loader in (data.train_dataloader(), data.val_dataloader()):
        tokens = torch.cat([batch.flatten() for batch in loader])
        text = data.tokenizer.decode(tokens[tokens >= 0].tolist(), skip_special_tokens=True)
        streams.append(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))
    width = SEQUENCE_LEN + 1
    starts = torch.linspace(0, len(streams[1]) - width - 1, 64).long().tolist()
    return streams[0], torch.stack([streams[1][s : s + width] for s in starts]).long()


if __name__ == "__main__":
    main()
