"""Rank adaptation in a real Trainer: ranks move, and nothing else notices."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from spectral_lightning.callbacks import RankAdaptation
from spectral_lightning.control import BudgetAllocator, StableRankController
from spectral_lightning.spectra import RankCheck, SkippedCheck, read_rank_events
from spectral_lightning.testing.ranks import EVERY_STEP, Plan, low_rank_task
from spectral_lightning.testing.tasks import TinyNetwork, TinyTask


def planned(ranks, **settings):
    options = {"layers": "net.[25]", "every_n_steps": 1, "shrink": "cut"}
    return RankAdaptation(**options | {"controller": Plan(ranks=ranks)} | settings)


class Look(RankAdaptation):
    """Weights right before and after each action, and ranks after it."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.jumps, self.seen = {}, {}

    def on_weights(self, trainer, pl_module):
        layers = {name: pl_module.get_submodule(name) for name in self.ranks}
        before = {n: layer.spectral_weight().detach().clone() for n, layer in layers.items()}
        super().on_weights(trainer, pl_module)
        for name, layer in layers.items():
            jump = (layer.spectral_weight() - before[name]).norm() / before[name].norm()
            self.jumps[trainer.global_step, name] = jump.item()
        self.seen[trainer.global_step] = dict(self.ranks)


def test_ranks_follow_the_controller_in_both_directions(fit):
    look = Look("net.[25]", Plan(ranks={2: 5, 4: 12, 6: 9}), 1, "cut")
    fit(look, task=low_rank_task(num_batches=10), max_steps=8)
    assert [look.seen[step]["net.2"] for step in range(1, 9)] == [8, 5, 5, 12, 12, 9, 9, 9]
    assert look.jumps[4, "net.2"] == 0, "growth leaves the weight bit for bit"
    assert look.jumps[2, "net.2"] > 1e-3


def test_parameters_and_optimizer_stay_the_same_and_complete(fit):
    task = low_rank_task(num_batches=10)
    ids = {name: id(parameter) for name, parameter in task.named_parameters()}
    trainer = fit(planned({2: 5, 4: 12}), task=task, max_steps=8)
    assert {name: id(parameter) for name, parameter in task.named_parameters()} == ids
    (optimizer,) = trainer.optimizers
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert known == set(ids.values())
    assert all(state["step"] == 8 for state in optimizer.state.values())


