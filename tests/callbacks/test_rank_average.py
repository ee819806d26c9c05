"""Weight averaging beside rank adaptation: the average stays one of weights."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

from spectral_lightning.callbacks import RankAdaptation
from spectral_lightning.callbacks.rank_average import averages_of
from spectral_lightning.testing.ranks import Plan, low_rank_task

DECAY = 0.9
PLANS = {
    "cut": {"controller": Plan(ranks={4: 5, 8: 12, 12: 9}), "shrink": "cut"},
    "fade": {"controller": Plan(ranks={4: 5, 12: 12, 16: 9}), "fade_steps": 4},
}


class Distances(RankAdaptation):
    """How far each average's weight is from the layer's, relative, after each step."""

    found = ()

    def on_weights(self, trainer, pl_module):
        super().on_weights(trainer, pl_module)
        for layer in (pl_module.net[2], pl_module.net[5]):
            (own,) = averages_of(trainer, layer)
            distance = (own.spectral_weight() - layer.spectral_weight()).norm()
            self.found = [*self.found, (distance / layer.spectral_weight().norm()).item()]


def averaging(**settings):
    return EMAWeightAveraging(decay=DECAY, **settings)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("every", [1, 3])
def test_the_average_stays_near_the_weights_that_it_averages(fit, plan, is_first, every):
    """0.09 at most, 0.15 without a change of rank; 0.8 where the average does not follow."""
    callback = Distances("net.[25]", every_n_steps=1, **PLANS[plan])
    callbacks = [averaging(update_every_n_steps=every), callback]
    task = low_rank_task(num_batches=40, lr=1e-3)
    fit(*(callbacks if is_first else callbacks[::-1]), task=task, max_steps=24)
    assert len(callback.found) == 48
    assert 0 < max(callback.found) < 0.2


@pytest.mark.parametrize("is_first", [True, False])
def test_a_checkpoint_holds_the_average_with_its_ranks(fit, after_step, tmp_path, is_first):
    found = []

    def save(trainer):
        if trainer.global_step == 7:
            trainer.save_checkpoint(tmp_path / "run.ckpt")
            found.extend(averages_of(trainer, trainer.lightning_module.net[2]))

    callback = RankAdaptation("net.[25]", Plan(ranks={4: 9}), 1, "cut")
    callbacks = [averaging(), callback] if is_first else [callback, averaging()]
    fit(*callbacks, after_step(save), task=low_rank_task(capacity=16, num_batches=40), max_steps=7)
    fresh = low_rank_task(rank=4)
    fresh.load_state_dict(torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"])
    assert fresh.net[2].rank == 9
    assert torch.equal(fresh.net[2].spectral_weight(), found[0].spectral_weight())


def test_a_run_goes_on_with_its_average(fit, after_step, tmp_path):
    def save(trainer):
        if trainer.global_step == 6:
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    weights = []
    for path in (None, tmp_path / "run.ckpt"):
        callback = RankAdaptation("net.[25]", every_n_steps=1, **PLANS["fade"])
        task = low_rank_task(num_batches=40)
        callbacks = (averaging(), callback, after_step(save))
        fit(*callbacks, task=task, max_steps=20, ckpt_path=path)
        weights.append(copy.deepcopy(task.state_dict()))
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_every_kind_of_average_is_found_by_its_layer(fit, after_step):
    found = []

    def look(trainer):
        found.append(averages_of(trainer, trainer.lightning_module.net[5]))

    stochastic = StochasticWeightAveraging(swa_lrs=1e-3)
    for callbacks in ([], [averaging()], [stochastic]):
        fit(*callbacks, after_step(look), task=low_rank_task(), max_steps=1, max_epochs=4)
    assert [len(layers) for layers in found] == [0, 1, 1]
    assert found[2][0] is stochastic._average_model.net[5]
