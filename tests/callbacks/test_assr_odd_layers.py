"""Layers and settings that ASSR cannot regulate: named, never silently passed over."""

import math

import pytest
import torch
from torch import nn

from spectral_lightning.callbacks import ASSR
from spectral_lightning.control import CalibrationWindow, Regulator, Thermostat
from spectral_lightning.testing.models import plant_spike_, relative_stable_rank
from spectral_lightning.testing.tasks import TinyTask

pytestmark = pytest.mark.filterwarnings("ignore:ASSR finds .* outside their bands at once")


def static(floor=0.8, **settings):
    return Regulator(calibration="static", floor=floor, **settings)


def with_spike(task, size):
    """Give `net.2` a rank-one spike of `size` times its spectral norm."""
    plant_spike_(task.net[2].weight, size)
    return task


def test_frozen_and_computed_layers_are_measured_and_left_alone(fit):
    task = TinyTask()
    task.net[2].weight.requires_grad_(False)
    nn.utils.parametrizations.weight_norm(task.net[5])
    assr = ASSR(regulator=static(2.0))
    fit(assr, task=task)
    assert set(assr.interventions) == {"net.0", "net.7"}
    assert {"net.2", "net.5"} <= set(assr.names)


def test_a_layer_of_rank_one_is_named_and_left_alone(fit):
    class Frozen(TinyTask):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.0)

    task = Frozen()
    weight = task.net[2].weight.data
    weight.copy_(torch.outer(torch.ones(40), torch.arange(40.0) + 1) / 40)
    before = weight.clone()
    assr = ASSR("net.2", regulator=static(0.5))
    with pytest.warns(UserWarning, match="net.2 is exactly of rank one, and no step can revive it"):
        fit(assr, task=task)
    assert torch.equal(weight, before)
    assert assr.interventions["net.2"].num_interventions == 0


def test_a_weight_that_breaks_is_skipped_counted_and_named(fit, after_step):
    def damage(trainer):
        if trainer.global_step == 3:
            trainer.lightning_module.net[2].weight.data[0, 0] = math.nan

    assr = ASSR("net.2", regulator=static(2.0))
    with pytest.warns(UserWarning, match="net.2 is skipped, as the weight has a NaN"):
        fit(assr, after_step(damage), task=TinyTask(num_batches=10), max_steps=8)
    assert assr.interventions["net.2"].num_skipped > 0


def test_a_layer_that_starts_at_zero_is_held_until_it_moves(fit):
    task = TinyTask()
    nn.init.zeros_(task.net[7].weight)
    assr = ASSR(regulator=static(0.01))
    fit(assr, task=task)  # a warning would be an error
    assert torch.isfinite(task.net[7].weight).all()
    assert task.net[7].weight.any()
    assert assr.interventions["net.7"].num_skipped == 0


def test_bf16_weights_are_warned_about_and_still_move(fit):
    task = with_spike(TinyTask(num_batches=100, lr=1e-3), 4.0)
    assr = ASSR("net.2", regulator=static(0.3, thermostat=Thermostat(strength=30.0)))
    with pytest.warns(UserWarning, match="ASSR acts on 1 layers in half precision"):
        fit(assr, task=task, max_steps=100, precision="bf16-true")
    assert relative_stable_rank(task.net[2].weight) > 0.25


def test_a_run_that_ends_before_calibration_says_so(fit):
    with pytest.warns(UserWarning, match="the run ended before they were calibrated"):
        fit(ASSR())


def test_a_checkpoint_of_another_model_is_refused(fit, make_trainer, tmp_path):
    trainer = fit(ASSR("net.0", regulator=static(2.0)))
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    path = tmp_path / "other.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    states = checkpoint["callbacks"]
    (key,) = (key for key in states if key.startswith("ASSR"))
    states[key]["layers"] = {"model.encoder": states[key]["layers"]["net.0"]}
    torch.save(checkpoint, path)
    again = make_trainer(ASSR("net.0", regulator=static(2.0)), max_steps=8)
    with pytest.raises(ValueError, match="ASSR state must be of this model, got layers such as"):
        again.fit(TinyTask(), ckpt_path=path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"actuator": "l2"}, "`actuator` must be one of spectral_cap, log_stable_rank, legacy_l2"),
        ({"max_relative_step": 0.0}, r"`max_relative_step` must be in \(0, 1\], got 0.0"),
        ({"sample_ratio": 1.5}, r"`sample_ratio` must be in \(0, 1\], got 1.5"),
        ({"num_vectors": 0}, "`num_vectors` must be >= 1, got 0"),
        ({"table_rows": -1}, "`table_rows` must be >= 0, got -1"),
        ({"log_every_n_steps": 0}, "`log_every_n_steps` must be >= 1, got 0"),
        ({"every_n_steps": 0}, "`every_n_steps` must be >= 1, got 0"),
    ],
)
def test_a_wrong_argument_is_refused_at_construction(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        ASSR(**arguments)


def test_settings_that_cannot_work_together_are_refused():
    with pytest.raises(ValueError, match="`ceiling` needs an actuator that can lower"):
        ASSR(actuator="spectral_cap", regulator=static(0.1, ceiling=2.0))
    with pytest.raises(ValueError, match="`condition_ceiling` needs exact spectra"):
        ASSR(regulator=static(0.1, condition_ceiling=10.0), spectrum_every_n_steps=None)
    with pytest.raises(ValueError, match=r"`floor` must be below `ceiling`, got 0.5 and 0.1"):
        static(0.5, ceiling=0.1)
    with pytest.raises(ValueError, match="`calibration='static'` needs a `floor`"):
        Regulator(calibration="static")
    with pytest.raises(ValueError, match="`calibration` must be 'window' or 'static', got 'warm'"):
        Regulator(calibration="warm")
    with pytest.raises(ValueError, match="`strength` must be >= 0 and finite, got -1"):
        Thermostat(strength=-1)
    with pytest.raises(ValueError, match=r"`ratio` must be in \(0, 1\), got 1.5"):
        CalibrationWindow(ratio=1.5)