def test_other_layers_and_their_moments_are_not_touched_by_a_change(fit):
    found = {}

    class State(RankAdaptation):
        def on_weights(self, trainer, pl_module):
            super().on_weights(trainer, pl_module)
            if trainer.global_step == 3:
                layers = (pl_module.net[0], pl_module.net[7])
                parameters = [p for layer in layers for p in layer.parameters()]
                states = [copy.deepcopy(trainer.optimizers[0].state[p]) for p in parameters]
                found[self.controller.ranks.get(3)] = (
                    [p.detach().clone() for p in parameters],
                    [s[key] for s in states for key in ("step", "exp_avg", "exp_avg_sq")],
                )

    for ranks in ({}, {3: 4}):
        callback = State("net.[25]", Plan(ranks=ranks), 1, "cut", probes=0)
        fit(callback, task=low_rank_task(), max_steps=3)
    for own, other in zip(*found.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


def test_fading_components_leave_without_a_jump(fit):
    cut = Look("net.2", Plan(ranks={4: 4}), 1, "cut")
    fit(cut, task=low_rank_task(num_batches=40), max_steps=40)
    fade = Look("net.2", Plan(ranks={4: 4}), 1, "fade", fade_steps=20)
    fit(fade, task=low_rank_task(num_batches=40), max_steps=40)
    assert fade.seen[23]["net.2"] == 8
    assert fade.seen[24]["net.2"] == 4
    assert max(fade.jumps.values()) < 0.2 * cut.jumps[4, "net.2"]
    assert fade.jumps[24, "net.2"] < 0.2 * cut.jumps[4, "net.2"]


def test_a_layer_is_judged_by_its_outputs_after_a_fade_too(fit, tmp_path):
    """The check that falls on the last step of a fade has seen no inputs, and is left out."""
    logger = CSVLogger(tmp_path)
    callback = planned({4: 5}, shrink="fade", fade_steps=4, every_n_steps=4, layers="net.2")
    fit(callback, task=low_rank_task(num_batches=20), max_steps=16, logger=logger)
    events = read_rank_events(f"{logger.log_dir}/rank_events.jsonl")
    assert [(e.step, e.rank) for e in events if is_check(e)] == [(4, 8), (12, 5), (16, 5)]


@pytest.mark.parametrize("weigh_outputs", [True, False])
def test_with_known_inputs_the_outputs_change_less(fit, weigh_outputs):
    changes = []

    class Outputs(RankAdaptation):
        def on_weights(self, trainer, pl_module):
            x = next(iter(pl_module.train_dataloader()))[0]
            hidden = pl_module.net[1](pl_module.net[0](x))
            before = pl_module.net[2](hidden)
            super().on_weights(trainer, pl_module)
            if trainer.global_step == 5:
                changes.append((pl_module.net[2](hidden) - before).norm().item())

    for weighs in (weigh_outputs, False):
        callback = Outputs("net.2", Plan(ranks={5: 5}), 1, "cut", weigh_outputs=weighs)
        fit(callback, task=low_rank_task(), max_steps=5)
    assert changes[0] < 0.8 * changes[1] if weigh_outputs else changes[0] == changes[1]


def test_ranks_change_at_step_boundaries_only(fit):
    look = Look("net.2", Plan(ranks={1: 5, 2: 12}), 1, "cut")
    micro = []

    class Ranks(TinyTask):
        def training_step(self, batch, batch_idx):
            micro.append(self.net[2].rank)
            return super().training_step(batch, batch_idx)

    task = Ranks(low_rank_task().net, num_batches=12)
    fit(look, task=task, max_steps=3, accumulate_grad_batches=4)
    assert micro == [8] * 4 + [5] * 4 + [12] * 4


def test_several_optimizer_steps_in_a_batch_miss_no_check(fit):
    class Twice(TinyTask):
        def __init__(self):
            super().__init__(low_rank_task().net, num_batches=12)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(2):
                self.optimizers().zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                self.optimizers().step()

    look = Look("net.2", Plan(ranks={4: 5, 8: 12}), 2, "cut")
    fit(look, task=Twice(), max_steps=10)
    assert look.seen == {2: {"net.2": 8}, 4: {"net.2": 5}, 6: {"net.2": 5}, 8: {"net.2": 12}} | {
        10: {"net.2": 12}
    }


def test_probes_leave_no_trace_in_a_masked_model(fit):
    """Clipped by the norm of all gradients, of which those of the probes are none."""
    weights = []
    for probes in (0, 8):
        task = low_rank_task(mode="masked", num_batches=20)
        callback = planned({}, probes=probes, probe_steps=4, every_n_steps=5)
        fit(callback, task=task, max_steps=12, gradient_clip_val=1e-2)
        weights.append(task.state_dict())
    for name, weight in weights[0].items():
        if "right_factor" not in name and "gate" not in name:
            assert torch.equal(weight, weights[1][name]), name


def test_the_growth_lift_is_measured_where_there_is_room(fit, tmp_path):
    logger = CSVLogger(tmp_path)
    callback = planned({}, every_n_steps=10, probe_steps=4)
    fit(callback, task=low_rank_task(num_batches=40), max_steps=30, logger=logger)
    checks = [e for e in read_rank_events(f"{logger.log_dir}/rank_events.jsonl") if is_check(e)]
    assert len(checks) == 6
    assert all(0 < check.growth <= 4.001 for check in checks)
    full = planned({}, every_n_steps=10, probe_steps=4)
    task, logger = low_rank_task(rank=16, num_batches=40), CSVLogger(tmp_path)
    fit(full, task=task, max_steps=30, logger=logger)
    events = read_rank_events(f"{logger.log_dir}/rank_events.jsonl")
    assert all(event.growth is None for event in events if is_check(event))


def is_check(event):
    return isinstance(event, RankCheck)


def test_events_hold_every_check_with_its_null_beside_it(fit, tmp_path):
    logger = CSVLogger(tmp_path)
    controller = StableRankController(clock=EVERY_STEP)
    callback = RankAdaptation("net.[25]", controller, 1, "cut")
    fit(callback, task=low_rank_task(num_batches=20), max_steps=12, logger=logger)
    events = read_rank_events(f"{logger.log_dir}/rank_events.jsonl")
    checks = [event for event in events if is_check(event)]
    assert [event.event for event in (events[0], events[-1])] == ["settings", "summary"]
    assert [(c.step, c.layer) for c in checks] == [
        (step, name) for step in range(1, 13) for name in ("net.2", "net.5")
    ]
    for first, second in zip(checks, checks[2:], strict=False):
        assert second.rank == first.next_rank
        assert first.null_target > 1
        assert math.isfinite(first.loss)
    assert events[-1].num_active == sum(80 * rank for rank in callback.ranks.values())
    assert events[-1].num_stored == 2 * 16 * 80


@pytest.mark.parametrize("weigh_outputs", [True, False])
def test_compiled_training_makes_one_graph_of_all_ranks(fit, weigh_outputs):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = low_rank_task(mode="masked").net

        def forward(self, x):
            return self.body(x)

    task, graphs = TinyTask(Net(), num_batches=14), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    task.net.compile(backend=backend)
    ranks = {step: 4 + step for step in range(1, 12)}
    callback = planned(ranks, layers="net.body.2", weigh_outputs=weigh_outputs)
    fit(callback, task=task, max_steps=13)
    torch._dynamo.reset()
    assert callback.ranks == {"net.body.2": 15}
    assert len(graphs) == 1


def skips(logger):
    events = read_rank_events(f"{logger.log_dir}/rank_events.jsonl")
    return [(e.step, e.layer) for e in events if isinstance(e, SkippedCheck)]


def test_a_weight_of_zeros_is_skipped_with_an_event_and_never_initialised_anew(fit, tmp_path):
    class Zero(TinyTask):
        def on_train_start(self):
            with torch.no_grad():
                self.net[2].left_factor.zero_()
                self.net[2].right_factor.zero_()

    task, logger = Zero(low_rank_task().net), CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"check of net\.2 at step 1: it has a weight of zeros"):
        fit(planned({1: 4, 2: 4, 3: 4}), task=task, max_steps=3, logger=logger)
    assert skips(logger) == [(1, "net.2"), (2, "net.2"), (3, "net.2")]
    assert not task.net[2].left_factor.any()
    assert task.net[5].rank == 4


