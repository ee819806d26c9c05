"""What every callback must keep, as a class of tests to inherit.

    class TestSpectralMonitor(MeasurementContract):
        callback_class = SpectralMonitor
        init_args = {"every_n_steps": 2}

pytest collects the inherited tests; this module itself does not need pytest.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI

from spectral_lightning.callbacks import SpectralCallback
from spectral_lightning.testing.differences import first_difference
from spectral_lightning.testing.tasks import (
    TinySteps,
    TinyTask,
    quiet_settings,
    quiet_trainer,
)

_NUM_STEPS = 6


class CallbackContract:
    """Tests of one callback class, on `TinyTask` or another task with 6 or more batches.

    Attributes:
        callback_class: Class under test.
        init_args: Arguments to construct it with, as they would stand in YAML. Intervals should
            be small, as the runs take six optimizer steps.
        yaml_args: The same arguments as YAML has them, where those differ (nested objects).
        layers: Two globs that select different layers of the task.
    """

    callback_class: ClassVar[type[SpectralCallback]]
    init_args: ClassVar[Mapping[str, Any]] = {}
    yaml_args: ClassVar[Mapping[str, Any]] = {}
    layers: ClassVar[tuple[str, str]] = ("net.2", "net.[57]")

    def make(self, **changes: Any) -> SpectralCallback:
        """Return a callback with `init_args`, some of them changed."""
        return self.callback_class(**{**self.init_args, **changes})

    def make_task(self, **settings: Any) -> pl.LightningModule:
        """Return a fresh task whose initial weights are always the same."""
        return TinyTask(**settings)

    def fit(
        self, folder: Path, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any
    ) -> pl.LightningModule:
        """Fit a fresh task for six steps, or as the settings of the Trainer say."""
        task = self.make_task()
        trainer = quiet_trainer(folder, *callbacks, **{"max_steps": _NUM_STEPS, **settings})
        # A state of plain containers and tensors loads without running code of the checkpoint.
        trainer.fit(task, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return task

    def test_acts_once_per_due_step_under_accumulation(self, tmp_path: Path) -> None:
        """Microbatches are not steps; a short last window of an epoch is one."""
        for every_n_steps in (1, 2):
            callback = self.make(every_n_steps=every_n_steps)
            acted: list[int] = []
            _spy_on_readings(callback, acted)
            # 6 batches in windows of 4: two steps in an epoch, the second of them short.
            self.fit(tmp_path, callback, accumulate_grad_batches=4)
            intervals = {every_n_steps, callback.spectrum_every_n_steps or every_n_steps}
            expected = {step for n in intervals for step in range(0, _NUM_STEPS, n)}
            _expect_same("steps acted on", acted, sorted(expected))

    def test_resume_equals_uninterrupted(self, tmp_path: Path) -> None:
        """A run resumed from any checkpoint has the weights, readings and state of one that ran."""
        for every_n_steps in (1, 2):
            folder = tmp_path / str(every_n_steps)
            whole = self.make(every_n_steps=every_n_steps)
            expected = self.fit(folder, whole, _SaveEveryStep(folder))
            for step in (1, 3):
                resumed = self.make(every_n_steps=every_n_steps)
                task = self.fit(folder, resumed, ckpt_path=folder / f"{step}.ckpt")
                _expect_same("weights", task.state_dict(), expected.state_dict())
                _expect_same("readings", _readings(resumed), _readings(whole))
                _expect_same("state", resumed.state_dict(), whole.state_dict())

    def test_a_run_that_ended_can_go_on(self, tmp_path: Path) -> None:
        """A checkpoint saved after `fit` continues as if the run had not ended.

        The last step of a fit is measured in any case, so here all are.
        """
        whole, first, second = (self.make(every_n_steps=1) for _ in range(3))
        expected = self.fit(tmp_path, whole)
        trainer = quiet_trainer(tmp_path, first, max_steps=3)
        trainer.fit(self.make_task())
        trainer.save_checkpoint(tmp_path / "ended.ckpt")
        task = self.fit(tmp_path, second, ckpt_path=tmp_path / "ended.ckpt")
        _expect_same("weights", task.state_dict(), expected.state_dict())
        _expect_same("readings", _readings(second), _readings(whole))

    def test_yaml_builds_the_same_callback(self, tmp_path: Path) -> None:
        """`class_path` and `init_args` build it, and the saved configuration builds it again."""
        config = tmp_path / "config.yaml"
        arguments = {**self.init_args, **self.yaml_args}
        class_path = f"{self.callback_class.__module__}.{self.callback_class.__qualname__}"
        entry = {"class_path": class_path, "init_args": {"layers": "net.2", **arguments}}
        trainer = quiet_settings(tmp_path, max_steps=2) | {"callbacks": [entry]}
        config.write_text(json.dumps({"trainer": trainer}))  # which is YAML as well
        for _ in range(2):
            cli = _parse(config)
            callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
            (callback,) = (c for c in callbacks if isinstance(c, self.callback_class))
            for name, value in {"layers": "net.2", **self.init_args}.items():
                _expect(f"the same `{name}`", getattr(callback, name) == value, callback)
            config.write_text(cli.parser.dump(cli.config))
        cli.trainer.fit(self.make_task())
        _expect_same("layers", list(callback.names), ["net.2"])

    def test_two_instances_have_their_own_layers_and_states(self, tmp_path: Path) -> None:
        """Instances on different layers share the cache, and a checkpoint keeps both."""
        both = [self.make(layers=layers) for layers in self.layers]
        path = tmp_path / "run.ckpt"
        trainer = quiet_trainer(tmp_path, *both, max_steps=3)
        trainer.fit(self.make_task())
        trainer.save_checkpoint(path)
        names = [set(callback.names) for callback in both]
        _expect("different layers", all(names) and names[0].isdisjoint(names[1]), names)
        _expect("one cache", both[0].spectra is both[1].spectra, both)
        resumed = [self.make(layers=layers) for layers in self.layers]
        self.fit(tmp_path, *resumed, ckpt_path=path)
        whole = [self.make(layers=layers) for layers in self.layers]
        self.fit(tmp_path, *whole)
        for one, other in zip(resumed, whole, strict=True):
            _expect_same("readings", _readings(one), _readings(other))

    def test_two_cost_what_the_more_demanding_one_costs(self, tmp_path: Path) -> None:
        """Needs are joined: a second callback on the same layers adds no decomposition."""
        bills = []
        for intervals in ((1,), (1, 2), (2, 1)):
            callbacks = [self.make(every_n_steps=every_n_steps) for every_n_steps in intervals]
            self.fit(tmp_path, *callbacks)
            bills.append(callbacks[0].spectra.num_decompositions)
        _expect_same("decompositions", bills[1:], bills[:1] * 2)

    def test_no_logger_writes_no_file(self, tmp_path: Path) -> None:
        """Without a logger there is no folder of logs, so nothing is written anywhere."""
        callback = self.make()
        self.fit(tmp_path, callback, logger=False)
        _expect_same("files", [path.name for path in tmp_path.rglob("*")], [])
        _expect("readings", bool(_readings(callback)), callback)

    def test_fast_dev_run_writes_no_file(self, tmp_path: Path) -> None:
        """`fast_dev_run` runs one batch of everything and leaves nothing behind."""
        callback = self.make()
        self.fit(tmp_path, callback, fast_dev_run=True, limit_val_batches=1, logger=True)
        _expect_same("files", [path.name for path in tmp_path.rglob("*")], [])
        _expect("readings", bool(_readings(callback)), callback)

    def test_evaluation_measures_nothing(self, tmp_path: Path) -> None:
        """`validate` and `test` leave the callback as it was, before a fit and after it."""
        callback = self.make()
        trainer = quiet_trainer(tmp_path, callback, max_steps=2, limit_val_batches=1)
        trainer.validate(self.make_task(), verbose=False)
        trainer.test(self.make_task(), verbose=False)
        _expect_same("layers", callback.names, ())
        trainer.fit(self.make_task())
        before = callback.state_dict(), callback.spectra.num_decompositions
        trainer.validate(self.make_task(), verbose=False)
        trainer.test(self.make_task(), verbose=False)
        _expect_same("state", (callback.state_dict(), callback.spectra.num_decompositions), before)

    def test_a_second_fit_starts_afresh(self, tmp_path: Path) -> None:
        """A callback used again has the readings of the new run only, as a new one would."""
        used, fresh = self.make(), self.make()
        acted: list[int] = []
        self.fit(tmp_path, used, max_steps=1)
        _spy_on_readings(used, acted)
        self.fit(tmp_path, used)
        self.fit(tmp_path, fresh)
        _expect_same("readings", _readings(used), _readings(fresh))
        _expect_same("state", used.state_dict(), fresh.state_dict())
        _expect("the first step", acted[:1] == [0], acted)

    def test_a_glob_without_a_match_is_refused_before_training(self, tmp_path: Path) -> None:
        """The user learns at once which layers there are."""
        task = self.make_task()
        before = {name: value.clone() for name, value in task.state_dict().items()}
        try:
            quiet_trainer(tmp_path, self.make(layers="nett.*"), max_steps=2).fit(task)
        except ValueError as error:
            expected = "`layers` must match at least one weight matrix, got 'nett.*'; the model has"
            _expect("the sentence", expected in str(error), error)
        else:
            raise AssertionError("a glob without a match was accepted")
        _expect_same("weights", task.state_dict(), before)

    def test_works_in_the_older_package(self, tmp_path: Path) -> None:
        """`pytorch_lightning` has other classes of the same names."""
        import pytorch_lightning

        class Task(TinySteps, pytorch_lightning.LightningModule):
            def __init__(self, like: pl.LightningModule) -> None:
                super().__init__()
                self.net, self.num_batches, self.lr = like.get_submodule("net"), 6, 0.01

        callback, other = self.make(), self.make()
        settings = quiet_settings(tmp_path, callback, max_steps=_NUM_STEPS)
        pytorch_lightning.Trainer(**settings).fit(Task(self.make_task()))
        self.fit(tmp_path, other)
        _expect_same("readings", _readings(callback), _readings(other))


class MeasurementContract(CallbackContract):
    """Tests of a callback that only measures: the run is bitwise the run without it."""

    precisions: ClassVar[tuple[Any, ...]] = ("32-true", "bf16-mixed", "bf16-true", "64-true")

    def test_the_run_is_bitwise_the_run_without_it(self, tmp_path: Path) -> None:
        """Weights, losses and the global random state agree, with dropout, at each precision."""
        for precision in self.precisions:
            runs = []
            for callbacks in ((), (self.make(),)):
                losses = _Losses()
                torch.manual_seed(0)
                task = self.make_task(dropout=0.3)
                trainer = quiet_trainer(
                    tmp_path, *callbacks, losses, max_steps=_NUM_STEPS, precision=precision
                )
                trainer.fit(task)
                runs.append((task.state_dict(), losses.values, torch.get_rng_state()))
            _expect_same(f"the run at {precision}", runs[1], runs[0])


def _parse(config: Path) -> LightningCLI:
    """Build what a configuration says, as the command line would."""
    with patch.object(sys, "argv", ["fit", "--config", str(config)]):
        return LightningCLI(
            TinyTask, run=False, save_config_callback=None, seed_everything_default=False
        )


class _SaveEveryStep(Callback):
    """Save a checkpoint when `ModelCheckpoint` would, but keep no state of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class _Losses(Callback):
    """Keep the loss of every batch."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        self.values.append(outputs["loss"].clone())


def _spy_on_readings(callback: SpectralCallback, steps: list[int]) -> None:
    """Note every step that the callback acts on."""
    act: Callable[[pl.Trainer, pl.LightningModule, int], None] = callback.on_readings

    def on_readings(trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        steps.append(step)
        act(trainer, pl_module, step)

    callback.on_readings = on_readings  # type: ignore[method-assign]


def _readings(callback: SpectralCallback) -> dict[str, Any]:
    return {name: asdict(callback.spectra[name]) for name in callback.names}


def _expect(what: str, holds: bool, got: Any) -> None:
    if not holds:
        raise AssertionError(f"{what} expected, got {got!r}")


def _expect_same(what: str, got: Any, expected: Any) -> None:
    difference = first_difference(got, expected)
    if difference is not None:
        raise AssertionError(f"{what} differ: {difference}")
