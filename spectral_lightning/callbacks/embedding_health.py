"""Embedding health: watch representations in training, and warn before they collapse.

Lives here: hooks, logs, warnings. Does not live here: what is measured of embeddings (`spectra`),
and when it is too little or too much (`control`).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from spectral_lightning.callbacks.base import num_batches
from spectral_lightning.callbacks.embedding_readings import (
    PublishesRepresentations,
    embeddings_of,
    gates_of,
    gathered_rows,
    gradient_norm,
    mean_over_ranks,
)
from spectral_lightning.control.collapse_watch import CollapseState, CollapseVerdict, CollapseWatch
from spectral_lightning.control.explosion_watch import ExplosionState, ExplosionWatch
from spectral_lightning.spectra import is_due
from spectral_lightning.spectra.embeddings import (
    EmbeddingBuffer,
    EmbeddingLaunch,
    alignment,
    launch_embeddings,
)

_SPREAD = CollapseWatch()
_RANK = CollapseWatch(level=0.05, floor=0.1)  # of what the effective rank is above 1


class EmbeddingHealth(pl.Callback):
    """Measure the embeddings of a training run, and warn before they collapse.

    Works with any task that is a `PublishesRepresentations`. Keeps the latest `buffer` embeddings
    of one head, over all ranks, and every `every_n_steps` logs of them under ``embedding/``:
    ``mean_cosine`` of different texts, ``uniformity`` and ``alignment`` (Wang and Isola 2020),
    ``effective_rank`` about the mean (Roy and Vetterli 2007), ``rankme`` (Garrido et al. 2023),
    ``spectral_entropy`` in nats, and ``std``, the mean over dimensions; the ``gradient_norm``
    before clipping; ``anomaly_std``; and ``gate/<layer>`` of a model that `PublishesGates`.

    Warns once for each episode, with step, value and threshold, if embeddings are on their way to
    become equal or to lie in few directions, compared with the best of this run (`CollapseWatch`);
    and if a gradient norm is out of line with those before (`ExplosionWatch`), where the norm of
    every step is looked at. What a gradient scaler skips does not count.

    The run itself is not changed, and the host does not wait for the device: what was measured is
    looked at one optimizer step later, and the eigenvalues are taken on the host. All ranks have
    the same readings. A checkpoint keeps the readings and the embeddings of rank 0.

    Args:
        every_n_steps: Optimizer steps between two readings.
        buffer: Embeddings that are kept, over all ranks; ranks up to a quarter of it are measured
            well.
        head: Which of the representations.
        explosion: When a gradient norm is too large; None for `ExplosionWatch()`.

    Raises:
        ValueError: If `every_n_steps` is below 1 or `buffer` below 8. In training: if there is no
            such head, or its embeddings are not of two or three dimensions.
        TypeError: When training begins, if the module does not publish representations.

    Example:
        >>> health = EmbeddingHealth(every_n_steps=100, head="semantic")
        >>> trainer = pl.Trainer(callbacks=[health], logger=False, barebones=False)
    """

    _rows: EmbeddingBuffer
    _norms: dict[int, Tensor]  # by step, on the device
    _sent: list[tuple[tuple[int, ...], int, EmbeddingLaunch]]  # steps of norms, logger's axis

    def __init__(
        self,
        every_n_steps: int = 50,
        buffer: int = 256,
        head: str = "semantic",
        explosion: ExplosionWatch | None = None,
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be >= 1, got {every_n_steps}.")
        if buffer < 8:
            raise ValueError(f"`buffer` must be >= 8, got {buffer}.")
        self.every_n_steps, self.buffer, self.head = every_n_steps, buffer, head
        self.explosion = explosion or ExplosionWatch()
        self._clear()

    @property
    @override
    def state_key(self) -> str:
        """Key of this instance's state in a checkpoint: the head."""
        return self._generate_state_key(head=self.head)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._clear()
        if not isinstance(pl_module, PublishesRepresentations):
            raise TypeError(
                "EmbeddingHealth needs a module with `last_representations()`, which returns"
                f" embeddings by head, got {type(pl_module).__name__}; add the method."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._claimed = trainer.global_step
        num_rows = -(-self.buffer // trainer.world_size)
        restored, self._rows = self._rows, EmbeddingBuffer(num_rows)
        self._rows.load_state_dict(restored.state_dict())

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        norm = gradient_norm(pl_module)
        if norm is not None:
            self._norms[trainer.global_step + 1] = norm

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, PublishesRepresentations), "checked in `setup`"
        published = pl_module.last_representations() or {}
        if published:
            self._rows.push(embeddings_of(published, self.head).flatten(0, -2))
        step = trainer.global_step
        if step == self._claimed:
            return  # gradients are still being accumulated
        named = self._deliver(trainer)
        if named and not getattr(trainer, "barebones", False):
            pl_module.log_dict(named, logger=False, rank_zero_only=False)
        if is_due(self.every_n_steps, step, self._claimed) and published:
            self._launch(trainer, pl_module, published)
        self._claimed = step

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._deliver(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self._rows.state_dict(),
            "spread": asdict(self._spread),
            "rank": asdict(self._rank),
            "gradient": asdict(self._gradient),
            "norms": {step: float(norm) for step, norm in self._norms.items()},
            "sent": [(steps, x, launch.state_dict()) for steps, x, launch in self._sent],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rows = state_dict["rows"]["rows"]
        self._rows = EmbeddingBuffer(self.buffer if rows is None else len(rows))
        self._rows.load_state_dict(state_dict["rows"])
        self._spread = _collapse_state(state_dict["spread"])
        self._rank = _collapse_state(state_dict["rank"])
        self._gradient = ExplosionState(**state_dict["gradient"])
        self._norms = {step: torch.tensor(norm) for step, norm in state_dict["norms"].items()}
        self._sent = [
            (tuple(steps), x, EmbeddingLaunch.from_state(launch))
            for steps, x, launch in state_dict["sent"]
        ]

    def _clear(self) -> None:
        self._rows = EmbeddingBuffer(self.buffer)
        self._spread, self._rank = CollapseState(), CollapseState()
        self._gradient = ExplosionState()
        self._norms = {}
        self._sent = []
        self._claimed = 0

    def _launch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, published: Mapping[str, Tensor]
    ) -> None:
        """Measure on the device, and send the numbers to the host."""
        rows = self._rows.rows
        assert rows is not None, "embeddings have just been taken in"
        embeddings = embeddings_of(published, self.head)
        unknown = rows.new_tensor(math.nan)
        local = {
            "is_full": rows.new_tensor(float(self._rows.is_full)),
            "alignment": unknown,
            "anomaly_std": unknown,
        }
        if embeddings.ndim == 3 and embeddings.shape[1] > 1:
            local["alignment"] = alignment(embeddings[:, 0].float(), embeddings[:, 1].float())
        if "anomaly_score" in published:
            local["anomaly_std"] = published["anomaly_score"].float().std(correction=0)
        if trainer.world_size > 1:
            rows = gathered_rows(trainer, rows)
            local = mean_over_ranks(trainer, local)
        steps = tuple(self._norms)
        norms = {f"norm {step}": norm for step, norm in self._norms.items()}
        self._norms = {}
        launch = launch_embeddings(trainer.global_step, rows, local | norms | gates_of(pl_module))
        self._sent.append((steps, num_batches(trainer), launch))

    def _deliver(self, trainer: pl.Trainer) -> dict[str, float]:
        """Judge what has been measured before, give it to the loggers, and return it."""
        named: dict[str, float] = {}
        sent, self._sent = self._sent, []
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        for steps, x, launch in sent:
            values = launch.measures()
            norms = {step: values.pop(f"norm {step}") for step in steps}
            self._watch_gradient(norms, has_scaler=has_scaler)
            if norms:
                values["gradient_norm"] = norms[steps[-1]]
            if values.pop("is_full") < 1:
                values = {k: v for k, v in values.items() if k == "gradient_norm"}
            else:
                self._watch_embeddings(launch, values)
            measured = {name: value for name, value in values.items() if not math.isnan(value)}
            named = {f"embedding/{name}": value for name, value in measured.items()}
            for logger in trainer.loggers:
                logger.log_metrics(named, step=x)
        return named

    def _watch_embeddings(self, launch: EmbeddingLaunch, values: Mapping[str, float]) -> None:
        step, before = launch.launch.step, (self._spread, self._rank)
        spread, excess = 1 - values["mean_cosine"], values["effective_rank"] - 1
        self._spread, verdict = _SPREAD.update(self._spread, step, spread)
        if self._spread.is_alarmed and not before[0].is_alarmed:
            limit = 1 - _SPREAD.threshold(self._spread)
            _warn(step, f"mean cosine is {1 - spread:.4g}", f"above {limit:.4g}", verdict)
        self._rank, verdict = _RANK.update(self._rank, step, excess)
        is_new = self._rank.is_alarmed and not before[1].is_alarmed
        if is_new and not self._spread.is_alarmed:  # one collapse, one warning
            limit = 1 + _RANK.threshold(self._rank)
            what = f"effective rank is {1 + excess:.4g} of at most {launch.max_rank}"
            _warn(step, what, f"below {limit:.4g}", verdict)

    def _watch_gradient(self, norms: Mapping[int, float], *, has_scaler: bool) -> None:
        for step, norm in norms.items():
            if has_scaler and not math.isfinite(norm):
                continue  # an overflow, which the scaler skips
            before = self._gradient
            self._gradient = self.explosion.update(before, norm)
            if self._gradient.is_alarmed and not before.is_alarmed:
                rank_zero_warn(
                    f"EmbeddingHealth: the gradient explodes at step {step}: its norm before"
                    f" clipping is {norm:.4g}, above {self.explosion.threshold(before):.4g}."
                    " Set `gradient_clip_val` or lower the learning rate if it goes on."
                )


def _warn(step: int, what: str, limit: str, verdict: CollapseVerdict) -> None:
    where = "which is" if verdict is CollapseVerdict.COLLAPSED else "on its way to"
    rank_zero_warn(
        f"EmbeddingHealth: embeddings collapse at step {step}: their {what}, {where} {limit}."
        " Lower the learning rate or raise the weight of what keeps embeddings apart (more"
        " negatives, uniformity)."
    )


def _collapse_state(saved: Mapping[str, Any]) -> CollapseState:
    recent = tuple((step, value) for step, value in saved["recent"])
    return CollapseState(**{**saved, "recent": recent})
