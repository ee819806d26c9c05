"""ASSR on two ranks: the same decisions and the same weights, whole or sharded."""

import pytest
import torch

from spectral_lightning.control import Regulator, Thermostat

pytestmark = [
    pytest.mark.distributed,
    # Gloo in torch 2.13 says so at every barrier; Lightning chooses the call.
    pytest.mark.filterwarnings("ignore:.*barrier\\(\\).*device:UserWarning"),
    pytest.mark.filterwarnings("ignore:ASSR finds .* outside their bands at once"),
]

# Every layer is below this floor, so that each is acted on at each step.
ACTING = Regulator(calibration="static", floor=2.0, thermostat=Thermostat(strength=50.0))


@pytest.mark.parametrize("actuator", ["spectral_cap", "log_stable_rank"])
def test_both_ranks_act_as_one_process_does(fit_one, fit_two, actuator):
    changes = {"assr": {"actuator": actuator, "regulator": ACTING}, "logger": False}
    _, weights, metrics = fit_one(**changes)
    _, untouched, _ = fit_one(logger=False)
    assert all(done.num_interventions == 6 for done in metrics["interventions"].values())
    for _, other_weights, other_metrics in fit_two(**changes):
        for name, weight in weights.items():
            assert torch.equal(other_weights[name], weight), name
            assert name.endswith("bias") or not torch.equal(untouched[name], weight), name
        assert other_metrics == metrics


def test_both_ranks_sample_the_same_layers(fit_one, fit_two):
    assr = {"regulator": ACTING, "sample_ratio": 0.5}
    _, weights, metrics = fit_one(assr=assr)
    numbers = {name: done.num_interventions for name, done in metrics["interventions"].items()}
    assert sum(numbers.values()) == 6 * len(numbers) // 2
    for _, other_weights, other_metrics in fit_two(assr=assr):
        assert other_metrics["interventions"] == metrics["interventions"]
        assert all(torch.equal(other_weights[name], weights[name]) for name in weights)


def test_a_resumed_run_acts_as_an_uninterrupted_one(fit_two, tmp_path):
    path, changes = tmp_path / "run.ckpt", {"logger": False, "assr": {"regulator": ACTING}}
    whole = fit_two(**changes)
    fit_two(**changes, max_steps=3, save=path)
    for (_, weights, metrics), resumed in zip(
        whole, fit_two(**changes, ckpt_path=path), strict=True
    ):
        assert resumed[2]["interventions"] == metrics["interventions"]
        assert all(torch.equal(resumed[1][name], weights[name]) for name in weights)
