"""What `SVDModeSwitch` refuses, in a sentence each."""

from collections.abc import Iterable, Mapping
from typing import get_args

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spectral_lightning.callbacks.svd_mode_factored import Protection
from spectral_lightning.control import ModePolicy
from spectral_lightning.spectra import Target


def check_settings(policy: object, protection: str) -> None:
    """Refuse what is no policy or no protection, and those that do not go together.

    Raises:
        TypeError: If `policy` is no policy.
        ValueError: If `protection` is unknown, or cannot serve the policy.
    """
    if not isinstance(policy, ModePolicy):
        raise TypeError(f"`policy` must be a ModePolicy or None, got {policy!r}.")
    if protection not in get_args(Protection):
        allowed = ", ".join(get_args(Protection))
        raise ValueError(f"`protection` must be one of {allowed}, got {protection!r}.")
    if protection == "gradients" and policy.needs_all_values:
        raise ValueError(
            "`protection` must be one of the weight's own directions for a policy that looks at all"
            f" singular values, as {type(policy).__name__}, got 'gradients'; take 'two_sided'."
        )


def refuse_overlap(names: Iterable[str], others: Iterable[Iterable[str]]) -> None:
    """Refuse a layer that another instance switches too: each would undo the other's work.

    Raises:
        ValueError: If there is one.
    """
    taken = {name for other in others for name in other}
    for name in names:
        if name in taken:
            raise ValueError(
                f"`layers` of several SVDModeSwitch callbacks must not overlap, got {name!r} in two"
                " of them; give each its own layers."
            )


def refuse_thawed(model: nn.Module | None, frozen: Mapping[str, Target]) -> None:
    """Refuse a layer that DDP took for frozen: its gradients differ from rank to rank.

    Raises:
        RuntimeError: If one of them is trained now.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    for name, target in frozen.items():
        if target.trainable:
            raise RuntimeError(
                f"SVDModeSwitch cannot switch {name}: it was frozen when DDP wrapped the model,"
                " which never averages its gradients; unfreeze it before `fit`, or freeze it by a"
                " learning rate of 0."
            )
