"""What all spectral callbacks share: steps, selection, the cache, names.

The one place that knows which hook means what. Works under `lightning.pytorch.Trainer` and
`pytorch_lightning.Trainer` alike, so it looks at attributes and never at classes of either.
"""

from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from spectral_lightning.spectra import Need, SpectrumCache, find_targets, is_due

_CACHES: WeakKeyDictionary[Any, SpectrumCache] = WeakKeyDictionary()


class SpectralCallback(pl.Callback):
    """Base of all callbacks that read spectra: override `on_readings`, and `on_weights` to act.

    Finds the layers when the model is complete, joins what it needs to the Trainer's one shared
    cache, and calls `on_readings` once for each optimizer step that is due, whatever the gradient
    accumulation, also after a resume. Readings arrive after the *next* optimizer step, on every
    device (`SpectrumCache`), so that the training step never waits for them. Several optimizer
    steps in one batch, as in manual optimization, are followed by one reading.

    Args:
        layers: Glob, or several, over layer names such as ``"model.blocks.*.mlp.*"``.
        every_n_steps: Optimizer steps between two readings, at least 1.
        spectrum_every_n_steps: Optimizer steps between two exact spectra; None for never.
        embeddings: Whether embedding tables are measured too.
        splits: Fused projections to take apart: glob to ``{part: number of output rows}``.

    Raises:
        ValueError: If an interval is below 1.
    """

    def __init__(
        self,
        layers: str | list[str] = "*",
        every_n_steps: int = 1,
        spectrum_every_n_steps: int | None = None,
        embeddings: bool = False,
        splits: dict[str, dict[str, int]] | None = None,
    ) -> None:
        self.layers = layers
        self.every_n_steps = every_n_steps
        self.spectrum_every_n_steps = spectrum_every_n_steps
        self.embeddings = embeddings
        self.splits = splits
        self._cache: SpectrumCache | None = None
        self._owns_cache = False
        self._saved_cache: dict[str, Any] | None = None
        self._claimed = 0
        self._acted: int | None = None
        self._names: tuple[str, ...] = ()
        self._needs(frozenset())  # checks the intervals at construction

    @property
    @override
    def state_key(self) -> str:
        """Key of this instance's state in a checkpoint: what it measures, and how often."""
        return self._generate_state_key(layers=self.layers, every_n_steps=self.every_n_steps)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers that this callback reads, once training has begun."""
        return self._names

    @property
    def spectra(self) -> SpectrumCache:
        """The Trainer's shared cache, once training has begun."""
        if self._cache is None:
            raise RuntimeError(
                f"`{type(self).__name__}` must be used in a Trainer that has begun to fit; "
                "it has no readings before."
            )
        return self._cache

    def on_readings(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Act on the readings of a step that was due, which are now in `self.spectra`.

        Called in the weights phase, one optimizer step after the readings were taken.

        Args:
            trainer: Trainer.
            pl_module: Module in training.
            step: Optimizer step after which the weights were read.
        """

    def on_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Change weights: called once per batch that stepped, in the weights phase, after readings.

        Args:
            trainer: Trainer; `trainer.global_step` steps are done.
            pl_module: Module in training.
        """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":  # what an earlier fit left must not reach this one
            _CACHES.pop(trainer, None)
            self._cache = self._saved_cache = self._acted = None
            self._names = ()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = find_targets(pl_module, self.layers, embeddings=self.embeddings, splits=self.splits)
        self._owns_cache = trainer not in _CACHES
        self._cache = _CACHES.setdefault(trainer, SpectrumCache())
        self._names = tuple(target.name for target in found.targets)
        for need in self._needs(frozenset(self._names)):
            self._cache.declare(need, found.targets)
        for name, reason in found.skipped.items():
            rank_zero_info(f"{type(self).__name__}: {name} is not measured, since it {reason}.")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._saved_cache is not None:
            self.spectra.load_state_dict(self._saved_cache)
            self._saved_cache = None
        self._claimed = trainer.global_step
        # A resumed run has its readings; more of them would move its warm starts.
        self.spectra.measure(trainer.global_step, everything=not self.spectra)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step == self._claimed:
            return  # gradients are still being accumulated
        self._claimed = step
        self.spectra.measure(step)
        arrived = self.spectra.delivered_step
        if arrived is not None and self._is_due(arrived):
            self.on_readings(trainer, pl_module, arrived)
            self._acted = arrived
        self.on_weights(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.spectra.measure(trainer.global_step, everything=True, all_spectra=True)
        self.spectra.flush()

    @override
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"acted": self._acted}
        if self._cache is not None and self._owns_cache:
            state["spectra"] = self._cache.state_dict()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._acted = state_dict["acted"]
        self._saved_cache = state_dict.get("spectra")

    def _is_due(self, step: int) -> bool:
        needs = self._needs(frozenset())
        return any(is_due(need.every_n_steps, step, self._acted) for need in needs)

    def _needs(self, names: frozenset[str]) -> list[Need]:
        """Spectral norms at their interval, and again with each exact spectrum."""
        slow = self.spectrum_every_n_steps
        needs = [Need(names=names, every_n_steps=self.every_n_steps, spectrum_every_n_steps=slow)]
        return needs if slow is None else [*needs, Need(names=names, every_n_steps=slow)]


def other_callbacks(own: SpectralCallback, trainer: pl.Trainer) -> list[SpectralCallback]:
    """The other spectral callbacks of a Trainer."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if isinstance(c, SpectralCallback) and c is not own]


def log_interval(trainer: pl.Trainer, own: int | None) -> int:
    """Optimizer steps between two entries in loggers: a callback's own number, or the Trainer's."""
    return trainer.log_every_n_steps if own is None else own  # type: ignore[attr-defined]


def num_batches(trainer: pl.Trainer) -> int:
    """Batches that stepped: the axis of all loggers, where `global_step` counts optimizers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def boards(trainer: pl.Trainer) -> list[Any]:
    """TensorBoard writers among the loggers of this process."""
    if not trainer.is_global_zero:
        return []
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [e for e in experiments if hasattr(e, "add_custom_scalars")]


def shared_layers(who: str, saved: set[str], present: set[str]) -> set[str]:
    """Layers of a checkpoint that the model has; warns of those that only one of them has.

    Raises:
        ValueError: If they have none in common.
    """
    if saved and saved.isdisjoint(present):
        raise ValueError(
            f"The checkpoint's {who} state must be of this model, got layers such as"
            f" {min(saved)!r} where the model has {min(present, default=None)!r}; start without"
            " `ckpt_path`."
        )
    for kind, names in {"new": present - saved, "gone": saved - present}.items():
        if saved and names:
            rank_zero_warn(
                f"{who}: {len(names)} layers, such as {min(names)}, are {kind} since the"
                " checkpoint was written; new ones begin from here on."
            )
    return saved & present
