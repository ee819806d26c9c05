"""Softmax collapse: watch how close a classifier is to a loss that rounds to nothing.

Lives here: hooks, logs, and the cosine of gradients to weights. Does not live here: what is
measured of the logits (`nn.collapse`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from spectral_lightning.callbacks.base import log_interval, num_batches
from spectral_lightning.nn.collapse import DTYPES, QUANTILES, Collapse, softmax_collapse
from spectral_lightning.spectra.targets import clean_name

_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


class SoftmaxCollapse(pl.Callback):
    """Measure how near the cross-entropy is to rounding to 0, in several dtypes, and why.

    Logits are what the module `logits` returns, whole or as the attribute ``logits`` of a result;
    targets are looked for in the batch (`batch_targets`). So it works with any task whose model is
    a module of its own, such as `Classification`, `LanguageModeling` and `HFCausalLM`.

    Logs, in training at every `every_n_steps` for the batch of that step and in validation as means
    over batches, for each dtype under ``collapse/train`` and ``collapse/valid``: ``zero_loss``,
    ``zero_gradient`` (of the correct class) and ``absorbed`` (the normaliser is its largest term),
    fractions of the samples if the ordinary cross-entropy were computed in that dtype; and
    ``headroom_p{10,50,90}``, the lead of the correct class in units of the lead that collapses.
    ``logit_scaling`` is the derivative of the loss with respect to a factor on all logits, negative
    where growth alone pays. In training also ``collapse/cos/<layer>`` and ``collapse/cos/all``, the
    cosine of minus the gradient of a step to the weight before any projection or clipping: positive
    where a step would make the weight grow.

    The run itself is not changed, and the host waits for the device only where loggers write. A
    training step between two measurements costs nothing.

    Args:
        logits: Name of the module that returns the logits.
        every_n_steps: Optimizer steps between two measurements; None takes the Trainer's
            `log_every_n_steps`, and loggers see only multiples of that.
        dtypes: Dtypes to judge the loss in.
        transform: ``softmax`` or ``stablemax``; None takes that of the task's `loss`, if it has
            one, and else softmax.
        max_samples: Targets of a batch that are measured at most, evenly spaced.
        targets: Finds the targets in a batch, of the shape of the logits without their last
            dimension; negative ones do not count. None for `batch_targets`.

    Raises:
        ValueError: If an argument is out of its range. When training begins: if there is no such
            module. When measuring: if logits and targets do not fit together.
        TypeError: When measuring, if targets or logits are not found.

    References:
        Prieto et al. (2025), "Grokking at the edge of numerical stability", sections 3 and 4
        (collapse; gradients along the weights). https://arxiv.org/abs/2501.04697

    Example:
        >>> callback = SoftmaxCollapse(every_n_steps=100, dtypes=["float16", "float32"])
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False)
    """

    def __init__(
        self,
        logits: str = "model",
        every_n_steps: int | None = None,
        dtypes: Sequence[str] = tuple(_NAMES),
        transform: str | None = None,
        max_samples: int = 2048,
        targets: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be >= 1 or None, got {every_n_steps}.")
        unknown = [name for name in dtypes if name not in _NAMES]
        if unknown or not dtypes:
            raise ValueError(
                f"`dtypes` must be some of {', '.join(_NAMES)}, got {', '.join(unknown) or 'none'}."
            )
        if transform not in (None, "softmax", "stablemax"):
            raise ValueError(f"`transform` must be softmax, stablemax or None, got {transform!r}.")
        if max_samples < 1:
            raise ValueError(f"`max_samples` must be >= 1, got {max_samples}.")
        self.logits, self.every_n_steps, self.dtypes = logits, every_n_steps, dtypes
        self.transform, self.max_samples = transform, max_samples
        self.targets = batch_targets if targets is None else targets
        self._handle: Any = None
        self._is_watching = False
        self._output: Any = None
        self._products: dict[str, Tensor] = {}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()
        modules = dict(pl_module.named_modules())
        if self.logits not in modules:
            raise ValueError(
                f"`logits` must name a module of the task, got {self.logits!r}; it has"
                f" {', '.join(name for name, _ in pl_module.named_children()) or 'none'}."
            )
        self._handle = modules[self.logits].register_forward_hook(self._keep)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        interval = log_interval(trainer, self.every_n_steps)
        # As Lightning counts, so that loggers get what is measured; 0 is for never.
        self._is_watching = bool(interval) and (num_batches(trainer) + 1) % interval == 0

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Cosines need no unscaling, and here nobody has projected or clipped the gradients yet.
        if self._is_watching and not trainer.fit_loop._should_accumulate():
            self._products |= _products(pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._is_watching and not trainer.fit_loop._should_accumulate():
            self._log(trainer, pl_module, "train", batch)
            cosines = {f"collapse/cos/{name}": c for name, c in _cosines(self._products).items()}
            pl_module.log_dict(cosines)
        self._forget()

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._is_watching = not trainer.sanity_checking

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if self._is_watching:
            self._log(trainer, pl_module, "valid", batch)
        self._forget()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _log(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, batch: Any
    ) -> None:
        logits, targets = _samples(self._output, self.targets(batch), self.max_samples)
        transform: Any = self.transform
        if transform is None:
            transform = getattr(getattr(pl_module, "loss", None), "transform", "softmax")
        # Apple's GPUs know no float64.
        known = [name for name in self.dtypes if (name, logits.device.type) != ("float64", "mps")]
        collapse = softmax_collapse(logits, targets, [_NAMES[name] for name in known], transform)
        pl_module.log_dict(
            {f"collapse/{stage}/{name}": value for name, value in _named(collapse).items()},
            batch_size=len(targets),
            sync_dist=trainer.world_size > 1,
        )

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._is_watching:
            self._output = getattr(output, "logits", output)
            if isinstance(self._output, Tensor):
                self._output = self._output.detach()

    def _forget(self) -> None:
        self._is_watching, self._output, self._products = False, None, {}

    def _stop(self) -> None:
        self._forget()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def batch_targets(batch: Any) -> Tensor:
    """Find the targets in a batch of one of the usual forms.

    Args:
        batch: ``(inputs, targets)``; or token ids ``(B, T + 1)``, each the target of those before
            it; or a mapping with ``labels``, which are shifted likewise if they are ``(B, T)``, or
            ``shift_labels``, which are not.

    Returns:
        Class ids, int64; -100 or another negative number where none counts.

    Raises:
        TypeError: If it has another form.

    Example:
        >>> batch_targets(torch.tensor([[5, 6, 7]]))
        tensor([[6, 7]])
    """
    if isinstance(batch, Tensor) and batch.ndim == 2 and not batch.is_floating_point():
        return batch[:, 1:]
    if isinstance(batch, Mapping) and isinstance(batch.get("shift_labels"), Tensor):
        return batch["shift_labels"]
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        labels = batch["labels"]
        if labels.ndim < 2:
            return labels
        return nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    if isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[1]
    raise TypeError(
        "A batch must be (inputs, targets), token ids or a dict with `labels`, got a"
        f" {type(batch).__name__}; give SoftmaxCollapse `targets`, a function that finds them."
    )


def _samples(logits: Any, targets: Tensor, max_samples: int) -> tuple[Tensor, Tensor]:
    """Some rows of logits with their targets.

    Raises:
        TypeError: If there are no logits.
        ValueError: If they do not fit the targets.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(
            "SoftmaxCollapse must see logits, but its module returned a"
            f" {type(logits).__name__} in this step; set `logits` to the name of the module that"
            " returns them."
        )
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"Targets must have shape {tuple(logits.shape[:-1])}, that of the logits without"
            f" classes, got {tuple(targets.shape)}; give SoftmaxCollapse `targets`."
        )
    rows, ids = logits.flatten(0, -2), targets.flatten()
    step = -(-len(ids) // max_samples)
    return rows[::step], ids[::step]


def _named(collapse: Collapse) -> dict[str, Tensor]:
    """Measures by what comes after ``collapse/<stage>/`` in loggers."""
    named = {"logit_scaling": collapse.logit_scaling}
    for dtype, measures in collapse.dtypes.items():
        for kind in ("zero_loss", "zero_gradient", "absorbed"):
            named[f"{kind}/{dtype}"] = getattr(measures, kind)
        for quantile, value in zip(QUANTILES, measures.headroom, strict=True):
            named[f"headroom_p{100 * quantile:.0f}/{dtype}"] = value
    return named


@torch.no_grad()
def _products(pl_module: nn.Module) -> dict[str, Tensor]:
    """Inner products -g.w, w.w and g.g of each parameter that has a gradient, shape ``(3,)``."""
    products = {}
    for name, weight in pl_module.named_parameters():
        if weight.grad is None or weight.grad.layout is not torch.strided:
            continue
        # Squares of gradients as small as 1e-25 vanish in float32.
        dtype = torch.float32 if weight.device.type == "mps" else torch.float64
        w, g = weight.detach().to(dtype), weight.grad.to(dtype)
        sums = [-(g * w).sum(), w.square().sum(), g.square().sum()]
        whole = [s.full_tensor() if isinstance(s, DTensor) else s for s in sums]
        products[clean_name(name.removesuffix(".weight"))] = torch.stack(whole)
    return products


def _cosines(products: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cosine of each layer, and of all parameters as one vector; 0 where one of the two is 0."""
    if not products:
        return {}
    device = next(iter(products.values())).device
    rows = [product.to(device) for product in products.values()]
    dots, weights, gradients = torch.stack([*rows, torch.stack(rows).sum(0)]).unbind(1)
    norms = weights.sqrt() * gradients.sqrt()
    cosines = torch.where(norms > 0, dots / norms, 0).float()
    return dict(zip([*products, "all"], cosines, strict=True))
