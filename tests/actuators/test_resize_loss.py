"""What a change of rank leaves in the loss of a small language model."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from spectral_lightning.actuators import (
    best_components,
    fresh_rows,
    gathered_factors,
    grow_,
    regauge_,
    shrink_,
)
from spectral_lightning.models import LowRankTransformer
from spectral_lightning.nn import LowRankLinear

PERIOD, FADE, KEEP = 16, 50, 14


def loss_of(model, tokens):
    logits = model(tokens[:, :-1])
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batch(generator, number=16):
    """Random letters, of which each second one repeats the one before: half can be learned."""
    letters = torch.randint(24, (number, PERIOD), generator=generator)
    return letters.repeat_interleave(2, dim=1)


class Run:
    def __init__(self):
        torch.manual_seed(0)
        self.model = LowRankTransformer(
            24, 2 * PERIOD, depth=1, model_dim=32, num_heads=2, rank=16, capacity=24
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.generator = torch.Generator().manual_seed(1)

    def step(self):
        self.optimizer.zero_grad()
        loss_of(self.model, batch(self.generator)).backward()
        self.optimizer.step()

    @property
    def layers(self):
        return [m for m in self.model.modules() if isinstance(m, LowRankLinear)]

    def moments(self):
        found = []

        def watch(layer, args):
            hidden = linear(args[0].flatten(0, -2), gathered_factors(layer)[1])
            found.append(hidden.mT @ hidden)

        handles = [layer.register_forward_pre_hook(watch) for layer in self.layers]
        with torch.no_grad():
            loss_of(self.model, batch(torch.Generator().manual_seed(2)))
        for handle in handles:
            handle.remove()
        return found


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    run = Run()
    for _ in range(400):
        run.step()
    return run


def nothing(run):
    return iter(())


def as_v10(run):
    for layer in run.layers:
        shrink_(layer, run.optimizer, KEEP, moments="reset")
    run.optimizer.state.clear()
    return iter(())


def fade(run):
    for layer, moment in zip(run.layers, run.moments(), strict=True):
        found = best_components(layer, layer.rank, moment=moment, is_balanced=False)
        regauge_(layer, run.optimizer, found, moments="carry")

    def fading():
        for number in range(1, FADE + 1):
            yield
            for layer in run.layers:
                layer.gate[KEEP : layer.rank] = 1 - number / FADE
        for layer in run.layers:
            shrink_(layer, run.optimizer, KEEP)

    return fading()


def grow(run):
    for layer in run.layers:
        grow_(layer, run.optimizer, fresh_rows(layer, 8))
    return iter(())


def losses(start, change, num_steps=2 * FADE):
    run = copy.deepcopy(start)
    valid, going, found = batch(torch.Generator().manual_seed(3), 256), change(run), []
    for _ in range(num_steps + 1):
        with torch.no_grad():
            found.append(loss_of(run.model, valid).item())
        run.step()
        next(going, None)
    return torch.tensor(found)


def test_fading_and_growing_leave_no_peak_and_a_new_optimizer_does(trained):
    control = losses(trained, nothing)
    peaks = {
        name: (losses(trained, change) / control - 1).max().item()
        for name, change in (("fade", fade), ("grow", grow), ("v10", as_v10))
    }
    assert peaks["fade"] <= 0.01
    assert peaks["grow"] <= 0.01
    assert peaks["v10"] > 2 * peaks["fade"]
    assert losses(trained, nothing)[-1] == control[-1]
