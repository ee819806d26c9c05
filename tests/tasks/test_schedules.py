import warnings

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR, ReduceLROnPlateau

from spectral_lightning.tasks.schedules import RunSchedule
from spectral_lightning.testing.tasks import TinyTask


class Scheduled(TinyTask):
    """The tiny task with a schedule; writes its learning rates down."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.rates = schedule, []

    def configure_optimizers(self):
        return self.schedule.with_optimizer(self.trainer, SGD(self.parameters(), lr=1.0))

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def rates(make_trainer, schedule, **settings):
    task = Scheduled(schedule)
    make_trainer(**settings).fit(task)
    return task.rates


def test_a_share_of_the_run_is_a_number_of_optimizer_steps(make_trainer):
    share = RunSchedule(None, 0.4, 0.5, 0.0)
    steps = RunSchedule(None, 4, 0.5, 0.0)
    settings = {"max_steps": 10, "accumulate_grad_batches": 2}
    found = rates(make_trainer, share, **settings)
    assert found == rates(make_trainer, steps, **settings)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_one_is_one_step_and_not_the_whole_run(make_trainer):
    found = rates(make_trainer, RunSchedule(None, 1, 0.5, 0.0), max_steps=4)
    assert found == pytest.approx([1, 1, 1, 0.5])


def test_a_share_in_a_run_without_end_is_refused(make_trainer):
    with pytest.raises(ValueError, match="`warmup_steps` must be 0 in a run without an end, got"):
        rates(make_trainer, RunSchedule(None, 0.1, 0.0, 0.0))


def test_steps_in_a_run_without_end_are_taken(make_trainer):
    found = rates(make_trainer, RunSchedule(None, 2, 0.0, 0.0), max_time={"seconds": 0.2})
    assert found[:3] == [0.5, 1.0, 1.0][: len(found)]


def test_a_plateau_watches_the_validation_loss(make_trainer):
    schedule = RunSchedule(ReduceLROnPlateau, 0, 0.0, 0.0)
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    found = schedule.with_optimizer(make_trainer(), optimizer)
    assert found["monitor"] == "valid/loss"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-0.1, 0.0, 0.0), "`warmup_steps` must be >= 0, got -0.1"),
        ((1.5, 0.0, 0.0), "`warmup_steps` must be a whole number, or a share"),
        ((0, 1.1, 0.0), r"`warmdown_fraction` must be in \[0, 1\], got 1.1"),
        ((0, 0.0, -1.0), r"`final_fraction` must be in \[0, 1\], got -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RunSchedule(None, *settings)


def test_a_warmup_beside_a_scheduler_has_no_effect_and_says_so():
    with pytest.warns(UserWarning, match="`warmup_steps` has no effect"):
        RunSchedule(ConstantLR, 5, 0.0, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RunSchedule(ConstantLR, 0, 0.0, 0.0)
