"""Non-finite guard: no NaN or infinity reaches the weights.

Lives here: finding out, and skipping a step. Does not live here: when to give up (`control`).
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from spectral_lightning.callbacks.base import num_batches
from spectral_lightning.control.non_finite import SkipPolicy, SkipState, SkipVerdict
from spectral_lightning.spectra.targets import clean_name

_NUM_NAMED = 3  # parameters that a warning names
_LOSS = "the loss"


@runtime_checkable
class PublishesLossTerms(Protocol):
    """A LightningModule that says what its loss is made of, so that a bad term has a name."""

    def last_loss_terms(self) -> Mapping[str, Tensor] | None:
        """Terms of the last training step by name, detached; None before the first."""


class NonFiniteGuard(pl.Callback):
    """Skip every optimizer step whose loss or gradient is not finite.

    Works with any task: looks at the loss of each backward pass, at its terms if the module
    publishes them (`PublishesLossTerms`), and at the whole gradient, on all ranks. If anything is
    NaN or infinite anywhere, all ranks drop their gradients: optimizers then touch neither weights,
    nor momenta, step counters or weight decay. With accumulation the whole step is dropped. One
    warning for each run of bad steps names what was not finite; loggers get
    ``non_finite/num_skipped``. What goes on: `global_step` and learning rate schedules count
    skipped steps, so that the length of a run stays. What is not undone: buffers that a forward
    pass wrote, such as the running means of batch norm.

    A gradient scaler (``16-mixed``) has overflows of its own: where the loss is not NaN and its
    terms are finite, a gradient that is not finite is left to it, and not counted, until its scale
    has fallen to 1.

    The host waits for the device once per optimizer step, since the step has to be stopped in time
    (under ``16-mixed`` and with several ranks it waits anyway). Put it first among the callbacks,
    so that others do not see the gradients of a step that is skipped. In manual optimization,
    publish the terms before `manual_backward`.

    Args:
        max_skips_in_a_row: Steps that may be skipped one after the other; the next one raises.

    Raises:
        ValueError: If `max_skips_in_a_row` is negative.
        FloatingPointError: In training, if more steps in a row are not finite.

    Example:
        >>> trainer = pl.Trainer(callbacks=[NonFiniteGuard()], logger=False)
    """

    def __init__(self, max_skips_in_a_row: int = 10) -> None:
        super().__init__()
        self.policy = SkipPolicy(max_skips_in_a_row=max_skips_in_a_row)
        self._state = SkipState()
        self._logged = 0
        self._finite: dict[str, Tensor] = {}

    @property
    def num_skipped(self) -> int:
        """Optimizer steps skipped so far, also before a resume."""
        return self._state.num_skipped

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":  # what an earlier fit left must not reach this one
            self._state, self._logged, self._finite = SkipState(), 0, {}

    @override
    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        terms = {_LOSS: _scaled_loss(loss.detach(), _scaler(trainer))}
        if isinstance(pl_module, PublishesLossTerms):
            published = pl_module.last_loss_terms() or {}
            terms |= {f"loss term {name!r}": term.detach() for name, term in published.items()}
        sums = [term.sum().to(loss.device, torch.float32) for term in terms.values()]
        for name, is_finite in zip(terms, torch.stack(sums).isfinite(), strict=True):
            before = self._finite.get(name)
            self._finite[name] = is_finite if before is None else is_finite & before

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        flags, self._finite = self._finite, {}
        in_loss, in_gradient = _on_all_ranks(trainer, flags, _gradients(optimizer))
        scaler = _scaler(trainer)
        self._state, verdict = self.policy.update(
            self._state,
            is_finite=in_loss and in_gradient,
            is_overflow=in_loss and scaler is not None and scaler.get_scale() > 1,
        )
        if verdict in (SkipVerdict.FINE, SkipVerdict.LEFT_TO_SCALER):
            return
        is_first, gives_up = self._state.in_a_row == 1, verdict is SkipVerdict.GIVE_UP
        if is_first or gives_up:
            names = _bad_names(trainer, pl_module, flags, optimizer)
        if gives_up:
            raise FloatingPointError(
                f"`max_skips_in_a_row` = {self.policy.max_skips_in_a_row} was exceeded at step"
                f" {trainer.global_step + 1}: {names} not finite. Lower the learning rate, set"
                " `gradient_clip_val`, or look at the batch; then resume from a checkpoint."
            )
        if is_first:
            rank_zero_warn(
                f"NonFiniteGuard skips optimizer step {trainer.global_step + 1}: {names} not"
                " finite. Weights and optimizer state stay as they are; more in a row are not"
                f" reported until {self.policy.max_skips_in_a_row} are exceeded."
            )
        _drop(optimizer, scaler)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.num_skipped == self._logged:
            return
        self._logged = self.num_skipped
        for logger in trainer.loggers:
            values = {"non_finite/num_skipped": float(self.num_skipped)}
            logger.log_metrics(values, step=num_batches(trainer))

    @override
    def state_dict(self) -> dict[str, Any]:
        return asdict(self._state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = SkipState(**state_dict)
        self._logged = self.num_skipped


def _scaler(trainer: pl.Trainer) -> Any:
    """The gradient scaler, if the precision has one."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _scaled_loss(loss: Tensor, scaler: Any) -> Tensor:
    """The loss, without infinities if it has been scaled: those may come from the scale alone."""
    if scaler is None:
        return loss
    return torch.where(loss.isnan(), loss, torch.zeros_like(loss))


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    """Gradients of all parameters of an optimizer; of a sharded one this rank's part."""
    found = [p.grad for group in optimizer.param_groups for p in group["params"]]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in found if g is not None]
    return [g.coalesce().values() if g.is_sparse else g for g in local if g.numel()]


