"""A step that is not finite leaves no trace, on any rank, and is counted."""

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW

from spectral_lightning.callbacks.non_finite_guard import NonFiniteGuard
from spectral_lightning.control.non_finite import SkipPolicy
from spectral_lightning.optim import MuonAdamW, parameter_groups
from spectral_lightning.testing.differences import first_difference
from spectral_lightning.testing.distributed import run_ranks
from spectral_lightning.testing.host_sync import RefuseHostSync
from spectral_lightning.testing.tasks import TinyTask, quiet_trainer

SKIPS = "NonFiniteGuard skips optimizer step"
OPTIMIZERS = {
    "adamw": lambda net: AdamW(net.parameters(), lr=0.01, weight_decay=0.1),
    "fused": lambda net: AdamW(net.parameters(), lr=0.01, weight_decay=0.1, fused=True),
    "sgd": lambda net: SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1),
    "muon": lambda net: MuonAdamW(parameter_groups(net), weight_decay=0.1, ns_dtype="float32"),
}


class Poisoned(TinyTask):
    """The task with two loss terms, one of which goes bad in some batches, on one rank."""

    def __init__(self, bad=(3,), value=math.nan, kind="term", rank=None, optimizer="adamw"):
        super().__init__(num_batches=12, optimizer=OPTIMIZERS[optimizer])
        self.bad, self.value, self.kind, self.rank = bad, value, kind, rank
        self.terms = None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        is_bad = batch_idx + 1 in self.bad and self.rank in (None, self.global_rank)
        term = loss.new_tensor(self.value if is_bad and self.kind == "term" else 0.5)
        self.terms = {"mse": loss.detach(), "bridge": term}
        if is_bad and self.kind == "gradient":  # finite itself
            loss = loss + (torch.sqrt(self.net[0].bias * 0)).sum()
        if is_bad and self.kind == "published":  # on this rank alone, with a finite gradient
            self.terms["bridge"] = term * self.value
        return loss + term * (1 + 0 * self.net[0].bias.sum())

    def last_loss_terms(self):
        return self.terms


class Manual(Poisoned):
    automatic_optimization = False

    def __init__(self, **settings):
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Trail(pl.Callback):
    """Weights and optimizer states after each batch."""

    def __init__(self):
        self.states = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weights = [whole(p).detach().clone() for p in pl_module.parameters()]
        state = {
            (i, key): whole(torch.as_tensor(value)).clone()
            for i, kept in enumerate(trainer.optimizers[0].state.values())
            for key, value in kept.items()
            if value is not None
        }
        self.states[batch_idx + 1] = (weights, state)

    def same(self, one, other):
        return first_difference(self.states[one], self.states[other]) is None


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(folder, task, guard=None, trail=None, **settings):
    """Fit, expecting one warning if a batch is bad; return guard and trail."""
    guard, trail = guard or NonFiniteGuard(), trail or Trail()
    trainer = quiet_trainer(folder, guard, trail, **{"max_steps": 6} | settings)
    trainer.fit(task)
    return guard, trail


