"""The loss of a Hugging Face causal LM: installed in the model, and handed to its Trainer.

A model computes its loss by its attribute `loss_function`; what stands there is used by training,
evaluation and whoever else calls the model with labels. The settings are kept in the model's
config, so that a saved model knows which probabilities its logits stand for.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectral_lightning.losses import CrossEntropy

LOSS_KEY = "spectral_loss"
"""Entry of a model's config that holds the settings of its loss."""

IGNORED_LABEL = -100
"""Label that is not predicted, as in Hugging Face's models."""


class CausalLMLoss:
    """A loss with the signature that Hugging Face's causal LMs call.

    Labels are shifted as in `transformers`: logits at one position are held against the next label.
    Not an ``nn.Module`` on purpose: a model would store one among its modules, and go on using its
    own loss without a word.

    Args:
        cross_entropy: Transform and settings of the cross-entropy.

    Attributes:
        divisor: `num_items_in_batch` of the last call; None before, and when none was given.
    """

    def __init__(self, cross_entropy: CrossEntropy) -> None:
        self.cross_entropy = cross_entropy
        self.was_called = False
        self.divisor: Tensor | float | None = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = IGNORED_LABEL,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the loss of a batch, nats per token.

        Args:
            logits: Shape ``(B, T, V)``, any float dtype.
            labels: Token ids, shape ``(B, T)``, int64; unused if `shift_labels` are given.
            vocab_size: Unused: the logits know it.
            num_items_in_batch: What the sum over the tokens is divided by; None for the number of
                tokens that count.
            ignore_index: Label that does not count.
            shift_labels: Targets of the logits, shape ``(B, T)``, where they are shifted already.
            kwargs: What else a model passes on; unused.

        Returns:
            A scalar; 0 for a batch in which no label counts.
        """
        self.was_called, self.divisor = True, num_items_in_batch
        if shift_labels is None:
            assert labels is not None
            shift_labels = shifted(labels, ignore_index)
        targets = shift_labels.to(logits.device).flatten()
        if ignore_index != IGNORED_LABEL:
            targets = targets.masked_fill(targets == ignore_index, IGNORED_LABEL)
        logits = logits.flatten(0, -2)
        if num_items_in_batch is None:
            return self.cross_entropy(logits, targets, reduction="mean")
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(logits.device)
        return self.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def shifted(labels: Tensor, ignore_index: int = IGNORED_LABEL) -> Tensor:
    """Return the targets of the logits at each position: the next label, and none at the end.

    Args:
        labels: Token ids, shape ``(..., T)``, int64.
        ignore_index: Label that does not count.

    Example:
        >>> shifted(torch.tensor([[5, 6, 7]]))
        tensor([[   6,    7, -100]])
    """
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def inner_model(model: nn.Module) -> Any:
    """Return the Hugging Face model inside a PEFT model, or the model itself."""
    get_base_model: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def saved_loss(model: nn.Module) -> CrossEntropy | None:
    """Return the loss that a model's config says it was trained with, or None."""
    settings = getattr(inner_model(model).config, LOSS_KEY, None)
    return None if settings is None else CrossEntropy(**settings)


def install_loss(model: nn.Module, loss: CrossEntropy | None = None) -> CausalLMLoss:
    """Make a Hugging Face causal LM compute its loss by a cross-entropy of ours.

    The settings go into the model's config, which `save_pretrained` writes. Loading a model does
    not install its loss: call this function again, without `loss`. With PEFT it is the inner model
    that gets the loss. Its weights, and what it generates, stay as they are.

    Args:
        model: A `PreTrainedModel`, or a PEFT model around one.
        loss: Settings; None for those of the model's config, and softmax if it has none.

    Returns:
        What stands in the model's `loss_function` now.

    Raises:
        TypeError: If the model has no `loss_function` that can be replaced.
        ValueError: If a Liger kernel computes the model's loss.

    Example:
        >>> from spectral_lightning.testing.models import tiny_gpt2
        >>> model = tiny_gpt2()
        >>> install_loss(model, CrossEntropy(transform="stablemax")) is model.loss_function
        True
        >>> model.config.spectral_loss["transform"]
        'stablemax'
    """
    inner = inner_model(model)
    if not (hasattr(type(inner), "loss_function") and hasattr(inner, "config")):
        raise TypeError(
            "`model` must be a causal LM of Hugging Face with a `loss_function`, got a"
            f" {type(inner).__name__}."
        )
    if getattr(inner.forward, "__module__", "").startswith("liger_kernel"):
        raise ValueError(
            "`model` must compute its logits for the loss to be replaced, but a Liger kernel takes"
            " their place; load it without `use_liger_kernel`."
        )
    loss = loss or saved_loss(inner) or CrossEntropy()
    hook = CausalLMLoss(loss)
    inner.loss_function = hook
    if inner.loss_function is not hook:
        raise TypeError(
            "`model` must use what is assigned to its `loss_function`, but a"
            f" {type(inner).__name__} keeps its own."
        )
    setattr(inner.config, LOSS_KEY, asdict(loss))
    return hook


