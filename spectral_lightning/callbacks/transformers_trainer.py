"""Our callbacks under Hugging Face's `transformers.Trainer`.

Lives here: which of its events is which hook, and a view of it that answers what spectral
callbacks ask of a Lightning Trainer. The only file of the callbacks that imports `transformers`,
whose Trainer needs the package `accelerate`.

StableMax in the same Trainer is a matter of the model or the loss, not of a callback:
`spectral_lightning.tasks` has `install_loss(model, ...)`, which the saved model remembers, and
`Trainer(compute_loss_func=stablemax_loss())`.
"""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from spectral_lightning.callbacks.base import SpectralCallback

STATE_FILE = "spectral_callbacks.pt"
"""File in a checkpoint folder that holds the callbacks' state."""


class SpectralTrainerCallback(TrainerCallback):
    """Run spectral callbacks such as `ASSR` and `SpectralMonitor` in a `transformers.Trainer`.

    They see what they see under Lightning: one shared cache, a reading after each optimizer step
    (whatever the gradient accumulation), and act when the optimizer has stepped and gradients are
    cleared. Steps that a gradient scaler skips are left alone. Layers have the model's own names,
    such as ``transformer.h.0.attn.c_attn``.

    Numbers over all layers, such as ``spectral/stable_rank/min``, are added to the rows with the
    loss in `trainer.state.log_history`, one optimizer step late. Those of single layers would swell
    `trainer_state.json`; they go to the `loggers` given here, every `logging_steps`, and to
    ``spectral_history.jsonl`` in the output folder.

    Each checkpoint folder gets a file with the callbacks' state. A resumed run looks for it in
    `resume_from`, in `args.resume_from_checkpoint` and in the output folder, under the step that
    the Trainer resumes at: Trainers do not tell callbacks which folder they resume from.

    Args:
        callbacks: Spectral callbacks, at least one; no two may share a `state_key`.
        loggers: Lightning's loggers, e.g. ``TensorBoardLogger("logs")``.
        resume_from: Checkpoint folder, needed only where it is neither in the output folder nor in
            the arguments.

    Raises:
        TypeError: If a callback is not a spectral one.
        ValueError: If there is no callback, or two have the same state key.

    Example:
        >>> from spectral_lightning.callbacks import ASSR, SpectralMonitor
        >>> adapter = SpectralTrainerCallback(ASSR(), SpectralMonitor(table_rows=0))
        >>> [type(callback).__name__ for callback in adapter.callbacks]
        ['ASSR', 'SpectralMonitor']
    """

    def __init__(
        self,
        *callbacks: SpectralCallback,
        loggers: Iterable[Logger] = (),
        resume_from: str | Path | None = None,
    ) -> None:
        if not callbacks:
            raise ValueError(
                "`callbacks` must be one or more spectral callbacks, got none; give some, such as"
                " ASSR() or SpectralMonitor()."
            )
        for callback in callbacks:
            if not isinstance(callback, SpectralCallback):
                raise TypeError(
                    "`callbacks` must be spectral callbacks, such as ASSR() or SpectralMonitor(),"
                    f" got {callback!r}; others of Lightning need its Trainer."
                )
            if type(callback).on_before_optimizer_step is not Callback.on_before_optimizer_step:
                raise TypeError(
                    f"`callbacks` must not need gradients, got {type(callback).__name__};"
                    " `transformers.Trainer` shows them to no callback, Lightning's Trainer does."
                )
        keys = [callback.state_key for callback in callbacks]
        if len(set(keys)) < len(keys):
            raise ValueError(f"`callbacks` must have different state keys, got {keys}.")
        self.callbacks = callbacks
        self.loggers = tuple(loggers)
        self.resume_from = resume_from
        self._trainer: Any = None  # a `_Trainer`, as a Lightning Trainer
        self._module: Any = None  # a `_Module`, as a LightningModule

    @override
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        if args.deepspeed:
            raise ValueError(
                "`deepspeed` must be off for spectral callbacks, got"
                f" {args.deepspeed!r}: it keeps the weights where they cannot be read."
            )
        assert model is not None
        trainer: Any = _Trainer(args, state, self.loggers, optimizer)
        self._trainer, self._module = trainer, _Module(model, trainer.callback_metrics)
        trainer.count_batches(state.global_step + 1)
        for callback in self.callbacks:
            callback.setup(trainer, self._module, "fit")
        if state.global_step:
            self._restore(args, state)
        for hook in ("on_fit_start", "on_train_start"):
            self._call(hook)

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The optimizer and the schedule have stepped, gradients are cleared, the step is counted.
        self._trainer.count_batches(state.global_step)
        self._call("on_train_batch_end", None, None, 0)

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._trainer is not None and "loss" in (logs or {}):  # not a row of an evaluation
            state.log_history[-1].update(self._trainer.callback_metrics)

    @override
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer is not None:
            self._call("on_validation_end")

    @override
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer is None:
            return
        self._call("on_save_checkpoint", {})
        folder = _checkpoint_folder(args, state)
        if state.is_world_process_zero and folder.is_dir() and not args.save_only_model:
            states = {callback.state_key: callback.state_dict() for callback in self.callbacks}
            torch.save({"step": state.global_step, "callbacks": states}, folder / STATE_FILE)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer is None:
            return
        self._call("on_train_end")
        for logger in self.loggers:
            logger.save()
            logger.finalize("success")
        self._trainer = self._module = None

    def _call(self, hook: str, *args: Any) -> None:
        """Call a hook of all callbacks, one after the other."""
        for callback in self.callbacks:
            getattr(callback, hook)(self._trainer, self._module, *args)

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        """Give the callbacks the state they had at the step that the Trainer resumes at."""
        given = (self.resume_from, args.resume_from_checkpoint)
        folders = [folder for folder in given if isinstance(folder, str | Path)]  # not True
        folders.append(_checkpoint_folder(args, state))
        for path in (Path(folder) / STATE_FILE for folder in folders):
            saved: dict[str, Any] = torch.load(path, weights_only=True) if path.is_file() else {}
            if saved.get("step") == state.global_step:
                break
        else:
            rank_zero_warn(
                f"SpectralTrainerCallback: the run resumes at step {state.global_step} without the"
                f" state of its spectral callbacks: no {STATE_FILE} of this step in"
                f" {', '.join(map(str, folders))}. Give the folder as `resume_from`."
            )
            return
        for callback in self.callbacks:
            if callback.state_key in saved["callbacks"]:
                callback.load_state_dict(saved["callbacks"][callback.state_key])
            else:
                rank_zero_warn(
                    f"SpectralTrainerCallback: {path} holds no state for {callback.state_key},"
                    " which starts afresh."
                )


