"""What a Hugging Face causal LM is called with, from the batches of our data modules."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spectral_lightning.tasks.bits_per_byte import IGNORED
from spectral_lightning.tasks.hf_loss import IGNORED_LABEL, shifted

_TARGETS = ("labels", "shift_labels")


def inputs_and_targets(batch: Any) -> tuple[dict[str, Any], Tensor]:
    """Return the arguments of a model and the target at each position.

    Args:
        batch: Either a mapping with `input_ids` and `labels`, both ``(B, T)``, where -100 is
            ignored and the labels are not shifted, or a tensor of token ids ``(B, T + 1)``, where
            targets of -1 are ignored.

    Returns:
        Arguments without labels, and targets ``(B, T)``, int64, with -100 where none counts.

    Raises:
        TypeError: If the batch is neither.
        ValueError: If a mapping lacks one of the two.
    """
    if isinstance(batch, Tensor):
        targets = batch[:, 1:]
        # What a causal model reads at an ignored target has no effect on the targets before it.
        inputs = {"input_ids": batch[:, :-1].clamp(min=0)}
        return inputs, torch.where(targets == IGNORED, IGNORED_LABEL, targets)
    if not isinstance(batch, Mapping):
        raise TypeError(
            "A batch must be a dict with `input_ids` and `labels`, or a tensor of token ids, got a"
            f" {type(batch).__name__}."
        )
    if not {"input_ids", "labels"} <= batch.keys():
        raise ValueError(
            f"A batch must have `input_ids` and `labels` when it is a dict, got {[*batch]}."
        )
    inputs = {name: value for name, value in batch.items() if name not in _TARGETS}
    given = batch.get("shift_labels")
    return inputs, shifted(batch["labels"]) if given is None else given
