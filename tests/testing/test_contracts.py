"""A contract is worth something only if it is broken by callbacks that break it."""

import pytest
import torch

from spectral_lightning.callbacks import SpectralCallback
from spectral_lightning.testing.contracts import MeasurementContract


class Forgetful(SpectralCallback):
    """Does not save the warm starts."""

    def state_dict(self):
        return {"acted": self._acted}


class Greedy(SpectralCallback):
    """Measures for itself."""

    def on_readings(self, trainer, pl_module, step):
        for name in self.names:
            self.spectra.forget(name)
        self.spectra.measure(trainer.global_step)


class Eager(SpectralCallback):
    """Acts on every batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.on_readings(trainer, pl_module, trainer.global_step)


class Random(SpectralCallback):
    """Draws from the global random state."""

    def on_readings(self, trainer, pl_module, step):
        torch.rand(1)


class Heavy(SpectralCallback):
    """Moves a weight."""

    def on_readings(self, trainer, pl_module, step):
        pl_module.net[2].weight.data[0, 0] += 1e-6


class Stateful(SpectralCallback):
    """Takes an argument that it does not keep."""

    def __init__(self, layers="*", every_n_steps=1, extra=1):
        super().__init__(layers, every_n_steps)
        self.extra = 2 * extra


class Writing(SpectralCallback):
    """Writes into the current folder of the Trainer without being asked."""

    def on_readings(self, trainer, pl_module, step):
        with open(f"{trainer.default_root_dir}/log.txt", "w") as file:
            file.write("here")


class Careless(SpectralCallback):
    """Measures at the start of a validation."""

    def on_validation_start(self, trainer, pl_module):
        if self._cache is not None:
            self.spectra.forget("net.2")
            self.spectra.measure(trainer.global_step, everything=True)


@pytest.mark.parametrize(
    ("broken", "test", "message"),
    [
        (Forgetful, "test_resume_equals_uninterrupted", "readings differ"),
        (Greedy, "test_two_cost_what_the_more_demanding_one_costs", "decompositions differ"),
        (Eager, "test_acts_once_per_due_step_under_accumulation", "steps acted on differ"),
        (Random, "test_the_run_is_bitwise_the_run_without_it", "the run at 32-true differ"),
        (Heavy, "test_the_run_is_bitwise_the_run_without_it", "the run at 32-true differ"),
        (Stateful, "test_yaml_builds_the_same_callback", "the same `extra`"),
        (Writing, "test_no_logger_writes_no_file", "files differ"),
        (Careless, "test_evaluation_measures_nothing", "state differ"),
    ],
)
def test_a_broken_callback_is_found_out(tmp_path, broken, test, message):
    class Contract(MeasurementContract):
        callback_class = broken
        init_args = {"extra": 3} if broken is Stateful else {}

    with pytest.raises(AssertionError, match=message):
        getattr(Contract(), test)(tmp_path)