class _Trainer:
    """What spectral callbacks ask of a Lightning Trainer, answered for Hugging Face's."""

    sanity_checking = False

    def __init__(
        self,
        args: TrainingArguments,
        state: TrainerState,
        loggers: Iterable[Logger],
        optimizer: Optimizer | None,
    ) -> None:
        self._state = state
        self.callback_metrics: dict[str, float] = {}
        self.is_global_zero = state.is_world_process_zero
        self.log_dir = args.output_dir
        self.log_every_n_steps = max(1, int(state.logging_steps))
        self.loggers = [_LogHistory(self.callback_metrics), *loggers]
        self.optimizers = [] if optimizer is None else [_unwrapped(optimizer)]
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0))

    @property
    def global_step(self) -> int:
        return self._state.global_step

    def count_batches(self, number: int) -> None:
        """Set the place of now on the loggers' axis: weights after step 7 stand at 7, as there."""
        self.fit_loop.epoch_loop._batches_that_stepped = number


class _Module:
    """The model in training, and what a callback logs by it."""

    def __init__(self, model: nn.Module, metrics: dict[str, float]) -> None:
        self._model = model
        self._metrics = metrics

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def log(self, name: str, value: float, **kwargs: Any) -> None:
        self._metrics[name] = value


class _LogHistory:
    """A logger that keeps what is of all layers together, for the Trainer's own log."""

    def __init__(self, metrics: dict[str, float]) -> None:
        self._metrics = metrics

    def log_metrics(self, values: dict[str, float], step: int | None = None) -> None:
        together = {name: value for name, value in values.items() if name.count("/") == 1}
        self._metrics.update(together)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps, inside what `accelerate` wraps it in."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