def refuse_bypass(model: nn.Module, hook: CausalLMLoss) -> None:
    """Refuse a model that has just been called with labels and left its loss aside.

    Args:
        model: The model, named in the error.
        hook: Its loss; `was_called` and `divisor` were cleared before the call.

    Raises:
        ValueError: If the loss was not called, or not told by what to divide.
    """
    if hook.was_called and hook.divisor is not None:
        return
    what = "`num_items_in_batch`" if hook.was_called else "labels"
    raise ValueError(
        f"`model` must hand {what} on to its `loss_function`, but a"
        f" {type(inner_model(model)).__name__} does not; turn off fused losses such as"
        " `use_liger_kernel`, or use another model class."
    )


def assert_loss_is_used(model: nn.Module) -> None:
    """Refuse a model whose forward pass leaves its `loss_function` aside.

    Costs one forward pass of two tokens in the model's present mode; the random state stays as it
    is. `HFCausalLM` needs no such call: it looks at every training step.

    Args:
        model: A model after `install_loss`.

    Raises:
        TypeError: If the model's loss was not installed by `install_loss`.
        ValueError: If it is not used.
    """
    hook = getattr(inner_model(model), "loss_function", None)
    if not isinstance(hook, CausalLMLoss):
        raise TypeError(
            "`model` must have a loss of ours, got its own; call `install_loss(model)` first."
        )
    hook.was_called, hook.divisor = False, None
    device = next(model.parameters()).device
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch.no_grad(), torch.random.fork_rng():
        model(input_ids=tokens, labels=tokens, use_cache=False, num_items_in_batch=1)
    refuse_bypass(model, hook)


def stablemax_loss(
    transform: Literal["stablemax", "softmax"] = "stablemax",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Callable[..., Tensor]:
    """Return a loss for ``transformers.Trainer(compute_loss_func=...)``.

    The model itself is left as it is, so what it generates and saves knows nothing of the loss.
    With `install_loss(model, CrossEntropy(transform="stablemax"))` it does, and the Trainer needs
    no argument at all. A mixture of experts trained by this function has no loss that balances
    them. Leave the Trainer's `label_smoothing_factor` at 0: it smooths a softmax.

    Args:
        transform: What turns logits into probabilities.
        label_smoothing: Share of the target's probability that is spread over all, in ``[0, 1)``.
        z_loss: Weight of the squared logarithm of the normaliser, at least 0.

    Returns:
        A function of the model's outputs, the labels and `num_items_in_batch`.

    Example:
        >>> loss = stablemax_loss("softmax")
        >>> logits = torch.zeros(1, 3, 8)
        >>> loss({"logits": logits}, torch.tensor([[1, 2, 3]]))  # the logarithm of 8
        tensor(2.0794)
    """
    settings = CrossEntropy(transform=transform, label_smoothing=label_smoothing, z_loss=z_loss)
    hook = CausalLMLoss(settings)

    def compute_loss(
        outputs: Any, labels: Tensor, num_items_in_batch: Tensor | float | None = None
    ) -> Tensor:
        return hook(outputs["logits"], labels, num_items_in_batch=num_items_in_batch)

    return compute_loss