def assert_skipped(trail, step):
    """The step changed nothing, and those around it did."""
    assert trail.same(step - 1, step)
    assert not trail.same(step - 2, step - 1)
    assert not trail.same(step, step + 1)
    assert all(weight.isfinite().all() for weight in trail.states[step + 2][0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_step_changes_neither_weights_nor_optimizer_state(tmp_path, optimizer):
    with pytest.warns(UserWarning, match=f"{SKIPS} 3: loss term 'bridge' is not finite"):
        guard, trail = run(tmp_path, Poisoned(optimizer=optimizer))
    assert_skipped(trail, 3)
    assert guard.num_skipped == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("task", [Poisoned, Manual])
def test_automatic_and_manual_optimization_are_guarded(tmp_path, task, value):
    with pytest.warns(UserWarning, match=f"{SKIPS} 3: loss term 'bridge' is"):
        _, trail = run(tmp_path, task(value=value))
    assert_skipped(trail, 3)


def test_a_gradient_is_named_where_the_loss_is_finite(tmp_path):
    with pytest.warns(UserWarning, match=f"{SKIPS} 3: the gradient of net.0.bias is not"):
        _, trail = run(tmp_path, Poisoned(kind="gradient"))
    assert_skipped(trail, 3)


def test_with_accumulation_the_whole_step_is_dropped(tmp_path):
    with pytest.warns(UserWarning, match=f"{SKIPS} 2: loss term"):
        guard, trail = run(tmp_path, Poisoned(), accumulate_grad_batches=2, max_steps=4)
    assert trail.same(2, 4)
    assert not trail.same(4, 6)
    assert guard.num_skipped == 1


def test_a_healthy_run_is_bitwise_the_run_without(tmp_path):
    _, trail = run(tmp_path, Poisoned(bad=()))
    alone = Trail()
    quiet_trainer(tmp_path, alone, max_steps=6).fit(Poisoned(bad=()))
    assert first_difference(trail.states, alone.states) is None


def test_gives_up_after_too_many_in_a_row(tmp_path):
    guard = NonFiniteGuard(max_skips_in_a_row=2)
    sentence = (
        "`max_skips_in_a_row` = 2 was exceeded at step 6: loss term 'bridge' is not finite. L"
    )
    with (
        pytest.warns(UserWarning, match=SKIPS) as caught,
        pytest.raises(FloatingPointError, match=sentence),
    ):
        run(tmp_path, Poisoned(bad=(1, 2, 4, 5, 6)), guard)
    assert sum(SKIPS in str(w.message) for w in caught) == 2  # one for each row of bad steps
    assert guard.num_skipped == 5


def test_counters_are_resumed_and_logged(tmp_path):
    guard = NonFiniteGuard(max_skips_in_a_row=2)
    with pytest.warns(UserWarning, match=SKIPS):
        run(tmp_path, Poisoned(bad=(2, 3)), guard, max_steps=3, logger=CSVLogger(tmp_path, ""))
    guard_state = guard.state_dict()
    resumed = NonFiniteGuard(max_skips_in_a_row=2)
    trainer = quiet_trainer(tmp_path, guard, max_steps=3)
    with pytest.warns(UserWarning, match=SKIPS):
        trainer.fit(Poisoned(bad=(2, 3)))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert guard.state_dict() == guard_state == {"num_skipped": 2, "in_a_row": 2}
    trainer = quiet_trainer(tmp_path, resumed, max_steps=6)
    with pytest.raises(FloatingPointError, match="at step 4"):
        trainer.fit(Poisoned(bad=(4,)), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    (log,) = tmp_path.rglob("metrics.csv")
    assert "non_finite/num_skipped" in log.read_text()


@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
@pytest.mark.parametrize("scale", [2.0**16, 2.0**127])
def test_overflows_are_the_gradient_scalers_own(tmp_path, optimizer, scale):
    """A scale at which the gradients of a finite loss overflow is lowered, and nothing counted."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-60)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    with pytest.warns(UserWarning, match=f"{SKIPS} 5: loss term 'bridge' is"):
        guard, trail = run(tmp_path, Poisoned(bad=(5,), optimizer=optimizer), plugins=plugin)
    assert trail.same(4, 5)
    assert not trail.same(3, 4)
    assert guard.num_skipped == 1


def test_a_scaler_that_cannot_help_is_not_waited_for(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    with pytest.warns(UserWarning, match=f"{SKIPS} 3: the gradient of net.0.bias is"):
        guard, _ = run(tmp_path, Poisoned(kind="gradient"), plugins=plugin)
    assert guard.num_skipped == 1


class Sharded(Poisoned):
    def configure_model(self):
        if not isinstance(self.net[0].weight, DTensor):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


@pytest.mark.parametrize("kind", ["term", "gradient", "published"])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_all_ranks_skip_what_is_bad_on_one(tmp_path, kind, is_sharded):
    strategy = "ddp"
    if is_sharded:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    named = "the gradient of net.0.bias" if kind == "gradient" else "loss term 'bridge'"

    def on_rank():
        task = (Sharded if is_sharded else Poisoned)(rank=1, kind=kind)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            settings = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}
            guard, trail = run(tmp_path, task, **settings)
        messages = " ".join(str(w.message) for w in caught)
        return trail.same(2, 3), trail.same(3, 4), guard.num_skipped, messages, trail.states[6][0]

    first, second = run_ranks(on_rank)
    assert first[:3] == second[:3] == (True, False, 1)
    assert f"{SKIPS} 3: {named} is not finite" in first[3]
    assert SKIPS not in second[3]
    assert first_difference(first[4], second[4]) is None


def test_waits_for_the_device_only_before_the_step(tmp_path, make_trainer):
    class Refusing(NonFiniteGuard):
        def on_before_backward(self, *args):
            with RefuseHostSync():
                super().on_before_backward(*args)

    make_trainer(Refusing()).fit(Poisoned(bad=()))


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="`max_skips_in_a_row` must be >= 0, got -1"):
        NonFiniteGuard(-1)
    assert SkipPolicy().max_skips_in_a_row == 10


def test_a_number_in_place_of_a_nan_loss_would_save_nothing():
    """What the original does, and why a step has to be skipped."""
    weight = torch.ones(2, requires_grad=True)
    torch.nan_to_num((weight * torch.tensor([1.0, torch.nan])).sum(), nan=0.0).backward()
    assert weight.grad.isnan().any()