@pytest.mark.filterwarnings("ignore:RankAdaptation skips the check")
def test_a_gradient_that_is_not_finite_is_skipped_with_an_event(fit, tmp_path):
    class Break(TinyTask):
        def on_after_backward(self):
            if self.trainer.global_step == 1:
                self.net[5].left_factor.grad.fill_(math.nan)

    task, logger = Break(low_rank_task().net), CSVLogger(tmp_path)
    callback = planned({1: 4, 2: 6, 3: 4}, probes=0)
    fit(callback, task=task, max_steps=2, logger=logger)
    assert skips(logger) == [(2, "net.5")]
    assert callback.ranks == {"net.2": 6, "net.5": 4}


def test_frobenius_decay_makes_the_products_smaller(fit):
    norms = []
    for strength in (0.0, 1.0):
        task = low_rank_task(num_batches=60)
        fit(planned({}, frobenius_decay=strength), task=task, max_steps=40)
        norms.append(task.net[2].spectral_weight().norm().item())
    assert norms[1] < 0.9 * norms[0]


@pytest.mark.parametrize("shrink", ["cut", "fade"])
def test_a_budget_is_never_exceeded_once_it_is_met(fit, shrink):
    clock = replace(EVERY_STEP, quantum=2, rank_min=2, interval=4, interval_max=4)
    controller = BudgetAllocator(budget=0.3, clock=clock, growth_threshold=1.0)
    look = Look("net.[25]", controller, 4, shrink, fade_steps=4, probe_steps=3)
    fit(look, task=low_rank_task(num_batches=80), max_steps=60)
    spent = {step: 80 * sum(ranks.values()) for step, ranks in look.seen.items()}
    met = 4 if shrink == "cut" else 8
    assert all(cost <= 0.3 * 2 * 40 * 40 for step, cost in spent.items() if step >= met)
    assert spent[3] > 0.3 * 2 * 40 * 40


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_check_waits_for_the_device_once_whatever_it_measures(fit, monkeypatch, num_layers):
    """Counted are all ways from a tensor to a number of the host, in checks that change nothing."""
    reads, checks = [], []
    for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "cpu"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda tensor, *args, _method=method, _name=name: (
                reads.append(_name),
                _method(tensor, *args),
            )[1],
        )

    class Count(RankAdaptation):
        def on_weights(self, trainer, pl_module):
            before = len(reads)
            super().on_weights(trainer, pl_module)
            checks.append(len(reads) - before)

    layers = ["net.2", "net.5"][:num_layers]
    plan, clock = Plan(), replace(EVERY_STEP, interval=4, interval_max=4)
    callback = Count(layers, replace(plan, clock=clock), 4, probe_steps=3)
    fit(callback, task=low_rank_task(num_batches=20), max_steps=8)
    assert max(checks) == 1
    assert sum(checks) == 2


@pytest.mark.parametrize("print_table", [True, False])
def test_the_ranks_by_type_of_layer_are_printed_at_the_end(fit, capsys, print_table):
    fit(planned({2: 5}, print_table=print_table), task=low_rank_task(), max_steps=3)
    found = capsys.readouterr().out
    assert ("Ranks by type of layer" in found) == print_table
    assert ("net.5" in found) == print_table


def test_without_low_rank_layers_there_is_a_warning(fit):
    with pytest.warns(UserWarning, match="RankAdaptation has no effect: `layers` selects no train"):
        fit(planned({}), task=TinyTask(TinyNetwork()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"controller": 3}, TypeError, "`controller` must be a RankController or None, got 3"),
        ({"shrink": "snap"}, ValueError, "`shrink` must be one of fade, cut, got 'snap'"),
        ({"moments": "keep"}, ValueError, "`moments` must be one of carry, carry_second, reset"),
        ({"fade_steps": 0}, ValueError, "`fade_steps` must be >= 1, got 0"),
        ({"probes": -1}, ValueError, "`probes` must be >= 0, got -1"),
        ({"probe_steps": 1}, ValueError, "`probe_steps` must be >= 2, got 1"),
        ({"frobenius_decay": -1.0}, ValueError, r"`frobenius_decay` must be >= 0, got -1\.0"),
        ({"every_n_steps": 0}, ValueError, "`every_n_steps` must be >= 1, got 0"),
    ],
)
def test_a_wrong_argument_is_refused_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        RankAdaptation(**arguments)