def _on_all_ranks(
    trainer: pl.Trainer, flags: dict[str, Tensor], gradients: list[Tensor]
) -> tuple[bool, bool]:
    """Whether loss, and gradient, are finite everywhere; the one place that waits."""
    device = trainer.strategy.root_device
    # The largest entry: a norm of finite numbers can overflow.
    largest = torch.nn.utils.get_total_norm(gradients, torch.inf)
    in_loss = torch.stack(list(flags.values())).all() if flags else torch.tensor(True)
    parts = [in_loss.to(device), largest.isfinite().to(device)]
    both = torch.stack(parts).to(torch.int32)
    if trainer.world_size > 1:
        torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MIN)
    loss_flag, gradient_flag = both.tolist()
    return bool(loss_flag), bool(gradient_flag)


def _bad_names(
    trainer: pl.Trainer, module: pl.LightningModule, flags: dict[str, Tensor], optimizer: Optimizer
) -> str:
    """What was not finite on any rank, as the subject of a sentence and its verb."""
    terms = [name for name, flag in flags.items() if not flag]
    named = {id(p): clean_name(name) for name, p in module.named_parameters()}
    layers = [
        named.get(id(p), "a parameter outside the module")
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None and not _is_finite(p.grad)
    ]
    if trainer.world_size > 1:  # all ranks are here, since they decide alike
        everywhere: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(everywhere, (terms, layers))
        terms = [*dict.fromkeys(name for found, _ in everywhere for name in found)]
        layers = [*dict.fromkeys(name for _, found in everywhere for name in found)]
    if named_terms := [name for name in terms if name != _LOSS]:
        return " and ".join(named_terms) + (" is" if len(named_terms) == 1 else " are")
    if terms:
        return f"{_LOSS} is"
    more = f" and {len(layers) - _NUM_NAMED} more" if len(layers) > _NUM_NAMED else ""
    return f"the gradient of {', '.join(layers[:_NUM_NAMED])}{more} is"


def _is_finite(gradient: Tensor) -> bool:
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    values = local.coalesce().values() if local.is_sparse else local
    return bool(values.isfinite().all())


def _drop(optimizer: Optimizer, scaler: Any) -> None:
    """Make the coming step one that does nothing: optimizers pass over what has no gradient."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        # The scaler looks for overflow in the gradients of a fused optimizer, and needs some.
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.fill_(torch.inf)
        return
    for parameter in parameters:
        parameter.grad = None
