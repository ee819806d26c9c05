"""Rank adaptation at the edges of a run: what is left behind, and what is counted."""

import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from spectral_lightning.callbacks import RankAdaptation
from spectral_lightning.control import BudgetAllocator
from spectral_lightning.nn import factorize, merge
from spectral_lightning.spectra import RankCheck, read_rank_events
from spectral_lightning.testing.ranks import EVERY_STEP, Plan, low_rank_task
from spectral_lightning.testing.tasks import TinyTask

SELDOM = Plan(clock=replace(EVERY_STEP, interval=50, interval_max=50))


@pytest.mark.parametrize("is_reloaded", [False, True])
def test_a_fit_that_ends_amid_probes_leaves_none_behind(fit, after_step, is_reloaded):
    """Without the callback nobody would take their gradient away."""
    states = []
    keep = after_step(
        lambda trainer: states.append(copy.deepcopy(trainer.lightning_module.state_dict()))
    )
    task = low_rank_task(num_batches=100)
    fit(RankAdaptation("net.[25]", SELDOM, 50), keep, task=task, max_steps=40)
    assert states[-1]["net.2.gate"][8:].any(), "the probes are at work"
    if is_reloaded:
        task = low_rank_task(num_batches=100)
        task.load_state_dict(states[-1])
    fit(task=task, max_steps=20)
    assert not task.net[2].left_factor[:, 8:].any()
    x = torch.randn(5, 40)
    before = task.net[2](x)
    assert "2" in merge(task.net)
    assert torch.allclose(task.net[2](x), before, atol=1e-5)


def test_inputs_of_a_validation_within_an_optimizer_step_do_not_count(fit):
    numbers = []

    class Count(RankAdaptation):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            moments = [layer.moment for layer in self._layers.values()]
            numbers.extend(int(moment[-1, -1]) for moment in moments if moment is not None)

    batches = {"accumulate_grad_batches": 4, "val_check_interval": 3, "limit_val_batches": 2}
    task = low_rank_task(num_batches=100)
    fit(Count("net.2", Plan(), 1, probes=0), task=task, max_steps=6, **batches)
    assert len(numbers) == 6
    assert len(set(numbers)) == 1


@pytest.mark.parametrize("is_keyword", [False, True])
def test_layers_may_be_called_with_one_vector_and_by_keyword(fit, is_keyword):
    class Odd(TinyTask):
        def training_step(self, batch, batch_idx):
            rows = torch.randn(20, 40)
            outputs = [self.net[2](input=x) if is_keyword else self.net[2](x) for x in rows]
            return torch.stack(outputs).square().sum()

    callback = RankAdaptation("net.2", Plan(ranks={2: 5}), 1, "cut")
    fit(callback, task=Odd(low_rank_task().net), max_steps=3, limit_val_batches=0)
    assert callback.ranks == {"net.2": 5}


class Uneven(TinyTask):
    """Layers of which some are too small to have a share of the budget by themselves."""

    def __init__(self):
        sizes = [(512, 32), (512, 512), (32, 512)]
        net = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in sizes)
        factorize(net, rank=16, capacity=16)
        super().__init__(net, num_batches=20)

    def training_step(self, batch, batch_idx):
        return sum(layer(torch.randn(64, layer.in_features)).square().mean() for layer in self.net)


def test_a_budget_that_holds_all_layers_together_may_be_too_small_for_one(fit, tmp_path):
    clock = replace(EVERY_STEP, quantum=8, rank_min=8)
    callback = RankAdaptation("*", BudgetAllocator(budget=0.15, clock=clock), 1, "cut")
    logger = CSVLogger(tmp_path)
    fit(callback, task=Uneven(), max_steps=2, limit_val_batches=0, logger=logger)
    checks = read_rank_events(f"{logger.log_dir}/rank_events.jsonl")
    assert all(check.null_target for check in checks if isinstance(check, RankCheck))
    cost = sum(
        rank * sum(shape)
        for rank, shape in zip(
            callback.ranks.values(), [(512, 32), (512, 512), (32, 512)], strict=True
        )
    )
    assert cost <= 0.15 * (512 * 32 * 2 + 512 * 512)


def test_a_layer_without_a_reading_keeps_its_rank_and_its_share_of_the_budget(fit):
    class Zero(TinyTask):
        def on_train_start(self):
            with torch.no_grad():
                self.net[2].left_factor.zero_()
                self.net[2].right_factor.zero_()

    clock = replace(EVERY_STEP, quantum=2, rank_min=2)
    controller = BudgetAllocator(budget=0.5, clock=clock)  # 20 components of 80 parameters
    callback = RankAdaptation("net.[25]", controller, 1, "cut", probes=0)
    task = Zero(low_rank_task(rank=12).net, num_batches=20)
    with pytest.warns(UserWarning, match="skips the check"):
        fit(callback, task=task, max_steps=4)
    assert callback.ranks == {"net.2": 12, "net.5": 8}
    assert callback.state_dict()["layers"]["net.2"]["state"]["num_changes"] == 0


def test_a_fit_that_ends_amid_a_fade_says_so(fit, caplog):
    callback = RankAdaptation("net.[25]", Plan(ranks={4: 4}), 1, fade_steps=20)
    with caplog.at_level("INFO"):
        fit(callback, task=low_rank_task(num_batches=20), max_steps=6)
    assert "ends while components of 2 layers fade, such as net.2" in caplog.text


def test_factorize_converts_all_layers_or_none():
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    with pytest.raises(ValueError, match="capacity"):
        factorize(net, rank=2, capacity=8)
    assert all(type(layer) is nn.Linear for layer in net)
