import math
import os
import signal

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from spectral_lightning.callbacks import SpectralMonitor
from spectral_lightning.spectra import read_history
from spectral_lightning.testing.distributed import run_ranks
from spectral_lightning.testing.tasks import TinyTask


class KillAt(pl.Callback):
    """Kill the process when the next batch begins after an optimizer step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def fit_saving(fit, tmp_path):
    """Fit with a checkpoint every three steps and all files in one folder."""

    def run(name, *callbacks, resume_at=None):
        folder = tmp_path / name
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
        fit(
            SpectralMonitor(spectrum_every_n_steps=2),
            *callbacks,
            saver,
            max_steps=10,
            logger=TensorBoardLogger(folder, name="", version=""),
            enable_checkpointing=True,
            ckpt_path=None if resume_at is None else folder / f"step={resume_at}.ckpt",
        )
        return read_history(folder / "spectral_history.jsonl")

    return run


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("seconds", [0, 10], ids=["every line written", "lines in memory"])
@pytest.mark.parametrize(("kill_at", "saved_at"), [(3, 3), (5, 3), (9, 9)])
def test_a_killed_run_resumed_has_the_history_of_one_that_was_not(
    fit_saving, monkeypatch, kill_at, saved_at, seconds
):
    monkeypatch.setattr("spectral_lightning.spectra.history._FLUSH_SECONDS", seconds)
    with pytest.raises(RuntimeError, match="exit code -9"):
        run_ranks(fit_saving, "killed", KillAt(kill_at), num_ranks=1)
    resumed, whole = fit_saving("killed", resume_at=saved_at), fit_saving("whole")
    assert [entry.step for entry in resumed] == list(range(11))
    assert resumed == whole


def test_a_failed_run_keeps_its_history(fit, after_step, tmp_path):
    def fail(trainer):
        if trainer.global_step == 3:
            raise ArithmeticError("the loss is NaN")

    logger = TensorBoardLogger(tmp_path, name="", version="")
    with pytest.raises(ArithmeticError, match="the loss is NaN"):
        fit(SpectralMonitor(), after_step(fail), logger=logger)
    history = read_history(tmp_path / "spectral_history.jsonl")
    assert [entry.step for entry in history] == [0, 1, 2]


def test_a_warning_is_not_repeated_after_a_resume(fit, after_step, tmp_path):
    def broken():
        task = TinyTask()
        task.net[7].weight.data.fill_(math.nan)
        return task

    with pytest.warns(UserWarning, match="could not measure net.7 at step 0"):
        trainer = fit(SpectralMonitor("net.7"), task=broken(), max_steps=2)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    # Any warning is an error here.
    fit(SpectralMonitor("net.7"), task=broken(), ckpt_path=tmp_path / "run.ckpt")


def test_a_new_fit_warns_again(fit):
    monitor = SpectralMonitor("net.7")
    for _ in range(2):
        task = TinyTask()
        task.net[7].weight.data.fill_(math.nan)
        with pytest.warns(UserWarning, match="could not measure net.7 at step 0"):
            fit(monitor, task=task)
