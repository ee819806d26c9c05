"""Mode switching on two ranks: the same modes, bases and weights, whole or sharded."""

import pytest
import torch
from lightning.pytorch import Callback

from spectral_lightning.callbacks import SVDModeSwitch
from spectral_lightning.control import CalibratedPolicy, ScheduledPolicy, SeedPolicy
from spectral_lightning.testing.distributed import run_ranks
from spectral_lightning.testing.tasks import TinyTask, quiet_trainer

pytestmark = [
    pytest.mark.distributed,
    # Gloo in torch 2.13 says so at every barrier; Lightning chooses the call.
    pytest.mark.filterwarnings("ignore:.*barrier\\(\\).*device:UserWarning"),
]

EAGER = CalibratedPolicy(enter_erosion=0.01, exit_erosion=0.0, patience=1, dwell=0, warmup_steps=0)
LOW = ScheduledPolicy(schedule={1: "lowrank"}, principal=0.25)


def settings(policy, protection="two_sided"):
    svd = {"layers": "net.[25]", "every_n_steps": 1, "policy": policy, "protection": protection}
    return {"svd": svd, "logger": False}


@pytest.mark.parametrize("policy", [LOW, EAGER, SeedPolicy(preset="phase1", warmup_steps=0)])
def test_both_ranks_switch_as_one_process_does(fit_one, fit_two, policy):
    _, weights, metrics = fit_one(**settings(policy))
    (_, first, one), (_, second, two) = fit_two(**settings(policy))
    assert one["modes"] == two["modes"] == metrics["modes"]
    for name, weight in weights.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], weight, atol=1e-5), name
    for name, basis in one["bases"].items():
        assert torch.equal(basis, two["bases"][name])


@pytest.mark.parametrize("protection", ["factored", "legacy"])
def test_factors_stay_equal_on_both_ranks(fit_one, fit_ddp, protection):
    _, weights, _ = fit_one(**settings(LOW, protection))
    (_, first, one), (_, second, two) = fit_ddp(**settings(LOW, protection))
    assert one["modes"] == two["modes"]
    assert first["net.2.left_factor"].any()
    for name, weight in weights.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], weight, atol=1e-4), name


def test_factors_of_sharded_layers_are_refused_with_the_reason(fit_sharded):
    with pytest.raises(UserWarning, match="SVDModeSwitch has no effect"):
        fit_sharded(**settings(LOW, "factored"))


def test_a_resumed_run_switches_as_an_uninterrupted_one(fit_two, tmp_path):
    path, changes = tmp_path / "run.ckpt", settings(EAGER)
    whole = fit_two(**changes)
    fit_two(**changes, max_steps=3, save=path)
    for (_, weights, metrics), resumed in zip(
        whole, fit_two(**changes, ckpt_path=path), strict=True
    ):
        assert resumed[2]["modes"] == metrics["modes"]
        assert all(torch.equal(resumed[1][name], weights[name]) for name in weights)


class Thaw(Callback):
    """Unfreeze a layer in the middle of a run, as fine-tuning callbacks do."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        pl_module.net[2].weight.requires_grad_(True)


def test_a_layer_frozen_when_ddp_wrapped_the_model_is_refused_once_it_trains(tmp_path):
    def on_rank():
        task = TinyTask()
        task.net[2].weight.requires_grad_(False)
        callbacks = (SVDModeSwitch(every_n_steps=1, policy=LOW), Thaw())
        trainer = quiet_trainer(
            tmp_path,
            *callbacks,
            strategy="ddp",
            devices=2,
            max_steps=4,
            use_distributed_sampler=False,
        )
        trainer.fit(task)

    with pytest.raises(RuntimeError, match=r"cannot switch net\.2: it was frozen when DDP wrapped"):
        run_ranks(on_rank)


def test_sharded_muon_steps_as_one_process_does(fit_one, fit_sharded):
    """Within the tolerance of Newton-Schulz in float32, with and without protected layers."""
    for changes in ({"logger": False}, settings(LOW)):
        _, weights, _ = fit_one(muon=True, **changes)
        for _, sharded, _ in fit_sharded(muon=True, **changes):
            for name, weight in weights.items():
                assert torch.allclose(sharded[name], weight, atol=1e-4), name
